# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.train`: one run of one configuration, continued where it stopped; no Ray."""

from dmx.cli.options import run
from dmx.cli.train import main

if __name__ == "__main__":
    run("dmx.train", main, needs="dmx.study.single_run")
