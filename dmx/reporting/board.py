"""The leaderboard: runs grouped by what they measured, and their accuracies over seeds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmx.format import mean_and_deviation
from dmx.reporting.caveats import budget_differences
from dmx.reporting.published import column_of
from dmx.reporting.records import RunReport
from dmx.runs.metrics import PARAMETERS, PEAK_MEMORY_MB, STEP_SECONDS
from dmx.schema import flatten
from dmx.tasks import find_task

_SEEDS = ("train.seed", "data.seed")
_FREE = (*_SEEDS, "data.root", "train.device", "train.compile", "init.path")
"""Settings in which runs of one entry may differ; of a file of weights its content decides."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One configuration on one task, over its seeds. Accuracies lie in 0..1.

    Attributes:
        runs: names of the folders. how: "fixed", "search", "curriculum" or "curriculum with a
            search".
        steps: of a curriculum, those of all its stages and attempts (the mean over the runs).
        test: test accuracy of each seed. dev: best dev accuracy of each. Runs of one seed count
            once, with their mean.
        init: the weights that it was started from, or "".
        code: the versions of the code that its runs ran.
        reduced: its budget is not the task preset's. incomplete: a run has not ended.
        step_seconds, memory_mb: the median and the highest over the runs; NaN where unknown.
        memory_of: see RunReport.
    """

    attention: str
    task: str
    data: str
    is_sample: bool
    how: str
    runs: tuple[str, ...]
    test: tuple[float, ...]
    dev: tuple[float, ...]
    steps: int
    parameters: float
    step_seconds: float
    memory_mb: float
    memory_of: str
    reduced: bool
    incomplete: bool
    init: str = ""
    code: tuple[str, ...] = ()

    @property
    def mixed_code(self) -> bool:
        """Whether one commit does not name the code of all its runs."""
        return len(self.code) > 1 or any("+" in code for code in self.code)

    @property
    def mean(self) -> float:
        """Mean test accuracy, or NaN."""
        return mean_and_deviation(self.test)[0]

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds; NaN for one seed."""
        return mean_and_deviation(self.test)[1]


@dataclass(frozen=True)
class Board:
    """A table of attentions x tasks for one kind of data.

    Attributes:
        title: says which. columns: tasks, or the data's labels where those say more.
    """

    title: str
    is_sample: bool
    columns: tuple[str, ...]
    attentions: tuple[str, ...]
    entries: tuple[Entry, ...]

    def cell(self, attention: str, column: str) -> Entry | None:
        """The entry to show: of several the one with the best mean dev accuracy, tested ones first.

        The choice never looks at test accuracies.
        """
        found = [e for e in self.entries if (e.attention, _column(e)) == (attention, column)]

        def rank(entry: Entry) -> tuple[bool, bool, bool, float]:
            dev = mean_and_deviation(entry.dev)[0]
            dev = dev if math.isfinite(dev) else -1.0
            return (bool(entry.test), not entry.reduced, not entry.init, dev)

        return max(found, key=rank) if found else None


def entries(runs: Iterable[RunReport]) -> list[Entry]:
    """One entry per configuration and task; runs that differ in seeds alone share one.

    Precision is that which was used: `auto` is another one on a GPU than on a CPU.
    """
    groups: dict[str, list[RunReport]] = {}
    for run in runs:
        groups.setdefault(_group(run), []).append(run)
    return [_entry(group) for group in groups.values()]


def _group(run: RunReport) -> str:
    if run.recipe:
        return run.recipe
    if run.kind != "run" or run.config is None:
        return f"{run.kind} {run.folder}"
    settings = {k: v for k, v in flatten(run.config).items() if k not in _FREE and v is not None}
    precision = run.environment.get("precision")
    text = json.dumps(
        [run.data, run.data_checksum, precision, settings], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _entry(group: Sequence[RunReport]) -> Entry:
    first = group[0]
    tests: list[float] = []
    devs: list[float] = []
    single: dict[str, list[RunReport]] = {}
    for run in group:
        if run.finals is not None and run.finals.test_accuracies:
            tests.extend(run.finals.test_accuracies)
            devs.extend(run.finals.dev_accuracies)
        else:
            single.setdefault(_seeds(run), []).append(run)
    for same in single.values():
        tests.append(mean_and_deviation(tuple(run.test_accuracy for run in same))[0])
        best_devs = (run.best_trial.best for run in same if run.best_trial)
        devs.append(mean_and_deviation(tuple(best_devs))[0])
    best = [run.best_trial for run in group if run.best_trial is not None]
    times = sorted(v for t in best if math.isfinite(v := t.median(STEP_SECONDS)))
    memory = [v for t in best if math.isfinite(v := t.highest(PEAK_MEMORY_MB))]
    settings = flatten(first.config or {})
    steps = settings.get("train.num_steps")
    if first.stages:
        steps = round(math.fsum(run.total_steps for run in group) / len(group))
    how = {"run": "fixed", "study": "search", "curriculum": "curriculum"}[first.kind]
    if any(a.search for s in first.stages for a in s.attempts):
        how += " with a search"
    return Entry(
        attention=first.attention,
        task=first.task,
        data=first.data,
        is_sample=first.is_sample,
        how=how,
        runs=tuple(run.name for run in group),
        test=tuple(v for v in tests if math.isfinite(v)),
        dev=tuple(v for v in devs if math.isfinite(v)),
        steps=steps if isinstance(steps, int) else max((t.steps for t in best), default=0),
        parameters=best[0].last(PARAMETERS) if best else math.nan,
        step_seconds=times[(len(times) - 1) // 2] if times else math.nan,
        memory_mb=max(memory, default=math.nan),
        memory_of=first.memory_of,
        reduced=bool(budget_differences(first.task, first.config)),
        incomplete=not all(run.complete for run in group),
        init="/".join(Path(str(first.init["path"])).parts[-2:]) if first.init else "",
        code=tuple(sorted({str(c) for run in group if (c := run.environment.get("code"))})),
    )


def _seeds(run: RunReport) -> str:
    """What tells the runs of one entry apart; runs that are equal in it are repetitions."""
    settings = flatten(run.config or {})
    return str([settings.get(key) for key in _SEEDS])


def boards(found: Sequence[Entry]) -> list[Board]:
    """The published sets, then data that were generated or are but a part, then tasks that are not
    published, then each sample; never mixed.
    """
    made = []
    real = [e for e in found if not e.is_sample]
    kinds = {
        "LRA data": [e for e in real if _is_published(e) and e.data == e.task],
        "generated or partial data": [e for e in real if _is_published(e) and e.data != e.task],
        "tasks that are not published": [e for e in real if not _is_published(e)],
    }
    made += [_board(title, False, some) for title, some in kinds.items() if some]
    for data in sorted({e.data for e in found if e.is_sample}):
        some = [e for e in found if e.is_sample and e.data == data]
        made.append(_board(f"sample data: {data}", True, some))
    return made


def _is_published(entry: Entry) -> bool:
    task = find_task(entry.task)
    return task is not None and task.published is not None


def _column(entry: Entry) -> str:
    """Generated and partial data go by their label, which says how many examples there are."""
    return entry.task if entry.is_sample else entry.data


_ORDER = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")


def _board(title: str, is_sample: bool, some: Sequence[Entry]) -> Board:
    return Board(
        title=title,
        is_sample=is_sample,
        columns=tuple(dict.fromkeys(_column(e) for e in sorted(some, key=_by_task))),
        attentions=tuple(sorted({e.attention for e in some}, key=_natural)),
        entries=tuple(sorted(some, key=lambda e: (_by_task(e), _natural(e.attention), e.runs))),
    )


def _by_task(entry: Entry) -> tuple[int, str, str]:
    column = column_of(entry.task)
    return (_ORDER.index(column) if column else len(_ORDER), entry.task, entry.data)


def _natural(label: str) -> tuple[str, int, str]:
    """butterfly-64 before butterfly-256."""
    name, _, size = label.rpartition("-")
    return (name, int(size), label) if size.isdecimal() else (label, 0, label)
