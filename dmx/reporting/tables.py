"""What a report works out of a run, and its tables, as texts that every format can lay out."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dmx.format import (
    MISSING,
    duration,
    percent,
    scaled,
    settings_text,
    short,
    short_names,
    with_spread,
)
from dmx.reporting.published import CHANCE, COLUMNS, column_of, load_published
from dmx.runs import layout
from dmx.runs.curriculum import Attempt, Stage
from dmx.runs.events import base_name, settings_of
from dmx.runs.layout import PARAMETERS, PEAK_MEMORY_MB, STEP_SECONDS, TRAIN_SECONDS
from dmx.runs.run import Run
from dmx.runs.trial import ACCURACY, OBJECTIVES, Trial, ranked
from dmx.schema import flatten
from dmx.search.rungs import Rung, SuccessiveHalving

NEAR = ("lra", "nystromformer", "flashattention")
"""Sources whose models are like ours."""


class Table:
    """Texts in rows.

    Args:
        rows: title -> cell; the cells of a title that begins with `>` are aligned to the right.
        styles: of each row: "best", "ours", "same" (the same attention), "group" (a heading) or "".

    Attributes:
        numeric: columns that are aligned to the right.
    """

    def __init__(self, rows: Sequence[Mapping[str, str]], styles: Sequence[str] = ()) -> None:
        titles = list(rows[0]) if rows else []
        self.columns = tuple(title.removeprefix(">") for title in titles)
        self.numeric = {i for i, title in enumerate(titles) if title.startswith(">")}
        self.rows = [tuple(row.values()) for row in rows]
        self.styles = list(styles) or [""] * len(rows)

    def part(self, first: int, end: int | None = None) -> list[tuple[tuple[str, ...], str]]:
        """(row, its style) of some of the rows."""
        return list(zip(self.rows, self.styles, strict=True))[first:end]


def trials_table(run: Run) -> Table:
    """One row a trial, the best first; values that never varied are left out."""
    names = list(settings_of(run.search.searched)) if run.search else []
    names += sorted({k for t in run.trials for k in t.params} - set(names))
    varied = [n for n in names if len({repr(t.params.get(n)) for t in run.trials}) > 1]
    titles = dict(zip(short_names(varied), varied, strict=True))
    failed = any(t.error for t in run.trials)
    trials, best = ranked(run.trials), run.best
    rows = [
        {
            "trial": str(t.number),
            "status": t.status,
            ">best dev acc., %": percent(t.best),
            ">steps": f"{t.steps:,}",
            **{f">{title}": short(t.params.get(n, MISSING)) for title, n in titles.items()},
            ">per step": duration(t.median(STEP_SECONDS)),
            ">training": duration(t.last(TRAIN_SECONDS)),
            ">memory": scaled(t.highest(PEAK_MEMORY_MB) * 2**20, "B", 1024),
            ">params": scaled(t.last(PARAMETERS)),
            **({"error": t.error} if failed else {}),
        }
        for t in trials
    ]
    return Table(rows, ["best" if t.number == best else "" for t in trials])


def front_table(run: Run) -> Table:
    """The Pareto front of a study with several objectives, the most accurate first."""
    names = sorted({k for t in run.best_trials for k in t.params})
    titles = dict(zip(short_names(names), names, strict=True))
    rows = []
    for trial in ranked(run.best_trials) if run.several else ():
        values = trial.values
        costs = {f">{OBJECTIVES[o].label}": short(values[o]) for o in run.several if o != ACCURACY}
        params = {f">{title}": short(trial.params.get(n, MISSING)) for title, n in titles.items()}
        accuracy = {">dev accuracy, %": percent(values[ACCURACY])}
        rows.append({"trial": str(trial.number), **accuracy, **costs, **params})
    return Table(rows)


def population_table(run: Run) -> Table:
    """Who took over whom, and with which settings; empty but for population based training."""
    return Table(
        [
            {
                ">step": f"{taken.step:,}",
                ">trial": str(taken.trial),
                ">took over trial": str(taken.source),
                "and went on with": settings_text(taken.params),
            }
            for taken in run.takeovers
        ]
    )


def stages_table(run: Run) -> Table:
    """One row an attempt at a stage of a curriculum; a stage's own facts stand at its first."""
    rows = []
    for stage in run.stages:
        data = stage.data if stage.data.startswith(stage.task) else f"{stage.task} {stage.data}"
        for attempt in stage.attempts or (None,):
            first = attempt is None or attempt is stage.attempts[0]
            # Tests are those of the promoted weights.
            tested = attempt is None or attempt.number == stage.promoted_attempt
            rows.append(
                {
                    "stage": stage.name if first else "",
                    "task and data": data.strip() if first else "",
                    "attention": stage.attention if first else "",
                    ">attempt": str(attempt.number) if attempt else "",
                    ">steps": f"{attempt.all_steps:,}" if attempt else "",
                    ">training": duration(attempt.all_seconds) if attempt else "",
                    ">best dev acc., %": percent(attempt.best if attempt else stage.dev_accuracy),
                    ">test acc., %": percent(stage.test_accuracy) if tested else "",
                    f">test of {run.goal}, %": percent(stage.test_on_last) if tested else "",
                    "gate": _verdict(stage, attempt) if attempt else stage.progress,
                    "which rule fired": attempt.reason if attempt else "",
                    "starts from": (stage.parent or "fresh weights") if first else "",
                }
            )
    return Table(rows)


def _verdict(stage: Stage, attempt: Attempt) -> str:
    if attempt.passed is False and attempt.number == stage.promoted_attempt:
        return "refused, promoted all the same"
    return {None: "open", True: "passed", False: "refused"}[attempt.passed]


def searches_table(run: Run) -> Table:
    """One row an attempt at a stage that is a search: its best trial, which the gate judged."""
    return Table(
        [
            {
                "stage": stage.name,
                ">attempt": str(attempt.number),
                ">best trial": f"{found['trial']} of {found['num_trials']}",
                "its settings": settings_text(found["params"]),
                ">its steps": f"{attempt.steps:,} of {attempt.all_steps:,}",
                "all trials": "python -m dmx.report "
                f"{layout.attempt_folder(run.folder, stage.name, attempt.number)}",
            }
            for stage in run.stages
            for attempt in stage.attempts
            if (found := attempt.search) is not None
        ]
    )


def describe_trial(trial: Trial) -> str:
    """Its number, accuracy, steps and settings."""
    settings = settings_text(trial.params)
    return f"trial {trial.number}: {percent(trial.best)} %, {trial.steps:,} steps; {settings}"


def our_accuracy(run: Run) -> str:
    """Our test accuracy in per cent, with its spread over seeds where there are several."""
    if run.finals is not None and run.finals.test_accuracies:
        return with_spread(run.finals.test_accuracies)
    return percent(run.test_accuracy)


def published_table(run: Run, sources: Collection[str] | None = None) -> Table:
    """Published accuracies on the task of a run, ours on top; empty where nobody published."""
    published = load_published()
    column = column_of(run.task)
    if column is None:
        return Table([])
    titles = ("model", f">{COLUMNS[column].title}, test accuracy %", "")
    seeds = len(run.finals.seeds) if run.finals else 1
    accuracy = our_accuracy(run)
    remark = "no test yet" if accuracy == MISSING else f"{seeds} seed{'s' * (seeds > 1)}"
    mark = "" if run.data == run.task else f" on {run.data}"
    rows = [(f"ours: {run.attention}{mark}", accuracy, remark)]
    styles = ["ours"]
    group = ""
    for row in published.of(column):
        if sources is not None and row.source not in sources:
            continue
        if row.source != group:
            group = row.source
            rows.append((published.sources[group].title, "", ""))
            styles.append("group")
        value = f"{row.accuracies[column]:.2f}" if column in row.accuracies else MISSING
        remark = f"fails (chance is {CHANCE[column]:.0f} %)" if column in row.chance else ""
        rows.append((row.model, value, remark))
        styles.append("same" if row.attention == base_name(run.attention) else "")
    return Table([dict(zip(titles, row, strict=True)) for row in rows], styles)


_ENVIRONMENT = {
    **{"dmx": "dmx", "code": "code (git)", "python": "Python", "torch": "torch", "ray": "Ray"},
    **{"optuna": "Optuna", "machine": "machine", "cpus": "CPU cores", "device": "device"},
    **{"precision": "precision", "threads": "CPU threads"},
}


def provenance(run: Run) -> Table:
    """Where the numbers come from: data, code, machine, settings of the search."""
    found = {
        f"data of stage {run.shown}" if run.stages else "data": run.data
        + " (sample)" * run.is_sample,
        "data checksum (SHA-256)": run.data_checksum or MISSING,
        "folder": str(run.folder),
    }
    if run.init:
        found["started from"] = f"{run.init['path']} (SHA-256 {run.init.get('sha256')})"
    if (s := run.search) is not None:
        found["sampler, scheduler"] = f"{s.sampler}, {s.scheduler}"
        if s.scheduler in _HALVING:
            rungs = f"rungs from {s.grace_steps:,} steps, factor {s.reduction_factor:g}"
            found[_HALVING[s.scheduler]] = rungs
        if run.several:
            found["objectives"] = ", ".join(run.several)
        if s.warm_start:
            found["warm start from"] = ", ".join(s.warm_start)
        found["seed of the search"] = short(s.seed)
    env = run.environment
    found |= {title: short(env[key]) for key, title in _ENVIRONMENT.items() if key in env}
    if "gpus" in env:
        found["GPUs"] = ", ".join(map(str, env["gpus"])) or "none"
    if isinstance(env.get("argv"), list):
        found["command"] = " ".join(map(str, env["argv"]))
    if not env:
        found["environment"] = "not recorded (the run has not ended, or is a single run)"
    return Table([{"what": what, "value": value} for what, value in found.items()])


def config_table(run: Run) -> Table:
    """Every setting of the best configuration."""
    return Table([{"setting": k, "value": short(v)} for k, v in flatten(run.config or {}).items()])


def samples_table(run: Run) -> Table:
    """What the best checkpoint says about its sample examples; empty where it has none."""
    unfinished = not run.complete and run.kind == "study"
    folder = run.checkpoint if unfinished else run.folder / layout.BEST_DIR
    try:
        found = json.loads((folder / layout.SAMPLES_FILE).read_text("utf-8"))
        names = ("indices", "labels", "predictions", "probabilities")
        rows = [
            {
                "example of the dev split": str(index),
                ">label": str(label),
                ">the model says": str(said),
                ">with probability, %": percent(p[said], 1),
                "right": "yes" if said == label else "no",
            }
            for index, label, said, p in zip(*(found[name] for name in names), strict=True)
        ]
    except (OSError, ValueError, LookupError, TypeError):  # a view: it is not what a report is for
        rows = []
    return Table(rows)


@dataclass(frozen=True)
class Costed:
    """A trial's number, its cost (less is better) and its accuracy (more is better)."""

    trial: int
    cost: float
    accuracy: float


def costed(run: Run, name: str) -> list[Costed]:
    """Whole trials with a finite accuracy and cost.

    A trial that was stopped early has another accuracy than it would have reached.

    Args:
        name: an objective, or a metric: its median, of the memory the highest.
    """

    def cost(trial: Trial) -> float:
        if name in OBJECTIVES:
            return OBJECTIVES[name].of(trial)
        return trial.highest(name) if name == PEAK_MEMORY_MB else trial.median(name)

    found = (Costed(t.number, cost(t), t.best) for t in run.whole)
    return [c for c in found if math.isfinite(c.cost) and math.isfinite(c.accuracy)]


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


_HALVING = {"asha": "ASHA", "hyperband": "Hyperband"}
"""The schedulers that stop trials at rungs."""


def filled_rungs(run: Run) -> list[Rung]:
    """The rungs of a study, bracket 0 first; none where it did not stop trials early."""
    search = run.search
    if search is None or search.scheduler not in _HALVING:
        return []
    scheduler = SuccessiveHalving(search)
    scheduler.fill(run.history)
    return scheduler.rungs


def rungs_table(run: Run, rungs: Sequence[Rung]) -> Table:
    """One row a rung."""
    factor = run.search.reduction_factor if run.search is not None else 1.0
    several = any(rung.bracket for rung in rungs)
    rows = []
    for rung in rungs:
        went_on = [str(e.trial) for e in rung.entries if e.promoted]
        stopped = [str(e.trial) for e in rung.entries if not e.promoted]
        cutoff = rung.cutoff(factor)
        rows.append(
            {
                **({">bracket": str(rung.bracket)} if several else {}),
                ">steps": f"{rung.steps:,.0f}",
                ">reached by": str(len(rung.entries)),
                "went on (trials)": ", ".join(went_on) or MISSING,
                "stopped (trials)": ", ".join(stopped) or MISSING,
                ">next must reach, %": MISSING if cutoff is None else percent(cutoff),
            }
        )
    return Table(rows)


def rungs_title(run: Run) -> str:
    """Whose rungs they are."""
    return f"{_HALVING.get(run.search.scheduler if run.search else '', 'ASHA')}'s rungs"


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
