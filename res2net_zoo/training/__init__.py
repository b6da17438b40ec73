"""Training of classifiers; its loop, checkpoints and optimization also serve the tasks."""
