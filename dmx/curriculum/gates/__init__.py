"""Gates of a curriculum; each file here registers its own, so a new one is one file."""
