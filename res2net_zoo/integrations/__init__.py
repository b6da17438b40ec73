"""The zoo's models in other frameworks. Each module imports its framework, which is not a dependency of the zoo."""
