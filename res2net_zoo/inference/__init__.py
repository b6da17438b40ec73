"""Inference as fast as the machine allows, and export to files that run without PyTorch."""
