# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.report`: a run as one page to read, or as markdown, JSON or CSV."""

from dmx.cli.options import run
from dmx.cli.report import main

if __name__ == "__main__":
    run("dmx.report", main, needs="dmx.reporting.report")
