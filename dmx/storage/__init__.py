"""Files, journals and claims that outlive a process, and object storage."""
