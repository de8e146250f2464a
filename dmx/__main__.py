"""`python -m dmx`: which commands there are."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dmx.cli.completion import PARSERS, parser_of
from dmx.cli.options import run
from dmx.errors import EXIT_OK, ConfigError
from dmx.registry import page


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    if argv and list(argv) not in (["-h"], ["--help"]):
        word = argv[0]
        near = f"dmx.{word}"
        remedy = f"python -m {near} --help" if near in PARSERS else "python -m dmx"
        raise ConfigError(f"{word!r} is no option; each command is a module of its own: {remedy}.")
    width = max(map(len, PARSERS))
    lines = [f"python -m {name:{width}}  {parser_of(name).description}" for name in PARSERS]
    lines.append(f"Each has --help with examples. First steps: {page('tutorial')}")
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK


if __name__ == "__main__":
    run("dmx", main)
