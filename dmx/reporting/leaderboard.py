"""The leaderboard: runs grouped by what they measured, and their accuracies over seeds."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmx.format import MISSING, duration, mean_and_deviation, percent, scaled
from dmx.reporting import export
from dmx.reporting.caveats import budget_differences
from dmx.reporting.published import COLUMNS, column_of
from dmx.reporting.tables import Table, escape, make
from dmx.runs.folders import kind_of, load_all, runs_below
from dmx.runs.layout import PARAMETERS, PEAK_MEMORY_MB, STEP_SECONDS
from dmx.runs.run import Run
from dmx.schema import finite, flatten
from dmx.tasks import find_task

logger = logging.getLogger("dmx.leaderboard")

MARKS = {
    "†": "steps or batch size are not the task preset's",
    "‡": "a run of it has not ended",
    "*": "of a search: the best trial's one seed, which its search chose",
    "§": "started from the weights of another run",
    "¶": "its runs ran different code, or code with changes that no commit holds",
}
_SEEDS = ("train.seed", "data.seed")
_FREE = (*_SEEDS, "data.root", "train.device", "train.compile", "init.path")
"""Settings in which runs of one entry may differ; of a file of weights its content decides."""


@dataclass(frozen=True, kw_only=True)
class LeaderboardRow:
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
        memory_of: see Run.
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
    def marks(self) -> str:
        """Those of MARKS that hold for it."""
        one_seed = "search" in self.how and len(self.test) == 1
        marks = "†" * self.reduced + "‡" * self.incomplete + "*" * one_seed
        return marks + "§" * bool(self.init) + "¶" * self.mixed_code

    @property
    def mean(self) -> float:
        """Mean test accuracy, or NaN."""
        return mean_and_deviation(self.test)[0]

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds; NaN for one seed."""
        return mean_and_deviation(self.test)[1]


@dataclass(frozen=True)
class Leaderboard:
    """A table of attentions x tasks for one kind of data.

    Attributes:
        title: says which. columns: tasks, or the data's labels where those say more.
    """

    title: str
    is_sample: bool
    columns: tuple[str, ...]
    attentions: tuple[str, ...]
    rows: tuple[LeaderboardRow, ...]

    def cell(self, attention: str, column: str) -> LeaderboardRow | None:
        """The entry to show: of several the one with the best mean dev accuracy, tested ones first.

        The choice never looks at test accuracies.
        """
        found = [e for e in self.rows if (e.attention, _column(e)) == (attention, column)]

        def rank(entry: LeaderboardRow) -> tuple[bool, bool, bool, float]:
            dev = mean_and_deviation(entry.dev)[0]
            dev = dev if math.isfinite(dev) else -1.0
            return (bool(entry.test), not entry.reduced, not entry.init, dev)

        return max(found, key=rank) if found else None

    @property
    def heading(self) -> str:
        """The title as a heading."""
        return self.title[0].upper() + self.title[1:]

    def cells(self) -> Table:
        """Attentions x tasks."""
        rows = [(a, *(cell_text(self.cell(a, c)) for c in self.columns)) for a in self.attentions]
        return make("attention|>" + "|>".join(self.columns), rows)

    def notes(self) -> list[str]:
        """What the cells say, and what their marks mean."""
        shown = "".join(cell for row in self.cells().rows for cell in row[1:])
        notes = ["Test accuracy in per cent: mean ± standard deviation (number of seeds)."]
        return notes + [f"{mark} {text}." for mark, text in MARKS.items() if mark in shown]

    def costs(self) -> Table:
        """Every row, with what it cost."""
        titles = (
            "task|attention|how|>test acc., %|>std|>seeds|>dev acc., %|>steps|>parameters|>per step"
            "|>peak memory|of|runs"
        )
        return make(titles, [_costs(row) for row in self.rows])


def gather(paths: Sequence[Path], unread: list[str] | None = None) -> list[Run]:
    """Every run at or directly below the paths, each once.

    Args:
        unread: takes a sentence for each that could not be read.

    Raises:
        ConfigError: a path holds no run. DmxError: no run could be read.
    """
    folders: dict[Path, None] = {}
    asked = {path.resolve() for path in paths}
    for path in paths:
        inside = [] if kind_of(path) is not None else runs_below(path)
        for folder in inside or [path]:
            folders[folder.resolve()] = None
    found, errors = load_all(list(folders))
    if not found:
        raise errors[0]
    if unread is not None:
        unread.extend(map(str, errors))
    return [run for run in found if run.folder in asked or not _came_to_nothing(run)]


def _came_to_nothing(run: Run) -> bool:
    """Whether a run failed, or was stopped, before it had anything to compare."""
    return run.kind == "run" and run.best_trial is None


def leaderboard_rows(runs: Iterable[Run]) -> list[LeaderboardRow]:
    """One row per configuration and task; runs that differ in seeds alone share one.

    Precision is that which was used: `auto` is another one on a GPU than on a CPU.
    """
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
    precision = run.environment.get("precision")
    text = json.dumps(
        [run.data, run.data_checksum, precision, settings], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _row(group: Sequence[Run]) -> LeaderboardRow:
    first = group[0]
    tests: list[float] = []
    devs: list[float] = []
    single: dict[str, list[Run]] = {}
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
    return LeaderboardRow(
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


def _seeds(run: Run) -> str:
    """What tells the runs of one entry apart; runs that are equal in it are repetitions."""
    settings = flatten(run.config or {})
    return str([settings.get(key) for key in _SEEDS])


def leaderboards(found: Sequence[LeaderboardRow]) -> list[Leaderboard]:
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


def _is_published(entry: LeaderboardRow) -> bool:
    task = find_task(entry.task)
    return task is not None and task.published is not None


def _column(entry: LeaderboardRow) -> str:
    """Generated and partial data go by their label, which says how many examples there are."""
    return entry.task if entry.is_sample else entry.data


def _board(title: str, is_sample: bool, some: Sequence[LeaderboardRow]) -> Leaderboard:
    return Leaderboard(
        title=title,
        is_sample=is_sample,
        columns=tuple(dict.fromkeys(_column(e) for e in sorted(some, key=_by_task))),
        attentions=tuple(sorted({e.attention for e in some}, key=_natural)),
        rows=tuple(sorted(some, key=lambda e: (_by_task(e), _natural(e.attention), e.runs))),
    )


def _by_task(entry: LeaderboardRow) -> tuple[int, str, str]:
    column = column_of(entry.task)
    return (COLUMNS.index(column) if column else len(COLUMNS), entry.task, entry.data)


def _natural(label: str) -> tuple[str, int, str]:
    """butterfly-64 before butterfly-256."""
    name, _, size = label.rpartition("-")
    return (name, int(size), label) if size.isdecimal() else (label, 0, label)


def cell_text(row: LeaderboardRow | None) -> str:
    """`64.20 ± 0.31 (3)`, with its marks."""
    if row is None or not row.test:
        return MISSING + ("" if row is None else row.marks)
    spread = f" ± {percent(row.deviation)}" if math.isfinite(row.deviation) else ""
    seeds = f" ({len(row.test)})" if len(row.test) > 1 else ""
    return f"{percent(row.mean)}{spread}{seeds}{row.marks}"


def _costs(row: LeaderboardRow) -> tuple[str, ...]:
    return (
        row.task,
        row.attention,
        f"{row.how}, from {row.init}" if row.init else row.how,
        percent(row.mean) + row.marks,
        percent(row.deviation),
        str(len(row.test)),
        percent(mean_and_deviation(row.dev)[0]),
        f"{row.steps:,}",
        scaled(row.parameters),
        duration(row.step_seconds),
        scaled(row.memory_mb * 2**20, "B", 1024),
        row.memory_of or MISSING,
        ", ".join(row.runs),
    )


def to_markdown(found: Sequence[Leaderboard]) -> str:
    """A table of attentions x tasks and one of costs, for each kind of data."""
    parts = ["# Leaderboard"]
    for board in found:
        parts.append(f"## {escape(board.heading)}")
        if board.is_sample:
            parts.append("**Not LRA: these numbers compare only with each other.**")
        parts += [board.cells().markdown(), *map(escape, board.notes()), board.costs().markdown()]
    return "\n\n".join(parts) + "\n"


def to_html(found: Sequence[Leaderboard]) -> str:
    """The same as a page that needs no network and no scripts."""
    from dmx.reporting.page import render

    return render("Leaderboard", boards=found)


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "*": r"$^\ast$",
    "§": r"$^\S$",
    "¶": r"$^\P$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{c: "\\" + c for c in "#$%&_"},
}
_LATEX_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))


def latex_escape(text: str) -> str:
    """A text that LaTeX sets as it is."""
    return _LATEX_SPECIAL.sub(lambda found: _LATEX[found[0]], " ".join(text.split()))


def to_latex(found: Sequence[Leaderboard]) -> str:
    """One `table` for each kind of data, with booktabs rules."""
    import pandas as pd

    parts = []
    for board in found:
        cells = board.cells()
        warning = "Not LRA. " if board.is_sample else ""
        notes = (f"{warning}{board.heading}.", *board.notes())
        frame = pd.DataFrame(cells.rows).map(latex_escape)
        frame.columns = pd.Index([latex_escape(title) for title in cells.columns])
        parts.append(
            frame.style.hide(axis="index").to_latex(
                column_format="l" + "r" * len(board.columns),
                hrules=True,
                position_float="centering",
                caption=" ".join(map(latex_escape, notes)),
            )
        )
    return "\n".join(parts)


def _values(row: LeaderboardRow) -> dict[str, Any]:
    """A row's numbers; accuracies in 0..1."""
    return {
        "data": row.data,
        "is_sample": row.is_sample,
        "task": row.task,
        "attention": row.attention,
        "how": row.how,
        "init_from": row.init,
        "code": " ".join(row.code),
        "test_accuracy_mean": row.mean,
        "test_accuracy_std": row.deviation,
        "seeds": len(row.test),
        "dev_accuracy_mean": mean_and_deviation(row.dev)[0],
        "steps": row.steps,
        "parameters": row.parameters,
        "step_seconds": row.step_seconds,
        "peak_memory_mb": row.memory_mb,
        "memory_of": row.memory_of,
        "reduced_budget": row.reduced,
        "complete": not row.incomplete,
        "runs": " ".join(row.runs),
    }


def to_csv(found: Sequence[Leaderboard]) -> str:
    """One line per row of all tables."""
    return export.csv([_values(row) for board in found for row in board.rows])


def to_json(found: Sequence[Leaderboard]) -> str:
    """The same with every seed's accuracy and every run's name."""
    rows = [_values(row) | asdict(row) for board in found for row in board.rows]
    return json.dumps(finite(rows), indent=1, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Leaderboard]], str]] = {
    "md": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
    "html": to_html,
    "json": to_json,
}


def write_leaderboard(
    folders: Sequence[Path], format: str = "md", out: str | None = None
) -> list[LeaderboardRow]:
    """Compare all runs in the folders; runs that cannot be read are warned of.

    Args:
        folders: runs, or folders of runs. format: one of FORMATS. out: a file; None or "-" for
            stdout.

    Raises:
        ConfigError: a folder holds no run, or the file cannot be written. DmxError: no run could
            be read.
    """
    unread: list[str] = []
    found = leaderboard_rows(gather(folders, unread))
    export.write(FORMATS[format](leaderboards(found)), out)
    sys.stdout.flush()
    for sentence in unread:
        logger.warning("left out: %s", sentence)
    return found
