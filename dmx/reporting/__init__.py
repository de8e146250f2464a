"""Reports: read a run folder into typed records, and show them as HTML, markdown, JSON or CSV."""
