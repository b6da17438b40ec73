"""Original weight files and model folders: readers, key renaming, configs, cards, fingerprints, provenance."""
