# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.curriculum`: train a chain of stages, each from the best checkpoint before it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dmx import cli, place_flags, place_options
from dmx.curriculum_file import load_curriculum
from dmx.curriculum_session import run_session
from dmx.curriculum_show import Options, dry_run, show_status
from dmx.errors import ConfigError
from dmx.overrides import flatten, parse_assignments
from dmx.resources import find_yaml, shipped_names
from dmx.stages import CurriculumConfig

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
    )
    p.add_argument(
        "curriculum", help=f"a YAML path, or one of: {', '.join(shipped_names('curricula'))}"
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
    p.add_argument("--resume", action="store_true", help="continue; this is the default")
    p.add_argument("--fresh", action="store_true", help="move an existing run aside, start anew")
    p.add_argument("--dry-run", action="store_true", help="check and measure only")
    p.add_argument("--status", action="store_true", help="show where the run stands")
    p.add_argument("--cpus-per-trial", type=float, help="CPU cores of a run")
    p.add_argument("--gpus-per-trial", type=float, metavar="N", help="GPUs that share a run's work")
    p.add_argument(
        "--workers-per-trial",
        type=int,
        metavar="N",
        help="processes that share a run's work (default: one for each of its GPUs)",
    )
    p.add_argument(
        "--address", help="a running Ray cluster (auto or HOST:PORT); default: this machine"
    )
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command; see dmx.errors for the exit codes."""
    args = parser().parse_args(argv)
    path = find_yaml(args.curriculum, "curricula")
    curriculum = load_curriculum(
        path, attention=args.attention, overrides=flatten(parse_assignments(args.set))
    )
    options = _options(args, curriculum, argv)
    if args.status:
        return show_status(curriculum, options)
    if args.dry_run:
        return dry_run(curriculum, options)
    return run_session(curriculum, options)


def _options(
    args: argparse.Namespace, curriculum: CurriculumConfig, argv: Sequence[str]
) -> Options:
    folder, places = place_options.find_places(
        storage=args.storage,
        name=args.name,
        default=curriculum.name,
        scratch=args.scratch,
        data_root=args.data_root,
        node_data=args.node_data,
    )
    for given, option in ((args.until, "--until"), (args.from_stage, "--from-stage")):
        if given is not None:
            try:
                curriculum.stage(given)
            except ConfigError as error:
                raise ConfigError(f"{option}: {error}") from None
    for value, option in ((args.cpus_per_trial, "--cpus"), (args.gpus_per_trial, "--gpus")):
        if value is not None and (value < 0 or (option == "--cpus" and value == 0)):
            raise ConfigError(f"{option}-per-trial is {value:g}; it must be positive.")
    if args.fresh and (args.resume or args.from_stage):
        raise ConfigError("--fresh starts anew; it does not go with --resume or --from-stage.")
    if args.fresh and places.run_url is not None:
        raise ConfigError("--fresh moves a local run aside; with a URL give another --name.")
    root = place_options.stage_data_root(
        places, args.data_root, {s.task for s in curriculum.stages}
    )
    return Options(
        folder=folder,
        data_root=root,
        until=args.until,
        from_stage=args.from_stage,
        fresh=args.fresh,
        cpus=args.cpus_per_trial,
        gpus=args.gpus_per_trial,
        workers=args.workers_per_trial,
        address=args.address,
        again=continue_command(argv),
        places=places,
    )


def continue_command(argv: Sequence[str]) -> str:
    """The command that continues: the same, without what would start something over."""
    words: list[str] = []
    skip = False
    for word in argv:
        if skip or word == "--fresh" or word.startswith("--from-stage="):
            skip = False
        elif word == "--from-stage":
            skip = True
        else:
            words.append(word)
    return cli.command_line(PROG, words)


if __name__ == "__main__":
    cli.run(PROG, main)
