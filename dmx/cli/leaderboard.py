"""`dmx.leaderboard`: attentions x tasks over all runs, in several formats."""

from __future__ import annotations

from collections.abc import Sequence

from dmx.cli.options import Parser
from dmx.errors import EXIT_OK, ConfigError
from dmx.registry import choices_message
from dmx.schema import local_path

LEADERBOARD_FORMATS = ("md", "latex", "csv", "html", "json")

EXAMPLES = """\
  python -m dmx.leaderboard
      every run in runs/, as markdown
  python -m dmx.leaderboard runs /shared/runs/butterfly-text --format latex --out table.tex
      a run root and one run more, as a LaTeX table (needs \\usepackage{booktabs})
  python -m dmx.leaderboard --format csv
      one row per configuration and task, with every number
"""


def parser() -> Parser:
    """Of `python -m dmx.leaderboard`."""
    p = Parser(
        prog="dmx.leaderboard",
        description="Compare attentions over tasks: test accuracy over seeds, and what it cost.",
        examples=EXAMPLES,
    )
    p.add_argument(
        "runs", nargs="*", metavar="RUN", help="runs, or folders of runs (default: runs)"
    )
    p.add_argument("--format", default="md", help="md, latex, csv, html or json (default: md)")
    p.add_argument("--out", metavar="FILE", help="where to (default: -, the terminal)")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    from dmx.reporting.leaderboard import write_leaderboard

    args = parser().parse_args(argv)
    if args.format not in LEADERBOARD_FORMATS:
        raise ConfigError(f"--format {choices_message(args.format, LEADERBOARD_FORMATS)}.")
    folders = [local_path("RUN", path) for path in args.runs or ["runs"]]
    write_leaderboard(folders, args.format, args.out)
    return EXIT_OK
