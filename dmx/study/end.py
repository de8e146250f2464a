"""The end of a study: the best checkpoint's test, the files, and what the terminal shows."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx.data.store import Store
from dmx.log import console, verbatim
from dmx.resources import environment
from dmx.runs import layout
from dmx.runs.metrics import DEV_ACCURACY, TEST_ACCURACY, TEST_LOSS
from dmx.runs.objectives import OBJECTIVES
from dmx.runs.study import StudyResult
from dmx.search.population import apply
from dmx.storage.journal import read_journal, wall_seconds
from dmx.study import files as study_files
from dmx.study import finals
from dmx.study.config import StudyConfig
from dmx.study.view import TensorBoardView, trials_table
from dmx.wording import describe_failures


def finish(
    config: StudyConfig,
    store: Store,
    result: StudyResult,
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
    folder, best = result.folder, result.best
    summary = summarise(config, store, result)
    if best is None or best.checkpoint is None:
        return summary
    best_folder = folder / layout.BEST_DIR
    config.places.push(best_folder)
    if result.complete:
        test = finals.evaluate_test(best_folder, store, config.workers, config.places)
        summary["best"][TEST_ACCURACY] = test["accuracy"]
        summary["best"][TEST_LOSS] = test["loss"]
        tensorboard.test(best.number, test["accuracy"], best.checkpoint.step)
        if final_seeds:
            summary["final_seeds"] = finals.retrain(
                best_folder,
                store,
                folder,
                final_seeds,
                workers=config.workers,
                slots=slots,
                places=config.places,
            )
    return summary


def summarise(config: StudyConfig, store: Store, result: StudyResult) -> dict[str, Any]:
    """Write trials.csv and best/; the content of study.json, but for tests and `seconds`."""
    several = len(config.objectives) > 1
    label = store.manifest.label
    front = result.front if several else None
    study_files.write_trials(result.folder, result.trials, label, front)
    study_files.copy_best(result.folder, result.best)
    summary: dict[str, Any] = {
        "name": config.name,
        "data": label,
        "is_sample": store.manifest.is_sample,
        "data_checksum": store.manifest.checksum,
        "task": config.task,
        "attention": config.space.attention,
        "complete": result.complete,
        "num_trials": config.num_trials,
        "max_steps": config.max_steps,
        "grace_steps": config.grace_steps,
        "reduction_factor": config.reduction_factor,
        "trials": {
            s: sum(t.status == s for t in result.trials) for s in ("COMPLETE", "PRUNED", "FAILED")
        },
        **(front_summary(config.objectives, result) if several else {}),
        **({"population": population(result)} if config.scheduler == "pbt" else {}),
        "best": None,
        "environment": {**environment(), "argv": sys.argv},
    }
    best = result.best
    if best is not None and best.checkpoint is not None:
        summary["best"] = {
            "trial": best.number,
            "params": apply(best.params, best.changes, best.checkpoint.step),
            DEV_ACCURACY: best.best_dev_accuracy,
            "step": best.checkpoint.step,
            "checkpoint": layout.BEST_DIR,
        }
    return summary


def seconds_so_far(folder: Path) -> float:
    """How long the sessions until now have worked on the study; 0 for a new one."""
    seconds = wall_seconds(read_journal(folder / layout.JOURNAL_FILE)[0])
    return seconds if math.isfinite(seconds) else 0.0


def population(result: StudyResult) -> list[dict[str, Any]]:
    """`population` of study.json: what each trial began with, and what it changed to and when."""
    return [
        {
            "trial": t.number,
            "params": dict(t.params),
            "changes": [{"step": s, "params": dict(p)} for s, p in sorted(t.changes.items())],
        }
        for t in result.trials
    ]


def front_summary(
    objectives: tuple[str, ...], result: StudyResult
) -> dict[str, list[dict[str, Any]]]:
    """`objectives` and `front` of study.json: what was optimised, and the trials on the front."""
    described = [OBJECTIVES[name] for name in objectives]
    return {
        "objectives": [
            {"name": o.name, "direction": o.direction, "label": o.label} for o in described
        ],
        "front": [
            {"trial": t.number, "values": dict(t.values), "params": dict(t.params)}
            for t in result.trials
            if t.number in result.front
        ],
    }


def show(summary: Mapping[str, Any], result: StudyResult, store: Store) -> None:
    """Print the table of trials, the best configuration and its test accuracy."""
    out = console()
    best = summary["best"]
    title = (
        f"{summary['name']}: {summary['attention']} on {summary['task']} (data: {summary['data']})"
    )
    names = tuple(o["name"] for o in summary.get("objectives", ()))
    number = best["trial"] if best else None
    out.print(trials_table(result.trials, title, number, names, result.front))
    if names:
        on = ", ".join(str(n) for n in result.front) or "none"
        out.print(f"Pareto front of {', '.join(names)} (marked +): trials {on}", highlight=False)
    if best is None:
        failed = describe_failures(result.trials)
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
        out.print(finals.describe(summary["final_seeds"]))
    files = f"({layout.STUDY_FILE}, {layout.TRIALS_FILE}, {layout.BEST_DIR}/)"
    verbatim(f"files: {result.folder}  {files}")  # to be copied in one piece
    verbatim(f"curves: tensorboard --logdir {result.folder.parent}")
