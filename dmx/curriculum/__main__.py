# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.curriculum`: train a chain of stages, each from the best checkpoint before it."""

from dmx.cli.curriculum import PROG, main
from dmx.cli.options import run

if __name__ == "__main__":
    run(PROG, main, needs="dmx.curriculum.run")
