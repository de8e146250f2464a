"""`dmx.leaderboard`: attentions x tasks over all runs, in several formats."""

from __future__ import annotations

from collections.abc import Sequence

from dmx.cli.options import Parser
from dmx.errors import EXIT_OK
from dmx.schema import local_path

LEADERBOARD_FORMATS = ("md", "latex", "html", "csv", "json")

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
    p.add_argument("--format", choices=LEADERBOARD_FORMATS, default="md", help="default: md")
    p.add_argument("--out", metavar="FILE", help="where to (default: -, the terminal)")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)

    from dmx.reporting.leaderboard import write_leaderboard

    folders = [local_path("RUN", path) for path in args.runs or ["runs"]]
    write_leaderboard(folders, args.format, args.out)
    return EXIT_OK
