"""dmx: distributed hyperparameter search and curricula for the Long Range Arena."""

import os

__version__ = "0.1.0"

if "_ARGCOMPLETE" in os.environ:  # a shell's TAB key: answered before torch and Ray are imported
    import importlib

    importlib.import_module("dmx.commands.completion").answer()
