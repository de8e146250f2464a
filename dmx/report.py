# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.report`: a run as one page to read, or as markdown, JSON or CSV."""

from __future__ import annotations

from collections.abc import Sequence

from dmx import cli
from dmx.commands import reading_options
from dmx.errors import EXIT_OK, ConfigError
from dmx.registry import choices_message
from dmx.reporting.page import FORMATS, write_report
from dmx.schema import local_path


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = reading_options.report().parse_args(argv)
    if args.format not in FORMATS:
        raise ConfigError(f"--format {choices_message(args.format, list(FORMATS))}.")
    write_report(local_path("RUN", args.run), args.format, args.out)
    return EXIT_OK


if __name__ == "__main__":
    cli.run("dmx.report", main)
