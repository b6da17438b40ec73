"""Cost, class activation maps, ablations and benchmarks of models."""
