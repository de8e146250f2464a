"""Data: readers, generators and the memory-mapped store they write."""
