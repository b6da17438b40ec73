"""Publish and mirror model folders."""
