"""The leaderboard: runs grouped by what they measured, and their accuracies over seeds."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmx.format import (
    MISSING,
    csv_text,
    duration,
    mean_and_deviation,
    percent,
    scaled,
    with_spread,
)
from dmx.reporting.caveats import budget_difference, is_published
from dmx.reporting.published import COLUMNS, column_of
from dmx.reporting.report import render, write
from dmx.reporting.tables import Table
from dmx.runs.folders import kind_of, load_all, runs_below
from dmx.runs.layout import PARAMETERS, PEAK_MEMORY_MB, STEP_SECONDS
from dmx.runs.run import Run
from dmx.schema import finite, flatten

logger = logging.getLogger("dmx.leaderboard")

_MARKS = {
    "†": "steps or batch size are not the task preset's",
    "‡": "a run of it has not ended",
    "*": "of a search: the best trial's one seed, which its search chose",
    "§": "started from the weights of another run",
    "¶": "its runs ran different code, or code with changes that no commit holds",
}
_SEEDS = ("train.seed", "data.seed")
_FREE = (*_SEEDS, "data.root", "train.device", "train.compile", "init.path")
"""Settings in which runs of one row may differ; of a file of weights its content decides."""
_TITLES = ("LRA data", "generated or partial data", "tasks that are not published")
"""Of the leaderboards before those of samples, in their order."""


Row = dict[str, Any]
"""One configuration on one task, over its seeds; accuracies in 0..1, NaN where unknown.

data, is_sample, task, attention: see Run.
how: fixed, search, curriculum, or curriculum with a search.
init_from: the weights that it was started from, or "".
code: the versions of the code that its runs ran.
test, dev: accuracies of each seed; runs of one seed count once, with their mean.
test_accuracy_mean, test_accuracy_std, seeds, dev_accuracy_mean: of these.
steps: of a curriculum, those of all its stages and attempts (the mean over the runs).
step_seconds, peak_memory_mb, memory_of: the median and the highest over the runs; see Run.
reduced_budget: it is not the task preset's. complete: all runs have ended.
runs: names of the folders.
"""


@dataclass(frozen=True)
class Leaderboard:
    """A table of attentions x tasks for one kind of data; `title` says which."""

    title: str
    rows: list[Row]

    @property
    def heading(self) -> str:
        """The title as a heading."""
        return self.title[0].upper() + self.title[1:]

    @property
    def is_sample(self) -> bool:
        """Whether its data stand in for the published ones."""
        return bool(self.rows[0]["is_sample"])

    def cells(self) -> Table:
        """Attentions x tasks: of several rows the one with the best mean dev accuracy.

        Those that were tested go first, then full budgets, then fresh weights. The choice never
        looks at test accuracies. Generated and partial data go by their label, which says how many
        examples there are.
        """
        label = "task" if self.is_sample else "data"
        shown: dict[tuple[str, str], Row] = {}
        for row in sorted(self.rows[::-1], key=_rank):  # the last one stays
            shown[row["attention"], row[label]] = row
        attentions = sorted({row["attention"] for row in self.rows}, key=_natural)
        columns = dict.fromkeys(row[label] for row in self.rows)
        return Table(
            [
                {"attention": a, **{f">{c}": cell_text(shown.get((a, c))) for c in columns}}
                for a in attentions
            ]
        )

    def notes(self) -> list[str]:
        """What the cells say, and what their marks mean."""
        shown = "".join(cell for row in self.cells().rows for cell in row[1:])
        notes = ["Test accuracy in per cent: mean ± standard deviation (number of seeds)."]
        return notes + [f"{mark} {text}." for mark, text in _MARKS.items() if mark in shown]

    def costs(self) -> Table:
        """Every row, with what it cost."""
        return Table(
            [
                {
                    "task": row["task"],
                    "attention": row["attention"],
                    "how": row["how"] + (f", from {row['init_from']}" if row["init_from"] else ""),
                    ">test acc., %": percent(row["test_accuracy_mean"]) + _marks(row),
                    ">std": percent(row["test_accuracy_std"]),
                    ">seeds": str(row["seeds"]),
                    ">dev acc., %": percent(row["dev_accuracy_mean"]),
                    ">steps": f"{row['steps']:,}",
                    ">parameters": scaled(row["parameters"]),
                    ">per step": duration(row["step_seconds"]),
                    ">peak memory": scaled(row["peak_memory_mb"] * 2**20, "B", 1024),
                    "of": row["memory_of"] or MISSING,
                    "runs": ", ".join(row["runs"]),
                }
                for row in self.rows
            ]
        )


def _rank(row: Row) -> tuple[bool, bool, bool, float]:
    dev = row["dev_accuracy_mean"] if row["dev"] else -1.0
    return (bool(row["test"]), not row["reduced_budget"], not row["init_from"], dev)


def _marks(row: Row) -> str:
    holds = (
        row["reduced_budget"],
        not row["complete"],
        "search" in row["how"] and row["seeds"] == 1,
        bool(row["init_from"]),
        len(row["code"]) > 1 or any("+" in code for code in row["code"]),
    )
    return "".join(mark for mark, held in zip(_MARKS, holds, strict=True) if held)


def cell_text(row: Row | None) -> str:
    """`64.20 ± 0.31 (3)`, with its marks."""
    if row is None:
        return MISSING
    seeds = f" ({row['seeds']})" if row["seeds"] > 1 else ""
    return f"{with_spread(row['test'])}{seeds}{_marks(row)}"


def gather(paths: Sequence[Path], unread: list[str] | None = None) -> list[Run]:
    """Every run at or directly below the paths, each once.

    Runs below them that failed, or were stopped, before they had anything to compare are left out.

    Args:
        unread: takes a sentence for each that could not be read.

    Raises:
        ConfigError: a path holds no run. DmxError: no run could be read.
    """
    folders: dict[Path, bool] = {}  # whether it was asked for by itself
    for path in paths:
        inside = [] if kind_of(path) is not None else runs_below(path)
        for folder in inside:
            folders.setdefault(folder.resolve(), False)
        if not inside:
            folders[path.resolve()] = True
    found, errors = load_all(list(folders))
    if not found:
        raise errors[0]
    if unread is not None:
        unread.extend(map(str, errors))
    return [r for r in found if folders[r.folder] or r.kind != "run" or r.best_trial is not None]


def leaderboard_rows(runs: Iterable[Run]) -> list[Row]:
    """One row per configuration and task; runs that differ in seeds alone share one."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_group(run), []).append(run)
    return [_row(group) for group in groups.values()]


def _group(run: Run) -> str:
    if run.recipe:
        return run.recipe
    if run.kind != "run" or run.config is None:
        return f"{run.kind} {run.folder}"
    settings = {k: v for k, v in flatten(run.config).items() if k not in _FREE and v is not None}
    # That which was used: `auto` is another one on a GPU than on a CPU.
    precision = run.environment.get("precision")
    parts = [run.data, run.data_checksum, precision, settings]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _row(group: Sequence[Run]) -> Row:
    first = group[0]
    tests: list[float] = []
    devs: list[float] = []
    repeated: dict[str, list[Run]] = {}  # of one seed
    for run in group:
        if run.finals is not None and run.finals.test_accuracies:
            tests.extend(run.finals.test_accuracies)
            devs.extend(run.finals.dev_accuracies)
        else:
            settings = flatten(run.config or {})
            repeated.setdefault(str([settings.get(key) for key in _SEEDS]), []).append(run)
    for same in repeated.values():
        best_devs = (run.best_trial.best for run in same if run.best_trial)
        tests.append(mean_and_deviation(tuple(run.test_accuracy for run in same))[0])
        devs.append(mean_and_deviation(tuple(best_devs))[0])
    test, dev = tuple(filter(math.isfinite, tests)), tuple(filter(math.isfinite, devs))
    best = [run.best_trial for run in group if run.best_trial is not None]
    times = list(filter(math.isfinite, (t.median(STEP_SECONDS) for t in best)))
    memory = filter(math.isfinite, (t.highest(PEAK_MEMORY_MB) for t in best))
    steps = flatten(first.config or {}).get("train.num_steps")
    if first.stages:
        steps = round(statistics.fmean(run.total_steps for run in group))
    mean, deviation = mean_and_deviation(test)
    how = {"run": "fixed", "study": "search", "curriculum": "curriculum"}[first.kind]
    searched = any(a.search for s in first.stages for a in s.attempts)
    return {
        "data": first.data,
        "is_sample": first.is_sample,
        "task": first.task,
        "attention": first.attention,
        "how": how + " with a search" * searched,
        "init_from": "/".join(Path(str(first.init["path"])).parts[-2:]) if first.init else "",
        "code": sorted({str(c) for run in group if (c := run.environment.get("code"))}),
        "test": test,
        "dev": dev,
        "test_accuracy_mean": mean,
        "test_accuracy_std": deviation,
        "seeds": len(test),
        "dev_accuracy_mean": mean_and_deviation(dev)[0],
        "steps": steps if isinstance(steps, int) else max((t.steps for t in best), default=0),
        "parameters": best[0].last(PARAMETERS) if best else math.nan,
        "step_seconds": statistics.median_low(times) if times else math.nan,
        "peak_memory_mb": max(memory, default=math.nan),
        "memory_of": first.memory_of,
        "reduced_budget": bool(budget_difference(first)),
        "complete": all(run.complete for run in group),
        "runs": tuple(run.name for run in group),
    }


def leaderboards(rows: Iterable[Row]) -> list[Leaderboard]:
    """The published sets, then data that were generated or are but a part, then tasks that are not
    published, then each sample; never mixed.
    """
    boards: dict[str, list[Row]] = {title: [] for title in _TITLES}
    for row in sorted(rows, key=lambda r: (_by_task(r), _natural(r["attention"]), r["runs"])):
        if row["is_sample"]:
            title = f"sample data: {row['data']}"
        elif is_published(row["task"]):
            title = _TITLES[row["data"] != row["task"]]
        else:
            title = _TITLES[-1]
        boards.setdefault(title, []).append(row)
    samples = sorted(set(boards) - set(_TITLES))
    return [Leaderboard(t, boards[t]) for t in (*_TITLES, *samples) if boards[t]]


def _by_task(row: Row) -> tuple[int, str, str]:
    column = column_of(row["task"])
    return (list(COLUMNS).index(column) if column else len(COLUMNS), row["task"], row["data"])


def _natural(label: str) -> tuple[str, int, str]:
    """butterfly-64 before butterfly-256."""
    name, _, size = label.rpartition("-")
    return (name, int(size), label) if size.isdecimal() else (label, 0, label)


def to_csv(found: Sequence[Leaderboard]) -> str:
    """One line per row of all tables; what a row has several of is divided by spaces."""

    def cell(value: Any) -> Any:
        return " ".join(map(str, value)) if isinstance(value, list | tuple) else value

    rows = (row for board in found for row in board.rows)
    return csv_text([{key: cell(value) for key, value in row.items()} for row in rows])


def to_json(found: Sequence[Leaderboard]) -> str:
    """The same as lists."""
    rows = [row for board in found for row in board.rows]
    return json.dumps(finite(rows), indent=1, ensure_ascii=False) + "\n"


def _page(format: str, found: Sequence[Leaderboard]) -> str:
    return render(format, "Leaderboard", boards=found)


FORMATS: dict[str, Callable[[Sequence[Leaderboard]], str]] = {
    **{format: functools.partial(_page, format) for format in ("md", "latex", "html")},
    "csv": to_csv,
    "json": to_json,
}


def write_leaderboard(
    folders: Sequence[Path], format: str = "md", out: str | None = None
) -> list[Row]:
    """Compare all runs in the folders; runs that cannot be read are warned of.

    Args:
        folders: runs, or folders of runs. format: one of FORMATS. out: a file; None or "-" for
            stdout.

    Raises:
        ConfigError: a folder holds no run, or the file cannot be written. DmxError: no run could
            be read.
    """
    unread: list[str] = []
    rows = leaderboard_rows(gather(folders, unread))
    write(FORMATS[format](leaderboards(rows)), out)
    sys.stdout.flush()
    for sentence in unread:
        logger.warning("left out: %s", sentence)
    return rows
