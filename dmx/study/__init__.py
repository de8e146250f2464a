"""One search on Ray: trials, schedulers that survive restarts, files, views, final test."""
