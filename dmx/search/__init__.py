"""What a study searches and remembers: spaces, samplers, schedulers, the journal of trials."""
