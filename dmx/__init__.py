"""dmx: distributed hyperparameter search and curricula for the Long Range Arena."""

import os
import sys

__version__ = "0.1.0"

if "_ARGCOMPLETE" in os.environ:  # a shell's TAB key: answered before torch and Ray are imported
    import importlib

    importlib.import_module("dmx.cli.completion").answer()

if sys.argv[:1] == ["-m"]:  # `python -m dmx.tune` and its siblings, whose imports take seconds
    import importlib

    importlib.import_module("dmx.process").begin()
