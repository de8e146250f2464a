"""The options that say where nodes keep files; light, so that the TAB key is quick."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """--scratch and --node-data."""
    parser.add_argument(
        "--scratch",
        metavar="FOLDER",
        help="with a URL as --storage: each node's own folder for it (default: ~/.cache/dmx)",
    )
    parser.add_argument(
        "--node-data",
        metavar="FOLDER",
        help="each node copies the data it uses from --data-root (a path or URL) there, once",
    )
