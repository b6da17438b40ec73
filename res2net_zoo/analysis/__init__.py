"""What models cost, where they look, and how they compare."""
