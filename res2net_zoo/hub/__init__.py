"""Publish, verify and mirror model folders."""
