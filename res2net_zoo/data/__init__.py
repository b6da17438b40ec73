"""From a source of images to batches: sources, decoding, labels."""
