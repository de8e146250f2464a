# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.curriculum`: train a chain of stages, each from the best checkpoint before it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dmx import cli
from dmx.commands import place_options
from dmx.commands.curriculum_options import PROG, parser
from dmx.curriculum.file import load_curriculum
from dmx.curriculum.session import run_session
from dmx.curriculum.show import Options, dry_run, show_status
from dmx.curriculum.stages import CurriculumConfig
from dmx.errors import ConfigError
from dmx.overrides import flatten, parse_assignments
from dmx.resources import find_yaml


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
