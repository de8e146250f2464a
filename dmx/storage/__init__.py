"""What outlives a process: claims, journals, storage that fails for a while, object storage."""
