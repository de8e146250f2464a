"""One search on Ray: trials, schedulers that survive restarts, files, views, final test."""

import dmx.cluster  # noqa: F401  sets Ray's environment before Ray is imported
