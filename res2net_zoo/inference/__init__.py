"""Optimized inference, and export to files that run without PyTorch."""
