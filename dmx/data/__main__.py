# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.data`: prepare, list and show data sets."""

from dmx.cli.data import main
from dmx.cli.options import run

if __name__ == "__main__":
    run("python -m dmx.data", main, needs="dmx.data.show")
