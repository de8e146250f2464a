"""Mathematics on real tokens only: packing, attention with dropout on a CPU, optimizer, device."""
