"""What `dmx.tune` searches by: objectives, scheduler, sampler and warm start, checked together."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

from dmx.data.store import Store
from dmx.errors import ConfigError
from dmx.registry import code_version
from dmx.runs.objectives import parse_objectives
from dmx.search import warm_start
from dmx.search.rungs import LEAST_FACTOR
from dmx.search.samplers import check_sampler, independent
from dmx.search.schedulers import check_population
from dmx.search.space import SearchSpace
from dmx.search.study_settings import read_settings
from dmx.study import folder as study_folder
from dmx.study import results as study_results
from dmx.study.study import StudyConfig

logger = logging.getLogger("dmx.tune")


def choose(args: argparse.Namespace, space: SearchSpace) -> tuple[str, ...]:
    """What is optimised; scheduler and sampler must suit it, and the scheduler is chosen by it."""
    objectives = parse_objectives(args.objective)
    if args.scheduler is None:
        args.scheduler = "asha" if len(objectives) == 1 else "none"
    if len(objectives) > 1 and args.scheduler != "none":
        why = (
            "copies weights between trials by accuracy alone, and its trials share one size: "
            "there is no front to find for"
            if args.scheduler == "pbt"
            else "stops trials by accuracy alone and would cut cheap ones off the front of"
        )
        raise ConfigError(
            f"--scheduler {args.scheduler} {why} --objective {args.objective}; leave --scheduler "
            "out, or give --objective accuracy."
        )
    _check_rungs(args)
    if args.scheduler == "pbt" and args.num_trials is not None:
        check_population(space, args.num_trials)
    check_sampler(args.sampler, space, objectives)
    return objectives


def _check_rungs(args: argparse.Namespace) -> None:
    """Refuse rungs that make no sense, or that nobody would look at."""
    grace, factor = args.grace_steps, args.reduction_factor
    if grace is not None and grace < 1:
        raise ConfigError(f"--grace-steps is {grace}; it must be at least 1.")
    if factor is not None and not LEAST_FACTOR <= factor < math.inf:
        raise ConfigError(
            f"--reduction-factor is {factor:.10g}; it must be at least {LEAST_FACTOR} and finite."
        )
    for option, value, of in (
        ("--grace-steps", grace, ("asha", "hyperband", "pbt")),
        ("--reduction-factor", factor, ("asha", "hyperband")),
    ):
        if value is not None and args.scheduler not in of:
            raise ConfigError(
                f"{option} means nothing to --scheduler {args.scheduler}; leave it out, or choose "
                f"{' or '.join(of)}."
            )


def rungs(args: argparse.Namespace) -> dict[str, float]:
    """What was said of the rungs, by StudyConfig's names."""
    said = {"grace_steps": args.grace_steps, "reduction_factor": args.reduction_factor}
    return {name: value for name, value in said.items() if value is not None}


def check_study(
    args: argparse.Namespace, config: StudyConfig, store: Store, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """(the study's settings, the files it keeps of earlier ones); nothing is written.

    Raises:
        ConfigError, StageError: the search is impossible, or an earlier study cannot be used.
    """
    if config.scheduler == "pbt":
        check_population(config.space, config.num_trials)
    here = warm_start.TargetStudy(
        task=config.task,
        space=config.space,
        overrides=config.overrides,
        max_steps=config.max_steps,
        data_checksum=store.manifest.checksum,
        objectives=config.objectives,
        sampler=config.sampler,
    )
    known = read_settings(folder).get("warm_start") if args.resume else None
    identity, files, notes = warm_start.prepare(
        args.warm_start, Path(args.storage), here, folder, known=known, resume=args.resume
    )
    for note in notes:
        logger.info("%s", note)
    if alone := independent(config.sampler, config.space):
        names = ", ".join(alone)
        logger.info("sampler %s draws at random, each by itself: %s", args.sampler, names)
    settings = study_results.settings(config, store, identity)
    if args.resume:
        study_folder.check_same(folder, settings)
        begun, now = args.record.get("environment", {}).get("code"), code_version()
        if begun not in (None, now):
            logger.warning("the study was trained by code %s until now; this is %s", begun, now)
    return settings, files
