"""One file per source of data; each registers itself, so a new source is one new file."""
