"""From an original's file to a model folder: readers, renaming, configs, cards, fingerprints, provenance."""
