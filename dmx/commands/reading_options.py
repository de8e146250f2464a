"""The options of the commands that read runs: report, leaderboard, attention_maps."""

from __future__ import annotations

from dmx import cli

REPORT_FILE = "report.html"
REPORT_FORMATS = ("html", "md", "json", "csv")
LEADERBOARD_FORMATS = ("md", "latex", "csv", "html", "json")
MAPPED_EXAMPLES = 2
"""Examples whose attention is drawn when none are named."""

_REPORT = """\
  python -m dmx.report runs/butterfly-text
      writes runs/butterfly-text/report.html, one page that needs no network and no scripts
  python -m dmx.report runs/butterfly-text --format md
      markdown on the terminal; json and csv likewise
  python -m dmx.report runs/pathx --out /tmp/pathx.html
      a curriculum: lineage and gates as well
  python -m dmx.report runs
      a page in the folder of each run below it
"""

_LEADERBOARD = """\
  python -m dmx.leaderboard
      every run in runs/, as markdown
  python -m dmx.leaderboard runs /shared/runs/butterfly-text --format latex --out table.tex
      a run root and one run more, as a LaTeX table (needs \\usepackage{booktabs})
  python -m dmx.leaderboard --format csv
      one row per configuration and task, with every number
"""
_ATTENTION_MAPS = """\
  python -m dmx.attention_maps runs/butterfly-text/best
      the maps of every layer for two dev examples, in runs/butterfly-text/attention_maps
  python -m dmx.attention_maps runs/butterfly-image/best --examples 3 17 --layers 0 --groups 8
      of the first layer, for dev examples 3 and 17, eight groups of each
  python -m dmx.attention_maps runs/softmax-listops/best --max-size 2048
      large maps, of a whole sequence
"""


def report() -> cli.Parser:
    """Of `python -m dmx.report`."""
    p = cli.Parser(
        prog="dmx.report",
        description="Show a study, a single run or a curriculum, finished or still running.",
        examples=_REPORT,
    )
    p.add_argument("run", metavar="RUN", help="the run's folder, such as runs/butterfly-text")
    p.add_argument("--format", default="html", help="html, md, json or csv (default: html)")
    p.add_argument(
        "--out",
        metavar="FILE",
        help=f"where to (default: RUN/{REPORT_FILE} for html, else -, the terminal)",
    )
    return p


def leaderboard() -> cli.Parser:
    """Of `python -m dmx.leaderboard`."""
    p = cli.Parser(
        prog="dmx.leaderboard",
        description="Compare attentions over tasks: test accuracy over seeds, and what it cost.",
        examples=_LEADERBOARD,
    )
    p.add_argument(
        "runs", nargs="*", metavar="RUN", help="runs, or folders of runs (default: runs)"
    )
    p.add_argument("--format", default="md", help="md, latex, csv, html or json (default: md)")
    p.add_argument("--out", metavar="FILE", help="where to (default: -, the terminal)")
    return p


def attention_maps() -> cli.Parser:
    """Of `python -m dmx.attention_maps`."""
    p = cli.Parser(
        prog="dmx.attention_maps",
        description="Draw attention maps of a checkpoint into PNG files and TensorBoard.",
        examples=_ATTENTION_MAPS,
    )
    p.add_argument("checkpoint", help="a checkpoint folder: runs/NAME/best")
    p.add_argument(
        "--examples",
        type=int,
        nargs="+",
        metavar="N",
        help=f"examples of the split, by number (default: {MAPPED_EXAMPLES} fixed ones)",
    )
    p.add_argument("--split", choices=("train", "dev", "test"), default="dev", help="default: dev")
    p.add_argument("--layers", type=int, nargs="+", metavar="N", help="from 0 (default: all)")
    p.add_argument(
        "--groups", type=int, default=4, help="groups drawn, those with most tokens (default: 4)"
    )
    p.add_argument(
        "--max-size",
        type=int,
        metavar="N",
        help="refuse maps of more positions than this (default: 1024)",
    )
    p.add_argument("--data-root", help="prepared data (default: where the run found them)")
    p.add_argument("--out", help="folder of the pictures (default: attention_maps/ beside it)")
    return p
