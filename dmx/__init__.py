"""dmx: distributed hyperparameter search and curricula for the Long Range Arena."""

__version__ = "0.1.0"
