"""Datasets: sources of images, decoding and labels."""
