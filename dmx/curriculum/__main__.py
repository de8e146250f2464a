# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.curriculum`: train a chain of stages, each from the best checkpoint before it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmx import cli
from dmx.commands import place_options, resuming
from dmx.commands.curriculum_options import PROG, parser
from dmx.curriculum.config import CurriculumConfig, load_curriculum
from dmx.curriculum.controller import ClusterLost
from dmx.curriculum.dryrun import dry_run
from dmx.curriculum.session import Options, run_curriculum
from dmx.curriculum.views import log_failures, show_end, show_status
from dmx.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_PARTIAL, ConfigError
from dmx.schema import flatten, is_url, parse_assignments

logger = logging.getLogger("dmx.curriculum")


def main(argv: Sequence[str]) -> int:
    """Run the command; see dmx.errors for the exit codes."""
    p = parser()
    args = resuming.parse(p, _given(p, argv), "curriculum", default_name=_default_name)
    curriculum = _curriculum(vars(args))
    options = _options(args, curriculum)
    if args.status:
        show_status(curriculum, options.folder)
        return EXIT_OK
    if args.dry_run:
        dry_run(curriculum, options)
        return EXIT_OK
    try:
        outcome = run_curriculum(curriculum, options)
    except (KeyboardInterrupt, ClusterLost) as error:
        logger.warning(
            "%s; everything up to the last evaluation is kept. Continue with:",
            str(error) or "interrupted",
        )
        sys.stderr.write(continue_command(argv) + "\n")
        return EXIT_PARTIAL if isinstance(error, ClusterLost) else EXIT_INTERRUPTED
    show_end(curriculum, options.folder, outcome.history)
    if outcome.passed:
        return EXIT_OK
    log_failures(curriculum, outcome.history, outcome.broken)
    return EXIT_FAILED


def _given(p: cli.Parser, argv: Sequence[str]) -> dict[str, Any]:
    """The arguments; in `--resume NAME` without another one, NAME is a run or a curriculum."""
    given = p.given(argv)
    word = given.get("resume")
    if isinstance(word, str) and "curriculum" not in given and not is_url(word):
        below = Path(given.get("storage", p.get_default("storage"))) / word
        if "name" in given or not (Path(word).is_dir() or below.is_dir()):
            given |= {"curriculum": word, "resume": True}
    return given


def _default_name(given: Mapping[str, Any]) -> str | None:
    return _curriculum(given).name if given.get("curriculum") else None


def _curriculum(given: Mapping[str, Any]) -> CurriculumConfig:
    if given.get("curriculum") is None:
        raise ConfigError("give a curriculum, a name or a YAML path, or --resume RUN.")
    return load_curriculum(
        given["curriculum"],
        attention=given.get("attention"),
        overrides=flatten(parse_assignments(given.get("set", []))),
    )


def _options(args: argparse.Namespace, curriculum: CurriculumConfig) -> Options:
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
        given=resuming.options_of(args, None if is_url(args.data_root or "") else root),
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
