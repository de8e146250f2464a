"""The end of a study: its test, retraining, study.json, trials.csv, and what the terminal shows."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
import time
from pathlib import Path
from typing import Any

from dmx.cluster import gang
from dmx.data.store import Store
from dmx.errors import RunFailedError
from dmx.format import csv_text, mean_and_deviation
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
from dmx.storage.files import copy_folder, write_atomic
from dmx.storage.journal import Journal
from dmx.study.study import StudyConfig
from dmx.study.views import trials_table
from dmx.tensorboard import RunWriter
from dmx.terminal import console, verbatim
from dmx.training.checkpoint import open_checkpoint
from dmx.training.evaluation import EvaluationJob
from dmx.training.job import Job
from dmx.training.passes import Evaluation

logger = logging.getLogger("dmx.study")

# -- the test -----------------------------------------------------------------------------------


def finish(
    config: StudyConfig, store: Store, study: Study, *, slots: int, final_seeds: int
) -> None:
    """Copy the best checkpoint to best/; of a complete study test it, and train it again.

    What came of it is in the journal, and so in `study`. An incomplete study is not tested: its
    best trial may still change.

    Raises:
        RunFailedError: a run with another seed failed.
    """
    best = copy_best(study)
    if best is None or study.best_trial is None:
        return
    config.places.push(best)
    known = len(study.finals.seeds) if study.finals else 0
    tested = math.isfinite(study.test_accuracy) and known >= final_seeds
    if not study.complete or tested:
        return
    with Journal(study.folder / layout.JOURNAL_FILE) as journal:

        def record(**event: Any) -> None:
            journal.append(**event, time=time.time())
            study.add(journal.events[-1])

        record(event="session")
        test = _tested(config, store, best)
        trial, step = study.best_trial.number, study.best_trial.best_step
        writer = RunWriter(layout.trial_folder(study.folder, trial))
        writer.scalars({TEST_ACCURACY: test.accuracy}, step)
        writer.close()
        again = _retrained(config, store, best, num_seeds=final_seeds, slots=slots)
        loss = test.loss if math.isfinite(test.loss) else None
        found = {TEST_ACCURACY: test.accuracy, TEST_LOSS: loss, **again}
        record(event="final", trial=trial, step=step, **found)


def _tested(config: StudyConfig, store: Store, checkpoint: Path) -> Evaluation:
    """Of the whole test split, by one worker in the cluster."""
    data, places = str(store.folder), config.places
    wanted = EvaluationJob(checkpoint=str(checkpoint), data_folder=data, places=places)
    return gang.evaluate(wanted, config.workers)


def _retrained(
    config: StudyConfig, store: Store, best: Path, *, num_seeds: int, slots: int
) -> dict[str, list[Any]]:
    """`seeds`, `dev_accuracies` and `test_accuracies` of the best setting; survives a crash."""
    run = open_checkpoint(best).config
    folder = best.parent
    folders = {
        run.train.seed + more: folder / "final" / f"seed-{run.train.seed + more}"
        for more in range(1, num_seeds + 1)
    }
    waiting = []
    for seed, place in folders.items():
        train = dataclasses.replace(run.train, seed=seed)
        data = dataclasses.replace(run.data, seed=run.data.seed + seed - run.train.seed)
        waiting.append(
            Job(
                run_config=to_dict(dataclasses.replace(run, train=train, data=data)),
                data_folder=str(store.folder),
                folder=str(place),
                places=config.places,
                workers=config.workers,
                within=str(folder),
            )
        )
    if waiting:
        logger.info(
            "training the best configuration with %d other seeds, %d at once",
            *(num_seeds, min(slots, num_seeds)),
        )
    running: list[gang.Running] = []
    dev: dict[str, float] = {}
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                running.append(gang.start(waiting.pop(0)))
            for one, report in gang.wait_any(running, timeout_seconds=60):
                if report.get(FAILURE):
                    raise RunFailedError(f"{one.job.folder}: {report[FAILURE]}.")
                dev[one.job.folder] = report[BEST_DEV_ACCURACY]
                logger.info(
                    "%s: step %s of %s, dev accuracy %.4f (best %.4f)",
                    Path(one.job.folder).name,
                    f"{report[STEPS]:,}",
                    f"{run.train.num_steps:,}",
                    *(report[DEV_ACCURACY], report[BEST_DEV_ACCURACY]),
                )
                if report.get("done"):
                    running.remove(one)
    finally:
        gang.stop(*running)
    tests = [_tested(config, store, place / layout.BEST_DIR) for place in folders.values()]
    return {
        "seeds": list(folders),
        "dev_accuracies": [dev[str(place)] for place in folders.values()],
        "test_accuracies": [test.accuracy for test in tests],
    }


# -- files --------------------------------------------------------------------------------------


def copy_best(study: Study) -> Path | None:
    """best/, now a copy of the best trial's checkpoint; None where there is none."""
    best, target = study.best_trial, study.folder / layout.BEST_DIR
    if best is None or best.checkpoint is None:
        return None
    copy_folder(best.checkpoint, target)
    return target


def summarise(study: Study) -> dict[str, Any]:
    """The content of study.json: the result, for machines."""
    names = ("task", "attention", "data", "data_checksum", "num_trials", "max_steps")
    statuses = [t.status for t in study.trials]
    best = study.best_trial
    summary: dict[str, Any] = {
        "name": study.name,
        **{k: study.settings[k] for k in (*names, "grace_steps", "reduction_factor")},
        "is_sample": study.is_sample,
        "complete": study.complete,
        "trials": {s: statuses.count(s) for s in ("COMPLETE", "PRUNED", "FAILED")},
        "best": None,
        "seconds": study.seconds,
        "environment": study.environment,
    }
    if study.several:
        objectives = [OBJECTIVES[name] for name in study.several]
        summary["objectives"] = [
            {"name": o.name, "direction": o.direction, "label": o.label} for o in objectives
        ]
        summary["front"] = [
            {"trial": t.number, "values": t.values, "params": t.params} for t in study.best_trials
        ]
    if study.is_population:
        summary["population"] = [
            {
                "trial": t.number,
                "params": t.params,
                "changes": [{"step": s, "params": dict(p)} for s, p in sorted(t.changes.items())],
            }
            for t in study.trials
        ]
    if best is not None and best.checkpoint is not None:
        summary["best"] = {
            "trial": best.number,
            "params": study.best_params,
            DEV_ACCURACY: best.best,
            "step": best.best_step,
            "checkpoint": layout.BEST_DIR,
        }
        if math.isfinite(study.test_accuracy):
            summary["best"] |= {TEST_ACCURACY: study.test_accuracy, TEST_LOSS: study.test_loss}
    if study.finals:
        tests = study.finals.test_accuracies
        summary["final_seeds"] = {
            **dataclasses.asdict(study.finals),
            "mean": statistics.fmean(tests),
            "standard_deviation": statistics.stdev(tests) if len(tests) > 1 else None,
        }
    return summary


def write_files(study: Study) -> dict[str, Any]:
    """Write study.json, whose content is returned, and trials.csv."""
    summary = to_dict(summarise(study), finite=True)
    write_atomic(study.folder / layout.TRIALS_FILE, csv_text(study.trial_rows()))
    write_atomic(study.folder / layout.STUDY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


# -- the terminal -------------------------------------------------------------------------------


def show(study: Study, store: Store) -> None:
    """Print the table of trials, the best configuration and its test accuracy."""
    out, best = console(), study.best_trial
    title = f"{study.name}: {study.attention} on {study.task} (data: {study.data})"
    out.print(trials_table(study, title))
    if study.several:
        on = ", ".join(str(t.number) for t in study.best_trials) or "none"
        names = ", ".join(study.several)
        out.print(f"Pareto front of {names} (marked +): trials {on}", highlight=False)
    if best is None or best.checkpoint is None:
        failed = describe_failures(study.trials)
        out.print(failed or "No trial reported a dev accuracy.", highlight=False, markup=False)
        return
    labels = store.split("test").labels
    majority = max((labels == c).mean() for c in set(labels.tolist()))
    out.print(f"best: trial {best.number}, dev accuracy {best.best:.4f}")
    for key, value in study.best_params.items():
        out.print(f"  {key}: {value}", highlight=False)
    if math.isfinite(study.test_accuracy):
        out.print(
            f"test accuracy {study.test_accuracy:.4f} (majority class {majority:.4f}; "
            f"data: {study.data})"
        )
    if study.finals:
        tests = study.finals.test_accuracies
        mean, deviation = mean_and_deviation(tests)
        plus = f" ± {deviation:.4f}" if math.isfinite(deviation) else ""
        out.print(f"test accuracy over {len(tests)} seeds: {mean:.4f}{plus}")
    files = f"({layout.STUDY_FILE}, {layout.TRIALS_FILE}, {layout.BEST_DIR}/)"
    verbatim(f"files: {study.folder}  {files}")  # to be copied in one piece
    verbatim(f"curves: tensorboard --logdir {study.folder.parent}")
