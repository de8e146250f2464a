"""Reports: a run as a page, markdown, JSON or CSV; the leaderboard of many runs."""
