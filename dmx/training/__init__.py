"""One run, without Ray: the loop, its passes, checkpoints, transfer, several processes."""
