# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.leaderboard`: attentions x tasks over all runs, in several formats."""

from __future__ import annotations

from collections.abc import Sequence

from dmx import cli
from dmx.commands import reading_options
from dmx.errors import EXIT_OK, ConfigError
from dmx.registry import choices_message
from dmx.reporting.leaderboard import FORMATS, write_leaderboard
from dmx.schema import local_path


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = reading_options.leaderboard().parse_args(argv)
    if args.format not in FORMATS:
        raise ConfigError(f"--format {choices_message(args.format, list(FORMATS))}.")
    folders = [local_path("RUN", path) for path in args.runs or ["runs"]]
    write_leaderboard(folders, args.format, args.out)
    return EXIT_OK


if __name__ == "__main__":
    cli.run("dmx.leaderboard", main)
