# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.leaderboard`: attentions x tasks over all runs, in several formats."""

from dmx.cli.leaderboard import main
from dmx.cli.options import run

if __name__ == "__main__":
    run("dmx.leaderboard", main, needs="dmx.reporting.leaderboard")
