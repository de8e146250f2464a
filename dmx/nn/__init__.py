"""The model and its mathematics on real tokens only: packing, operations, encoder, optimizer."""
