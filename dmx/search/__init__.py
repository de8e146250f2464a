"""What a study searches and remembers: spaces, samplers, objectives, the journal of trials."""
