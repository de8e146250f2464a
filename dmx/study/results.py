"""The end of a study: test, retraining, study.json, trials.csv, and what the terminal shows."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx.cluster import gang
from dmx.data.store import Store
from dmx.errors import RunFailedError
from dmx.registry import environment
from dmx.runs import layout
from dmx.runs.layout import (
    BEST_DEV_ACCURACY,
    DEV_ACCURACY,
    FAILURE,
    STEPS,
    TEST_ACCURACY,
    TEST_LOSS,
)
from dmx.runs.study import Study
from dmx.runs.trial import OBJECTIVES, describe_failures
from dmx.schema import to_dict
from dmx.storage.journal import Journal
from dmx.storage.remote import StorageLayout
from dmx.study import folder as study_folder
from dmx.study.study import StudyConfig
from dmx.study.views import TensorBoardView, trials_table
from dmx.terminal import console, verbatim
from dmx.training.checkpoint import open_checkpoint
from dmx.training.evaluation import EvaluationJob
from dmx.training.job import Job, Workers
from dmx.training.passes import Evaluation

logger = logging.getLogger("dmx.study")


def finish(
    config: StudyConfig,
    store: Store,
    study: Study,
    tensorboard: TensorBoardView,
    *,
    slots: int,
    final_seeds: int,
) -> dict[str, Any]:
    """Test the best checkpoint, retrain it with `final_seeds` seeds, and write the files.

    Returns:
        The content of study.json but for `seconds`. An incomplete study is not tested: its best
        trial may still change.
    """
    folder, best = study.folder, study.best_trial
    summary = summarise(config, store, study)
    if best is None or best.checkpoint is None:
        return summary
    best_folder = folder / layout.BEST_DIR
    config.places.push(best_folder)
    if study.complete:
        test = evaluate_test(best_folder, store, config.workers, config.places)
        summary["best"][TEST_ACCURACY] = test.accuracy
        summary["best"][TEST_LOSS] = test.loss
        tensorboard.test(best.number, test.accuracy, best.best_step)
        if final_seeds:
            summary["final_seeds"] = retrain(
                best_folder,
                store,
                folder,
                final_seeds,
                workers=config.workers,
                slots=slots,
                places=config.places,
            )
        note_final(folder, best.number, best.best_step, test, summary.get("final_seeds"))
    return summary


def note_final(
    folder: Path,
    trial: int,
    step: int,
    test: Evaluation,
    retrained: Mapping[str, Any] | None,
) -> None:
    """Record the best trial's test in the journal, where that is not what it says already."""
    names = ("seeds", "dev_accuracies", "test_accuracies")
    found = {
        "event": "final",
        "trial": trial,
        "step": step,
        TEST_ACCURACY: test.accuracy,
        TEST_LOSS: test.loss if math.isfinite(test.loss) else None,
        **{name: list((retrained or {}).get(name, ())) for name in names},
    }
    with Journal(folder / layout.JOURNAL_FILE) as journal:
        ends = [e for e in journal.events if e["event"] in ("final", "outcome")]
        last = ends[-1] if ends else {}
        if any(last.get(key) != value for key, value in found.items()):
            journal.append(**found, time=time.time())


def summarise(config: StudyConfig, store: Store, study: Study) -> dict[str, Any]:
    """Write trials.csv and best/; the content of study.json, but for tests and `seconds`."""
    several = len(config.objectives) > 1
    label = store.manifest.label
    study_folder.write_trials(study)
    study_folder.copy_best(study.folder, study.best_trial)
    summary: dict[str, Any] = {
        "name": config.name,
        "data": label,
        "is_sample": store.manifest.is_sample,
        "data_checksum": store.manifest.checksum,
        "task": config.task,
        "attention": config.space.attention,
        "complete": study.complete,
        "num_trials": config.num_trials,
        "max_steps": config.max_steps,
        "grace_steps": config.grace_steps,
        "reduction_factor": config.reduction_factor,
        "trials": {
            s: sum(t.status == s for t in study.trials) for s in ("COMPLETE", "PRUNED", "FAILED")
        },
        **(front_summary(config.objectives, study) if several else {}),
        **({"population": population(study)} if config.scheduler == "pbt" else {}),
        "best": None,
        "environment": {**environment(), "argv": sys.argv},
    }
    best = study.best_trial
    if best is not None and best.checkpoint is not None:
        summary["best"] = {
            "trial": best.number,
            "params": best.params_at(best.best_step),
            DEV_ACCURACY: best.best,
            "step": best.best_step,
            "checkpoint": layout.BEST_DIR,
        }
    return summary


def seconds_so_far(folder: Path) -> float:
    """How long the sessions until now have worked on the study; 0 for a new one."""
    seconds = Study.read(folder).seconds
    return seconds if math.isfinite(seconds) else 0.0


def front_of(study: Study) -> tuple[int, ...]:
    """The trials on the Pareto front of a study with several objectives; () where there is one."""
    return tuple(t.number for t in study.best_trials) if study.several else ()


def population(study: Study) -> list[dict[str, Any]]:
    """`population` of study.json: what each trial began with, and what it changed to and when."""
    return [
        {
            "trial": t.number,
            "params": dict(t.params),
            "changes": [{"step": s, "params": dict(p)} for s, p in sorted(t.changes.items())],
        }
        for t in study.trials
    ]


def front_summary(objectives: tuple[str, ...], study: Study) -> dict[str, list[dict[str, Any]]]:
    """`objectives` and `front` of study.json: what was optimised, and the trials on the front."""
    described = [OBJECTIVES[name] for name in objectives]
    return {
        "objectives": [
            {"name": o.name, "direction": o.direction, "label": o.label} for o in described
        ],
        "front": [
            {"trial": t.number, "values": t.values, "params": dict(t.params)}
            for t in study.best_trials
        ],
    }


def show(summary: Mapping[str, Any], study: Study, store: Store) -> None:
    """Print the table of trials, the best configuration and its test accuracy."""
    out = console()
    best = summary["best"]
    title = (
        f"{summary['name']}: {summary['attention']} on {summary['task']} (data: {summary['data']})"
    )
    names = tuple(o["name"] for o in summary.get("objectives", ()))
    number = best["trial"] if best else None
    out.print(trials_table(study.trials, title, number, names, front_of(study)))
    if names:
        on = ", ".join(str(n) for n in front_of(study)) or "none"
        out.print(f"Pareto front of {', '.join(names)} (marked +): trials {on}", highlight=False)
    if best is None:
        failed = describe_failures(study.trials)
        out.print(failed or "No trial reported a dev accuracy.", highlight=False, markup=False)
        return
    labels = store.split("test").labels
    majority = max((labels == c).mean() for c in set(labels.tolist()))
    out.print(f"best: trial {best['trial']}, dev accuracy {best[DEV_ACCURACY]:.4f}")
    for key, value in best["params"].items():
        out.print(f"  {key}: {value}", highlight=False)
    if TEST_ACCURACY in best:
        out.print(
            f"test accuracy {best[TEST_ACCURACY]:.4f} (majority class {majority:.4f}; "
            f"data: {summary['data']})"
        )
    if "final_seeds" in summary:
        out.print(describe(summary["final_seeds"]))
    files = f"({layout.STUDY_FILE}, {layout.TRIALS_FILE}, {layout.BEST_DIR}/)"
    verbatim(f"files: {study.folder}  {files}")  # to be copied in one piece
    verbatim(f"curves: tensorboard --logdir {study.folder.parent}")


def evaluate_test(best: Path, store: Store, workers: Workers, places: StorageLayout) -> Evaluation:
    """Loss and accuracy of a checkpoint over the whole test split, by one worker in the cluster."""
    data = str(store.folder)
    wanted = EvaluationJob(checkpoint=str(best), data_folder=data, places=places)
    return gang.evaluate(wanted, workers)


def retrain(
    best: Path,
    store: Store,
    folder: Path,
    num_seeds: int,
    *,
    workers: Workers,
    slots: int,
    places: StorageLayout,
) -> dict[str, Any]:
    """Train the best configuration again from `num_seeds` other seeds; continues after a crash.

    Returns:
        {"seeds", "dev_accuracies", "test_accuracies", "mean", "standard_deviation"}, the last two
        over the test accuracies (sample standard deviation, None for one seed).

    Raises:
        RunFailedError: a run failed.
    """
    config = open_checkpoint(best).config
    seeds = [config.train.seed + 1 + i for i in range(num_seeds)]
    waiting = []
    for seed in seeds:
        train = dataclasses.replace(config.train, seed=seed)
        data = dataclasses.replace(config.data, seed=config.data.seed + seed - config.train.seed)
        plain = to_dict(dataclasses.replace(config, train=train, data=data))
        waiting.append(
            Job(
                run_config=plain,
                data_folder=str(store.folder),
                folder=str(folder / "final" / f"seed-{seed}"),
                places=places,
                workers=workers,
                within=str(folder),
            )
        )
    logger.info(
        "training the best configuration with %d other seeds, %d at once",
        num_seeds,
        min(slots, num_seeds),
    )
    running: list[gang.Running] = []
    dev: dict[str, float] = {}
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                running.append(gang.start(waiting.pop(0)))
            for run, report in gang.wait_any(running, timeout_seconds=60):
                if report.get(FAILURE):
                    raise RunFailedError(f"{run.job.folder}: {report[FAILURE]}.")
                dev[run.job.folder] = report[BEST_DEV_ACCURACY]
                logger.info(
                    "%s: step %s of %s, dev accuracy %.4f (best %.4f)",
                    Path(run.job.folder).name,
                    f"{report[STEPS]:,}",
                    f"{config.train.num_steps:,}",
                    report[DEV_ACCURACY],
                    report[BEST_DEV_ACCURACY],
                )
                if report.get("done"):
                    running.remove(run)
    finally:
        gang.stop(*running)
    tests = [
        evaluate_test(
            folder / "final" / f"seed-{s}" / layout.BEST_DIR, store, workers, places
        ).accuracy
        for s in seeds
    ]
    return {
        "seeds": seeds,
        "dev_accuracies": [dev[str(folder / "final" / f"seed-{s}")] for s in seeds],
        "test_accuracies": tests,
        "mean": statistics.fmean(tests),
        "standard_deviation": statistics.stdev(tests) if len(tests) > 1 else None,
    }


def describe(finals: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    spread = finals["standard_deviation"]
    plus = "" if spread is None else f" ± {spread:.4f}"
    return f"test accuracy over {len(finals['seeds'])} seeds: {finals['mean']:.4f}{plus}"


def settings(
    config: StudyConfig, store: Store, warm_start: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What must be equal for a later session to continue the study: all that decides a trial.

    `num_trials` alone may change (see files.MAY_CHANGE): more trials may be asked for.
    """
    overrides = dict(config.overrides)
    more: dict[str, Any] = {}
    if len(config.objectives) > 1:
        more["objectives"] = list(config.objectives)
    if warm_start is not None:
        more["warm_start"] = dict(warm_start)
    return {
        "task": config.task,
        "attention": config.space.attention,
        "overrides": overrides,
        **config.space.plain(overrides),
        "num_trials": config.num_trials,
        "max_steps": config.max_steps,
        "grace_steps": config.grace_steps,
        "reduction_factor": config.reduction_factor,
        "scheduler": config.scheduler,
        "sampler": config.sampler,
        "seed": config.seed,
        "data": store.manifest.label,
        "data_checksum": store.manifest.checksum,
        **more,
    }


def tensorboard_view(folder: Path, config: StudyConfig, store: Store) -> TensorBoardView:
    """The view that writes a row of HParams and the curves of each trial."""
    constants = {
        "attention": config.space.attention,
        "task": config.task,
        "data": store.manifest.label,
    }
    return TensorBoardView(folder, constants, config.space.names())
