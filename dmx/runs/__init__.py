"""What a run leaves on disk: names, events, and the one reader of them."""
