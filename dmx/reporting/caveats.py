"""What a reader must know before believing a number: samples, budgets, seeds; said plainly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dmx.format import short
from dmx.runs.run import UNKNOWN, Run
from dmx.runs.trial import describe_failures
from dmx.schema import flatten
from dmx.tasks import find_task

_BUDGET = {"train.num_steps": "optimizer steps", "train.batch_size": "sequences per step"}
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


def budget_difference(run: Run) -> str:
    """`16 of 20,000 optimizer steps (0.08 %), 4 instead of 32 sequences per step`.

    "" where a run saw what the task's preset gives.
    """
    task, parts = find_task(run.task), []
    if task is None or run.config is None:
        return ""
    settings = flatten(run.config)
    for key, what in _BUDGET.items():
        ours, preset = settings.get(key), task.preset.get(key)
        if preset is None or ours == preset:
            continue
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
    severe: list[str] = []
    notes: list[str] = []
    failed = describe_failures(run.trials) if run.kind == "study" else ""
    if run.is_sample:
        severe.append(
            f"The data are {run.data}: a stand-in for {run.task}. The accuracies say nothing about "
            "LRA and must not stand beside published numbers."
        )
    elif run.task != UNKNOWN and not is_published(run.task):
        severe.append(
            f"{run.task} is no published task: no published number belongs beside its accuracies. "
            f"The data are {run.data}."
        )
    elif run.data not in (run.task, UNKNOWN):
        severe.append(f"The data are {run.data}, not the whole set of {run.task}.")
    if difference := budget_difference(run):
        whose = f" of stage {run.shown}" if run.stages else ""
        severe.append(f"The budget{whose} differs from the preset of {run.task}: {difference}.")
    if not run.complete:
        severe.append(_incomplete(run))
    if failed:
        (severe if run.count("FAILED") == len(run.trials) else notes).append(failed)
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


def is_published(name: str) -> bool:
    """Whether there are published results on a task."""
    task = find_task(name)
    return task is not None and task.published is not None


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
        if not numbers or len(set(values)) < (3 if kind == "choice" else 2):
            continue
        low, high = min(values), max(values)
        on = math.log if kind.startswith("log") else float
        place = (on(value) - on(low)) / (on(high) - on(low))
        near = 0 if kind in ("choice", "int", "logint") else _EDGE
        end = "lower" if place <= near else "upper" if place >= 1 - near else ""
        if not end or (end == "lower" and low == 0):  # below no dropout there is nothing
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
