# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.report`: a run as one page to read, or as markdown, JSON or CSV."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dmx import cli
from dmx.commands import reading_options
from dmx.commands.reading_options import REPORT_FILE
from dmx.errors import EXIT_OK, ConfigError, DataError, DmxError
from dmx.registry import choices_message
from dmx.reporting import html, markdown, plain
from dmx.reporting.collect import collect, collect_all, kind_of, runs_below
from dmx.reporting.records import RunReport
from dmx.schema import local_path
from dmx.storage.files import write_atomic

logger = logging.getLogger("dmx.report")

FORMATS: dict[str, Callable[[RunReport], str]] = {
    "html": html.render,
    "md": markdown.render,
    "json": plain.to_json,
    "csv": plain.to_csv,
}


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = reading_options.report().parse_args(argv)
    if args.format not in FORMATS:
        raise ConfigError(f"--format {choices_message(args.format, list(FORMATS))}.")
    folder = local_path("RUN", args.run)
    no_run = kind_of(folder) is None
    if no_run and args.format == "html" and args.out is None and (several := runs_below(folder)):
        return _pages(several)
    run = collect(folder)
    text = printable(FORMATS[args.format](run))
    target = args.out
    if target is None and args.format == "html":
        target = str(run.folder / REPORT_FILE)
    if target is None or target == "-":
        sys.stdout.write(text)
        return EXIT_OK
    write_whole(Path(target), text)
    sys.stdout.write(f"{target}\n")
    return EXIT_OK


def _pages(folders: Sequence[Path]) -> int:
    """A page in each run's own folder; those that cannot be made are named at the end.

    Raises:
        DmxError: none could be made.
    """
    errors: list[DmxError] = []
    for folder in folders:
        runs, unread = collect_all([folder])
        errors += unread
        for run in runs:
            try:
                write_whole(folder / REPORT_FILE, printable(html.render(run)))
                sys.stdout.write(f"{folder / REPORT_FILE}\n")
            except DmxError as error:
                errors.append(error)
            except Exception as error:  # of what a foreign file holds; it must not hide the others
                errors.append(DataError(f"{folder} cannot be shown ({type(error).__name__})."))
    if len(errors) == len(folders):
        raise errors[0]
    sys.stdout.flush()
    for left_out in errors:
        logger.warning("left out: %s", left_out)
    return EXIT_OK


def write_page(folder: Path) -> Path | None:
    """Write a run's page into its folder, at its end; None where that fails, which costs no run."""
    try:
        path = folder / REPORT_FILE
        write_whole(path, printable(html.render(collect(folder))))
    except (DmxError, OSError) as error:
        logger.warning("no report was written: %s", error)
        return None
    return path


def printable(text: str) -> str:
    """The text with a `?` for what no encoding can hold (names of files may be any bytes)."""
    return text.encode("utf-8", "replace").decode("utf-8")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder; name a file")
        write_atomic(path, text)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}.") from None


if __name__ == "__main__":
    cli.run("dmx.report", main)
