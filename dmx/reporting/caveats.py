"""What a reader must know before believing a number: samples, budgets, seeds; said plainly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dmx.format import describe_failures, short
from dmx.runs.run import UNKNOWN, Run
from dmx.schema import flatten
from dmx.tasks import find_task

_BUDGET = {
    "train.num_steps": "optimizer steps",
    "train.batch_size": "sequences per step",
}
"""Preset values that decide how much a run has seen."""
_EDGE = 0.05
"""Of a range, or of its logarithm: nearer to a bound than this share is at its edge."""
_LEAST_FOR_EDGES = 5
"""Of fewer trials one lies at an edge by chance."""


@dataclass(frozen=True)
class Caveat:
    """`severe`: the numbers cannot stand beside published ones. `note`: good to know."""

    level: Literal["severe", "note"]
    text: str


def budget_differences(
    task_name: str, config: Mapping[str, Any] | None
) -> dict[str, tuple[Any, Any]]:
    """{setting: (ours, the task preset's)} where a run saw more or less than the preset."""
    task = find_task(task_name)
    if task is None or config is None:
        return {}
    ours = flatten(config)
    found = {}
    for key in _BUDGET:
        preset = task.preset.get(key)
        if preset is not None and ours.get(key) != preset:
            found[key] = (ours.get(key), preset)
    return found


def budget_sentence(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """`16 of 20,000 optimizer steps (0.08 %), 4 instead of 32 sequences per step`."""
    parts = []
    for key, (ours, preset) in differences.items():
        what = _BUDGET[key]
        if not isinstance(ours, int) or not isinstance(preset, int):
            parts.append(f"{ours!r} instead of {preset!r} {what}")
        elif key == "train.num_steps" and ours < preset:
            parts.append(f"{ours:,} of {preset:,} {what} ({100 * ours / preset:.2g} %)")
        else:
            parts.append(f"{ours:,} instead of {preset:,} {what}")
    return ", ".join(parts)


def comparable(run: Run) -> bool:
    """Whether a run's accuracy may stand beside published numbers: LRA data, preset budget."""
    return not any(c.level == "severe" for c in caveats(run))


def caveats(run: Run) -> tuple[Caveat, ...]:
    """All of them, the severe ones first."""
    severe, notes = [], []
    task = find_task(run.task)
    if run.is_sample:
        severe.append(
            f"The data are {run.data}: a stand-in for {run.task}. The accuracies say nothing about "
            "LRA and must not stand beside published numbers."
        )
    elif run.task != UNKNOWN and (task is None or task.published is None):
        severe.append(
            f"{run.task} is no published task: no published number belongs beside its accuracies. "
            f"The data are {run.data}."
        )
    elif run.data not in (run.task, UNKNOWN):
        severe.append(f"The data are {run.data}, not the whole set of {run.task}.")
    differences = budget_differences(run.task, run.config)
    if differences:
        whose = f" of stage {run.shown}" if run.stages else ""
        severe.append(
            f"The budget{whose} differs from the preset of {run.task}: "
            f"{budget_sentence(differences)}."
        )
    if not run.complete:
        severe.append(_incomplete(run))
    if run.kind == "study" and (failed := describe_failures(run.trials)):
        severe += [failed] if run.count("FAILED") == len(run.trials) else []
        notes += [failed] if run.count("FAILED") < len(run.trials) else []
    if run.task == "text" and not run.is_sample:
        notes.append(
            "Text has no validation set of its own: dev is test, as in the reference, so the best "
            "checkpoint was chosen on the test data."
        )
    if run.kind == "study" and run.finals is None and math.isfinite(run.test_accuracy):
        notes.append(
            "The test accuracy is that of one seed, the best of a search; --final-seeds N tells "
            "how much of it is luck."
        )
    if run.is_population:
        notes.append(
            "The settings of a population change while it trains. Trials are listed with those "
            "they began with, and training the best one's last settings from the start is another "
            "run."
        )
    if (stage := run.shown_stage) is not None and stage.reinit:
        notes.append(
            f"Stage {stage.name} started with fresh weights of {', '.join(stage.reinit)} (reinit), "
            "which the command of a single run cannot say."
        )
    if run.memory_of == "process" and run.trials:
        notes.append(
            "Memory is the peak of the worker's process while the trial ran (no GPU); libraries "
            "count."
        )
    notes += [*_noise(run), *_edges(run)]
    return (*(Caveat("severe", t) for t in severe), *(Caveat("note", t) for t in notes))


def _noise(run: Run) -> list[str]:
    """How well the dev split tells trials apart."""
    best = run.best_trial
    if best is None or run.stages or not math.isfinite(error := run.dev_error(best.best)):
        return []
    text = (
        f"The dev split has {run.num_dev:,} examples: an accuracy of {100 * best.best:.2f} % on it "
        f"is uncertain by ±{100 * error:.2f} points (95 %)."
    )
    if run.at_chance:
        what = "No trial is" if run.kind == "study" else "The run is not"
        return [
            f"{text} {what} better than guessing the largest class "
            f"({100 * run.dev_majority:.2f} %) by more than that explains: it sits at chance."
        ]
    near = sum(t is not best and t.best >= best.best - error for t in run.trials)
    if near:
        are = "other trial lies" if near == 1 else "other trials lie"
        text += f" {near} {are} within that of the best, whose lead may be luck."
    return [text]


def _edges(run: Run) -> list[str]:
    """Values of the best trial that lie at the end of what was searched."""
    best, found = run.best_trial, []
    if best is None or run.search is None or run.at_chance or len(run.trials) < _LEAST_FOR_EDGES:
        return []
    for name, value in best.drawn.items():
        kind, *values = run.search.searched.get(name, ("",))
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if not numbers or len(values) < (3 if kind == "choice" else 2):
            continue
        low, high = min(values), max(values)
        place = (value - low) / (high - low)
        if kind.startswith("log"):
            place = math.log(value / low) / math.log(high / low)
        discrete = kind in ("choice", "int", "logint")
        if place <= 0 or (place < _EDGE and not discrete):
            end = "lower"
        elif place >= 1 or (place > 1 - _EDGE and not discrete):
            end = "upper"
        else:
            continue
        if end == "lower" and low == 0:  # a dropout, a weight decay: there is nothing below
            continue
        among = f"{short(low)} to {short(high)}"
        found.append(
            f"The best trial's {name} of {short(value)} lies at the {end} end of what was searched "
            f"({among}): a wider range may hold a better one."
        )
    return found


def _incomplete(run: Run) -> str:
    if run.kind == "study" and run.search is not None:
        ended = sum(t.status != "RUNNING" for t in run.trials)
        total = run.search.num_trials
        of = f" of {total}" if total else ""
        return f"The study has not ended: {ended}{of} trials have. What follows may still change."
    if run.kind == "curriculum":
        passed = sum(s.status == "passed" for s in run.stages)
        return f"The curriculum has not ended: {passed} of {len(run.stages)} stages have passed."
    error = run.trials[0].error if run.trials else ""
    return f"The run has not ended{': ' + error if error else ''}."
