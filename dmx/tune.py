# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.tune`: search an attention's hyperparameters on a task."""

from dmx.cli.options import run
from dmx.cli.tune import main

if __name__ == "__main__":
    run("dmx.tune", main, needs="dmx.study.run")
