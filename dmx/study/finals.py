"""After the search: the best configuration's test accuracy, and its retraining with other seeds."""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx.cluster import launch
from dmx.cluster.gang import evaluate
from dmx.data.store import Store
from dmx.errors import RunFailedError
from dmx.runs import layout
from dmx.runs.metrics import BEST_DEV_ACCURACY, DEV_ACCURACY, FAILURE, STEPS
from dmx.schema import to_dict
from dmx.storage.layout import StorageLayout
from dmx.training.checkpoint import open_checkpoint
from dmx.training.job import Job, Workers

logger = logging.getLogger("dmx.study")


def evaluate_test(
    best: Path, store: Store, workers: Workers, places: StorageLayout
) -> dict[str, float]:
    """Loss and accuracy of a checkpoint over the whole test split, by one worker in the cluster."""
    return evaluate(
        str(best),
        str(store.folder),
        "test",
        cpus=workers.cpus,
        gpus=workers.gpus,
        places=places,
    )


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
                **workers.of_job(),
                within=str(folder),
            )
        )
    logger.info(
        "training the best configuration with %d other seeds, %d at once",
        num_seeds,
        min(slots, num_seeds),
    )
    running: list[launch.Running] = []
    dev: dict[str, float] = {}
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                running.append(launch.start(waiting.pop(0), cpus=workers.cpus, gpus=workers.gpus))
            for run, report in launch.wait_any(running, timeout_seconds=60):
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
        launch.stop(*running)
    tests = [
        evaluate_test(folder / "final" / f"seed-{s}" / layout.BEST_DIR, store, workers, places)[
            "accuracy"
        ]
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
