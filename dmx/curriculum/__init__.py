"""Curricula: stages, gates, what comes next, the controller, and how a run is shown."""
