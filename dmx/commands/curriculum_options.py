"""The options of `python -m dmx.curriculum`."""

from __future__ import annotations

from dmx import cli
from dmx.commands import compute_flags, place_flags
from dmx.commands.setting_hints import as_setting
from dmx.registry import shipped_names

PROG = "dmx.curriculum"

EXAMPLES = """\
  python -m dmx.curriculum smoke --name try
      a tiny curriculum on generated images, in a minute or two
  python -m dmx.curriculum pathx --dry-run
      check the whole chain and estimate time and memory; nothing is started
  python -m dmx.curriculum pathx --data-root /data/lra
      run it; the same command continues after Ctrl-C, a crash or a lost node
  python -m dmx.curriculum pathx --status
      where it stands, from another terminal
  python -m dmx.curriculum pathx --attention nystrom --name pathx-nystrom
      the same stages with another attention, its size in place of the file's
  python -m dmx.curriculum pathx --from-stage pathX-cl14_alpha0.75
      train that stage and those after it again; their old checkpoints stay on disk
"""


def parser() -> cli.Parser:
    """The command's options."""
    p = cli.Parser(
        prog=PROG,
        description="Train a curriculum: stages, each from the best checkpoint of another.",
        examples=EXAMPLES,
        hint=as_setting("--set {}=VALUE"),
    )
    p.add_argument(
        "curriculum",
        nargs="?",
        help=f"a YAML path, or one of: {', '.join(shipped_names('curricula'))}",
    )
    p.add_argument("--name", help="the run's folder below the storage (default: the curriculum's)")
    p.add_argument(
        "--storage",
        "--run-root",
        default="runs",
        help="where runs are kept: a path or a URL (default: runs)",
    )
    p.add_argument("--data-root", help="prepared data (default: $DMX_DATA_ROOT, else ./data)")
    p.add_argument("--attention", help="run all stages with this attention: nystrom, performer-64")
    p.add_argument(
        "--set", action="append", default=[], metavar="A.B=V", help="a setting for every stage"
    )
    place_flags.add_options(p)
    p.add_argument("--until", metavar="STAGE", help="stop after this stage")
    p.add_argument(
        "--from-stage", metavar="STAGE", help="train this stage and those that follow from it again"
    )
    cli.add_resume(p, "curriculum")
    p.add_argument("--fresh", action="store_true", help="move an existing run aside, start anew")
    p.add_argument("--dry-run", action="store_true", help="check and measure only")
    p.add_argument("--status", action="store_true", help="show where the run stands")
    p.add_argument("--cpus-per-trial", type=float, help="CPU cores of a run")
    compute_flags.add_options(p, "a run")
    return p
