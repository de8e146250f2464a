# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.attention_maps`: draw where a checkpoint's layers look, for a few examples."""

from dmx.cli.attention_maps import main
from dmx.cli.options import run

if __name__ == "__main__":
    run("dmx.attention_maps", main, needs="dmx.training.attention_maps")
