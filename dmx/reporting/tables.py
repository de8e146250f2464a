"""What a report works out of a run, and its tables, as texts that every format can lay out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmx.format import MISSING, duration, percent, scaled, short, short_names, with_spread
from dmx.reporting.published import CHANCE, TITLES, Published, column_of
from dmx.runs.events import base_name, settings_of
from dmx.runs.layout import PARAMETERS, PEAK_MEMORY_MB, STEP_SECONDS, TRAIN_SECONDS, attempt_folder
from dmx.runs.run import Run
from dmx.runs.stages import Attempt, Stage
from dmx.runs.trial import OBJECTIVES, ranked
from dmx.schema import flatten
from dmx.search.rungs import Brackets, Rung


@dataclass(frozen=True, kw_only=True)
class Table:
    """Texts in rows.

    Attributes:
        columns: titles. numeric: columns that are aligned to the right.
        styles: of each row: "best", "ours", "same" (the same attention), "group" (a heading) or "".
    """

    columns: tuple[str, ...]
    numeric: frozenset[int]
    rows: tuple[tuple[str, ...], ...]
    styles: tuple[str, ...]

    @property
    def styled(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """(row, its style) of each."""
        return zip(self.rows, self.styles, strict=True)

    def part(self, first: int, end: int | None = None) -> Table:
        """Some of the rows."""
        rows = slice(first, end)
        return dataclasses.replace(self, rows=self.rows[rows], styles=self.styles[rows])

    def markdown(self) -> str:
        """As markdown; what would be markup in a cell is escaped."""
        rules = ("---:" if i in self.numeric else "---" for i in range(len(self.columns)))
        lines = [_line(map(escape, self.columns)), "|" + "|".join(rules) + "|"]
        for row, style in self.styled:
            cells = [escape(c) for c in row]
            if style in ("best", "ours", "group"):
                cells = [f"**{cells[0]}**", *cells[1:]]
            lines.append(_line([*cells, *[""] * (len(self.columns) - len(cells))]))
        return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escape(text: str) -> str:
    """A text that markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(text).split()))


def make(
    columns: str, rows: Sequence[tuple[str, ...]], styles: Sequence[str] | None = None
) -> Table:
    """A table from titles divided by `|`; a title that starts with `>` is numeric."""
    titles = columns.split("|")
    return Table(
        columns=tuple(t.lstrip(">") for t in titles),
        numeric=frozenset(i for i, t in enumerate(titles) if t.startswith(">")),
        rows=tuple(rows),
        styles=tuple(styles or [""] * len(rows)),
    )


def trials_table(run: Run) -> Table:
    """One row a trial, the best first; values that never varied are left out."""
    names = list(settings_of(run.search.searched)) if run.search else []
    names += sorted({k for t in run.trials for k in t.params} - set(names))
    varied = [n for n in names if len({repr(t.params.get(n)) for t in run.trials}) > 1]
    rows, styles = [], []
    for trial in ranked(run.trials):
        rows.append(
            (
                str(trial.number),
                trial.status,
                percent(trial.best),
                f"{trial.steps:,}",
                *(short(trial.params.get(n, MISSING)) for n in varied),
                duration(trial.median(STEP_SECONDS)),
                duration(trial.last(TRAIN_SECONDS)),
                _memory(trial.highest(PEAK_MEMORY_MB)),
                scaled(trial.last(PARAMETERS)),
                *([trial.error] if any(t.error for t in run.trials) else []),
            )
        )
        styles.append("best" if trial.number == run.best else "")
    titles = "trial|status|>best dev acc., %|>steps" + "".join(
        f"|>{n}" for n in short_names(varied)
    )
    titles += "|>per step|>training|>memory|>params"
    return make(titles + ("|error" if any(t.error for t in run.trials) else ""), rows, styles)


def _memory(megabytes: float) -> str:
    return scaled(megabytes * 2**20, "B", 1024)


def front_table(run: Run) -> Table:
    """The Pareto front of a study with several objectives, the most accurate first."""
    front = study_front(run)
    trials = {t.number: t for t in run.trials}
    names = sorted({k for n in front for k in trials[n].params})
    rows = []
    for number in sorted(front, key=lambda n: (-front[n]["accuracy"], n)):
        values = [percent(v) if o == "accuracy" else short(v) for o, v in front[number].items()]
        params = (short(trials[number].params.get(n, MISSING)) for n in names)
        rows.append((str(number), *values, *params))
    labels = ["dev accuracy, %" if o == "accuracy" else OBJECTIVES[o].label for o in run.several]
    return make("|>".join(["trial", *labels, *short_names(names)]), rows)


def population_table(run: Run) -> Table:
    """Who took over whom, and with which settings; empty but for population based training."""
    rows = []
    for taken in run.takeovers:
        settings = ", ".join(f"{k} {short(v)}" for k, v in taken.params.items())
        rows.append((f"{taken.step:,}", str(taken.trial), str(taken.source), settings))
    return make(">step|>trial|>took over trial|and went on with", rows)


def stages_table(run: Run) -> Table:
    """One row an attempt at a stage of a curriculum."""
    rows, styles = [], []
    for stage in run.stages:
        for attempt in stage.attempts or (None,):
            first = attempt is None or attempt is stage.attempts[0]
            # Tests are those of the promoted weights.
            last = attempt is None or attempt.number == stage.promoted_attempt
            rows.append(
                (
                    stage.name if first else "",
                    _data_of(stage) if first else "",
                    stage.attention if first else "",
                    "" if attempt is None else str(attempt.number),
                    "" if attempt is None else f"{attempt.all_steps:,}",
                    "" if attempt is None else duration(attempt.all_seconds),
                    percent(stage.dev_accuracy if attempt is None else attempt.best),
                    percent(stage.test_accuracy) if last else "",
                    percent(stage.test_on_last) if last else "",
                    stage.progress if attempt is None else _verdict(stage, attempt),
                    "" if attempt is None else attempt.reason,
                    (stage.parent or "fresh weights") if first else "",
                )
            )
            styles.append("")
    titles = (
        "stage|task and data|attention|>attempt|>steps|>training|>best dev acc., %|>test acc., %"
    )
    titles += f"|>test of {run.goal}, %"
    return make(titles + "|gate|which rule fired|starts from", rows, styles)


def _data_of(stage: Stage) -> str:
    """The data's label, after the task where it does not name it."""
    return stage.data if stage.data.startswith(stage.task) else f"{stage.task} {stage.data}".strip()


def _verdict(stage: Stage, attempt: Attempt) -> str:
    if attempt.passed is None:
        return "open"
    if attempt.passed:
        return "passed"
    promoted = attempt.number == stage.promoted_attempt
    return "refused, promoted all the same" if promoted else "refused"


def searches_table(run: Run) -> Table:
    """One row an attempt at a stage that is a search: its best trial, which the gate judged."""
    rows = []
    for stage in run.stages:
        for attempt in stage.attempts:
            if (found := attempt.search) is None:
                continue
            names = short_names(list(found["params"]))
            values = zip(names, map(short, found["params"].values()), strict=True)
            folder = attempt_folder(run.folder, stage.name, attempt.number)
            rows.append(
                (
                    stage.name,
                    str(attempt.number),
                    f"{found['trial']} of {found['num_trials']}",
                    ", ".join(f"{name} {value}" for name, value in values),
                    f"{attempt.steps:,} of {attempt.all_steps:,}",
                    f"python -m dmx.report {folder}",
                )
            )
    return make("stage|>attempt|>best trial|its settings|>its steps|all trials", rows)


def ours(run: Run) -> str:
    """Our test accuracy in per cent, with its spread over seeds where there are several."""
    if run.finals is not None and run.finals.test_accuracies:
        return with_spread(run.finals.test_accuracies)
    return percent(run.test_accuracy)


def published_table(run: Run, published: Published, sources: set[str] | None = None) -> Table:
    """Published accuracies on the task of a run, ours on top; empty where nobody published."""
    column = column_of(run.task)
    rows: list[tuple[str, ...]] = []
    styles: list[str] = []
    if column is None:
        return make("model|>accuracy", rows, styles)
    seeds = len(run.finals.seeds) if run.finals else 1
    mark = "" if run.data == run.task else f" on {run.data}"
    accuracy = ours(run)
    remark = "no test yet" if accuracy == MISSING else f"{seeds} seed{'s' * (seeds > 1)}"
    rows.append((f"ours: {run.attention}{mark}", accuracy, remark))
    styles.append("ours")
    group = ""
    for row in published.of(column):
        if sources is not None and row.source not in sources:
            continue
        if row.source != group:
            group = row.source
            rows.append((published.sources[group].title, "", ""))
            styles.append("group")
        failed = column in row.chance
        value = f"{row.accuracies[column]:.2f}" if column in row.accuracies else MISSING
        remark = f"fails (chance is {CHANCE[column]:.0f} %)" if failed else ""
        rows.append((row.model, value, remark))
        styles.append("same" if row.attention == base_name(run.attention) else "")
    return make(f"model|>{TITLES[column]}, test accuracy %|", rows, styles)


def provenance(run: Run) -> Table:
    """Where the numbers come from: data, code, machine, settings of the search."""
    found: list[tuple[str, str]] = [
        (
            "data" + (f" of stage {run.shown}" if run.stages else ""),
            run.data + (" (sample)" if run.is_sample else ""),
        ),
        ("data checksum (SHA-256)", run.data_checksum or MISSING),
        ("folder", str(run.folder)),
    ]
    if run.init:
        found.append(("started from", f"{run.init['path']} (SHA-256 {run.init.get('sha256')})"))
    if run.search is not None:
        s = run.search
        asha = f"rungs from {s.grace_steps:,} steps, factor {s.reduction_factor:g}"
        found.append(("sampler, scheduler", f"{s.sampler}, {s.scheduler}"))
        if s.scheduler in ("asha", "hyperband"):
            found.append(({"asha": "ASHA", "hyperband": "Hyperband"}[s.scheduler], asha))
        if run.several:
            found.append(("objectives", ", ".join(run.several)))
        if s.warm_start:
            found.append(("warm start from", ", ".join(s.warm_start)))
        found.append(("seed of the search", short(s.seed)))
    env = run.environment
    names = {"dmx": "dmx", "code": "code (git)", "python": "Python", "torch": "torch"}
    names |= {"ray": "Ray", "optuna": "Optuna", "machine": "machine", "cpus": "CPU cores"}
    names |= {"device": "device", "precision": "precision", "threads": "CPU threads"}
    found += [(title, short(env[key])) for key, title in names.items() if key in env]
    if "gpus" in env:
        found.append(("GPUs", ", ".join(map(str, env["gpus"])) or "none"))
    if isinstance(env.get("argv"), list):
        found.append(("command", " ".join(map(str, env["argv"]))))
    if not env:
        found.append(("environment", "not recorded (the run has not ended, or is a single run)"))
    return make("what|value", found)


def config_table(config: Mapping[str, Any]) -> Table:
    """Every setting of the best configuration."""
    return make("setting|value", [(k, short(v)) for k, v in flatten(config).items()])


@dataclass(frozen=True)
class Costed:
    """A trial's number, its cost (less is better) and its accuracy (more is better)."""

    trial: int
    cost: float
    accuracy: float


def costed(run: Run, key: str) -> list[Costed]:
    """Whole trials with a finite accuracy and cost: the median step time, or the highest memory.

    A trial that was stopped early has another accuracy than it would have reached.
    """
    found = []
    for trial in run.whole:
        cost = trial.highest(key) if key == PEAK_MEMORY_MB else trial.median(key)
        if math.isfinite(cost) and math.isfinite(trial.best):
            found.append(Costed(trial.number, cost, trial.best))
    return found


def front(points: Sequence[Costed]) -> list[Costed]:
    """The points that no other point beats, cheapest first.

    A point is beaten by one that is no dearer and no less accurate, and better in one of the two;
    of equal points the earlier trial stays.
    """
    kept: list[Costed] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy, p.trial)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return kept


def against(run: Run, objective: str) -> list[Costed]:
    """Whole trials with their accuracy and another objective of the study."""
    found = [Costed(t.number, OBJECTIVES[objective].of(t), t.best) for t in run.whole]
    return [c for c in found if math.isfinite(c.cost) and math.isfinite(c.accuracy)]


def study_front(run: Run) -> dict[int, dict[str, float]]:
    """{trial: {objective: value}} of a study's own front; empty where it has one objective."""
    return {t.number: t.values for t in run.best_trials} if run.several else {}


def filled_rungs(run: Run) -> list[Rung]:
    """The rungs of a study, from its journal; none where it did not stop trials early.

    Hyperband has rungs in each of its brackets, bracket 0 first.
    """
    search = run.search
    if search is None or search.scheduler not in ("asha", "hyperband"):
        return []
    brackets = Brackets(
        search.scheduler,
        grace_steps=search.grace_steps,
        max_steps=search.max_steps,
        reduction_factor=search.reduction_factor,
    )
    brackets.fill(reports_of(run))
    return brackets.rungs


def rungs_table(run: Run, rungs: Sequence[Rung]) -> Table:
    """One row a rung."""
    factor = run.search.reduction_factor if run.search is not None else 1.0
    several = any(rung.bracket for rung in rungs)
    rows = []
    for rung in rungs:
        went_on = [str(e.trial) for e in rung.entries if e.promoted]
        stopped = [str(e.trial) for e in rung.entries if not e.promoted]
        cutoff = rung.cutoff(factor)
        bracket = (str(rung.bracket),) if several else ()
        rows.append(
            (
                *bracket,
                f"{rung.steps:,.0f}",
                str(len(rung.entries)),
                ", ".join(went_on) or MISSING,
                ", ".join(stopped) or MISSING,
                MISSING if cutoff is None else percent(cutoff),
            )
        )
    titles = ">steps|>reached by|went on (trials)|stopped (trials)|>next must reach, %"
    return make((">bracket|" if several else "") + titles, rows)


def rungs_title(run: Run) -> str:
    """Whose rungs they are."""
    hyperband = run.search is not None and run.search.scheduler == "hyperband"
    return "Hyperband's rungs" if hyperband else "ASHA's rungs"


def reports_of(run: Run) -> list[tuple[int, float, float]]:
    """(trial, step, dev accuracy) of each report of a study, in the order of recording."""
    return [(r.trial, r.step, r.dev_accuracy) for r in run.history]


def best_so_far(history: Iterable[tuple[int, float, float]]) -> list[tuple[float, float]]:
    """(optimizer steps of all trials together, best accuracy so far) after each report.

    Args:
        history: (trial, step, accuracy) in the order of recording; steps count within a trial.
    """
    reached: dict[int, float] = {}
    points: list[tuple[float, float]] = []
    best, total = -math.inf, 0.0
    for trial, step, accuracy in history:
        total += max(step - reached.get(trial, 0.0), 0.0)
        reached[trial] = max(step, reached.get(trial, 0.0))
        best = max(best, accuracy) if math.isfinite(accuracy) else best
        if math.isfinite(best):
            points.append((total, best))
    return points
