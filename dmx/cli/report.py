"""`dmx.report`: a run as one page to read, or as markdown, JSON or CSV."""

from __future__ import annotations

from collections.abc import Sequence

from dmx.cli.options import Parser
from dmx.errors import EXIT_OK
from dmx.schema import local_path

REPORT_FORMATS = ("html", "md", "json", "csv")

EXAMPLES = """\
  python -m dmx.report runs/butterfly-text
      writes runs/butterfly-text/report.html, one page that needs no network and no scripts
  python -m dmx.report runs/butterfly-text --format md
      markdown on the terminal; json and csv likewise
  python -m dmx.report runs/pathx --out /tmp/pathx.html
      a curriculum: lineage and gates as well
  python -m dmx.report runs
      a page in the folder of each run below it
"""


def parser() -> Parser:
    """Of `python -m dmx.report`."""
    p = Parser(
        prog="dmx.report",
        description="Show a study, a single run or a curriculum, finished or still running.",
        examples=EXAMPLES,
    )
    p.add_argument("run", metavar="RUN", help="the run's folder, such as runs/butterfly-text")
    p.add_argument("--format", choices=REPORT_FORMATS, default="html", help="default: html")
    p.add_argument(
        "--out",
        metavar="FILE",
        help="where to (default: RUN/report.html for html, else -, the terminal)",
    )
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)

    from dmx.reporting.report import write_report

    write_report(local_path("RUN", args.run), args.format, args.out)
    return EXIT_OK
