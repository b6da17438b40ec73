"""Publishing, verifying and mirroring model folders."""
