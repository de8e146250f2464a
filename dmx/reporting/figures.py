"""The figures of a report: which values of a run are drawn, and what each figure says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from dmx.format import percent, short, short_names
from dmx.reporting.chart import COLOURS, Chart, Figure, clean, drawing
from dmx.reporting.importance import Importances
from dmx.reporting.tables import (
    best_so_far,
    costed,
    describe_trial,
    front,
    reports_of,
    rungs_title,
)
from dmx.runs.layout import (
    DEV_ACCURACY,
    LEARNING_RATE,
    PEAK_MEMORY_MB,
    STEP_SECONDS,
    STEPS,
    TRAIN_LOSS,
)
from dmx.runs.run import Run
from dmx.runs.trial import ACCURACY, OBJECTIVES, Trial, number
from dmx.schema import flatten
from dmx.search.rungs import Rung

_MANY_POINTS = 24
"""Beyond so many, points carry no numbers."""
_MEANINGS = {
    "best": "best trial",
    "complete": "full budget",
    "pruned": "stopped early",
    "running": "not ended",
    "failed": "failed",
}


def _styles(run: Run) -> dict[int, str]:
    """Trial -> how it is drawn."""
    best = run.best
    return {t.number: "best" if t.number == best else t.status.lower() for t in run.trials}


def _key(styles: Iterable[str], kind: str = "point") -> tuple[tuple[str, str], ...]:
    used = set(styles)
    return tuple((f"{kind} {s}", words) for s, words in _MEANINGS.items() if s in used)


def curves(run: Run) -> list[Figure]:
    """How a study, or a single run, went."""
    if run.kind == "curriculum" or not any(t.reports for t in run.trials):
        return []
    found = [
        learning_curves(run, DEV_ACCURACY, "dev accuracy, %", 100),
        learning_curves(run, TRAIN_LOSS, "training loss"),
    ]
    if run.kind == "run":
        return [*found, learning_curves(run, LEARNING_RATE, "learning rate")]
    more = best_for_compute(run)
    return [optimisation_history(run), *found, *([more] if more else [])]


@drawing()
def optimisation_history(run: Run) -> Figure:
    """Accuracy by trial number, and the best so far."""
    styles, scored = _styles(run), _scored(run)
    last = max((t.number for t in run.trials), default=0)
    chart = Chart("Optimisation history", "trial, in the order of proposal", "best dev accuracy, %")
    chart.whole_x(-0.5, last + 0.5)
    best, so_far = -math.inf, []
    for trial in scored:
        best = max(best, 100 * trial.best)
        so_far.append((trial.number, best))
    chart.line([*so_far, (last, best)], "best", steps=True, alpha=0.5, linewidth=1.3)
    chart.points((t.number, 100 * t.best, styles[t.number], describe_trial(t)) for t in scored)
    caption = (
        "Each point is a trial; the line is the best so far. It goes flat when further trials stop "
        "helping."
    )
    return Figure(chart.svg(), caption, _key(styles[t.number] for t in scored))


@drawing()
def learning_curves(run: Run, metric: str, label: str, scale: float = 1.0) -> Figure:
    """A metric against optimizer steps, the best trial on top."""
    curves = [
        (t, [(number(r, STEPS), scale * number(r, metric)) for r in t.reports]) for t in run.trials
    ]
    drawn = [(t, c) for t, c in curves if any(math.isfinite(y) for _, y in c)]
    styles = _styles(run)
    chart = Chart(f"{label} against steps", "optimizer steps", label)
    chart.whole_x(0, max((x for _, c in drawn for x, _ in c), default=1) or 1)
    single = len(run.trials) == 1
    for trial, curve in drawn:
        style = styles[trial.number]
        faint = style != "best" and len(drawn) > 6
        chart.line(curve, style, describe_trial(trial), alpha=0.5 if faint else 1)
        if len(curve) == 1 or single:
            chart.points(((x, y, style, f"step {x:,.0f}: {y:.4g}") for x, y in curve), size=5)
    classes = flatten(run.config or {}).get("model.num_classes")
    if metric == DEV_ACCURACY and isinstance(classes, int) and classes:
        chart.level(scale / classes, "chance")
    key = () if single else _key((styles[t.number] for t, _ in drawn), "line")
    return Figure(chart.svg(), f"{label[0].upper()}{label[1:]}, at every evaluation.", key)


@drawing()
def best_for_compute(run: Run) -> Figure | None:
    """The best accuracy so far against the optimizer steps of all trials together."""
    points = best_so_far(reports_of(run))
    if not points:
        return None
    chart = Chart("Best so far", "optimizer steps, all trials together", "best so far, %")
    chart.whole_x(0, points[-1][0])
    chart.line([(s, 100 * a) for s, a in points], "best", steps=True)
    return Figure(chart.svg(), "What the whole search had found for its compute.")


@drawing()
def stage_curves(run: Run) -> Figure | None:
    """Dev accuracy of all stages, one after another; attempts that a gate refused are dashed."""
    attempts = [(s, a) for s in run.stages for a in s.attempts if a.reports]
    if not attempts:
        return None
    across = "optimizer steps, stage after stage"
    chart = Chart("Learning curves of the stages", across, "dev accuracy, %", width=960)
    start, before = 0.0, ""
    for stage, attempt in attempts:
        style = "pruned" if attempt.passed is False else "complete"
        points = [
            (start + number(r, STEPS), 100 * number(r, DEV_ACCURACY)) for r in attempt.reports
        ]
        tip = f"{stage.name}, attempt {attempt.number}"
        chart.line(points, style, tip)
        chart.points([(*points[0], style, tip)], size=5)
        if stage.name != before:
            chart.axes.axvline(start, color=COLOURS["rule"], linewidth=1)
            place: dict[str, Any] = {"transform": chart.axes.get_xaxis_transform(), "va": "top"}
            name = f" {clean(stage.name)}"
            chart.axes.text(start, 0.98, name, rotation=90, fontsize=10, **place)
        start, before = start + max(number(attempt.reports[-1], STEPS), 1.0), stage.name
    chart.whole_x(0, start)
    caption = (
        "Each stage begins with its parent's weights. A stage's name stands at its first step. "
        "Of a search the best trial is drawn."
    )
    key = (("line complete", "passed or open"), ("line pruned", "refused by its gate"))
    return Figure(chart.svg(), caption, key)


@drawing()
def importance_bars(found: Importances) -> Figure | None:
    """Shares of each hyperparameter; None where there are none."""
    if not found.values:
        return None
    names, shares = [clean(n) for n in found.values], [100 * v for v in found.values.values()]
    chart = Chart(
        "Hyperparameter importances",
        "share, %",
        width=600,
        height=60 + 26 * len(names),
        left=min(max(map(len, names)) * 7 + 14, 300),
    )
    bars = chart.axes.barh(range(len(names)), shares, height=0.6, color=COLOURS["complete"])
    chart.axes.bar_label(bars, [f"{s:.0f} %" for s in shares], padding=4)
    chart.axes.set_yticks(range(len(names)), names)
    chart.axes.set_xlim(0, max(shares) * 1.12)
    chart.axes.set_ylim(len(names) - 0.4, -0.5)
    chart.axes.grid(visible=False)
    return Figure(chart.svg(), found.text)


def _places(drawn: Sequence[Any], spec: Sequence[Any]) -> tuple[list[float], list[str]]:
    """Where drawn values lie on their axis; of a choice at 0, 1, 2, ..., and the options' names."""
    kind, *values = spec
    if kind != "choice":
        return [float(v) for v in drawn], []
    options = {repr(option): short(option) for option in [*values, *drawn]}
    return [float(list(options).index(repr(v))) for v in drawn], list(options.values())


def slices(run: Run) -> list[Figure]:
    """Accuracy against each searched value."""
    searched = run.search.searched if run.search is not None else {}
    return [_slice(run, name, s, t) for name, s in searched.items() if (t := _scored(run, [name]))]


def _scored(run: Run, names: Iterable[str] = ()) -> list[Trial]:
    """The trials that have an accuracy, and all of the named values."""
    return [t for t in run.trials if math.isfinite(t.best) and set(names) <= set(t.drawn)]


@drawing()
def _slice(run: Run, name: str, spec: Sequence[Any], trials: Sequence[Trial]) -> Figure:
    kind, *values = spec
    at, options = _places([t.drawn[name] for t in trials], spec)
    chart = Chart(
        f"Accuracy against {name}", name, "best dev acc., %", width=330, height=220, left=62
    )
    if options:
        chart.names_x(options)
    else:
        log, whole = kind.startswith("log"), kind.endswith("int")
        chart.range_x([*at, *map(float, values)], log=log, whole=whole, count=4)
    styles = _styles(run)
    chart.points(
        (x, 100 * t.best, styles[t.number], describe_trial(t))
        for t, x in zip(trials, at, strict=True)
    )
    return Figure(chart.svg())


@drawing()
def parallel_view(run: Run) -> Figure | None:
    """Each trial as a line through its values and its accuracy; None of fewer than two values."""
    searched = run.search.searched if run.search is not None else {}
    trials = _scored(run, searched)
    if len(searched) < 2 or len(trials) < 3:
        return None
    columns: list[tuple[list[float], str, str]] = []
    for name, spec in searched.items():
        kind, *values = spec
        places, options = _places([t.drawn[name] for t in trials], spec)
        ends = [0.0, len(options) - 1.0] if options else [float(v) for v in values]
        low, high = min(*places, *ends), max(*places, *ends)
        on = math.log if kind.startswith("log") else float
        span = on(high) - on(low) or 1
        names = (options[0], options[-1]) if options else (short(low), short(high))
        columns.append(([(on(p) - on(low)) / span for p in places], *names))
    scores = [t.best for t in trials]
    low, span = min(scores), max(scores) - min(scores) or 1
    columns.append(([(s - low) / span for s in scores], percent(low), percent(max(scores))))
    chart = Chart("Parallel view of all trials", width=960, height=300, left=40)
    axes, styles = chart.axes, _styles(run)
    for i, trial in enumerate(trials):
        style = styles[trial.number]
        points = [(float(x), heights[i]) for x, (heights, _, _) in enumerate(columns)]
        chart.line(points, style, describe_trial(trial), alpha=1 if style == "best" else 0.5)
    for x, (_, bottom, top) in enumerate(columns):
        axes.plot([x, x], [0, 1], color=COLOURS["soft"], linewidth=1)
        axes.text(x, 1.03, clean(top), va="bottom", ha="center", fontsize=10)
        axes.text(x, -0.03, clean(bottom), va="top", ha="center", fontsize=10)
    axes.set_ylim(-0.12, 1.12)
    axes.set_yticks([])
    axes.spines.bottom.set_visible(False)
    titles = [*short_names(list(searched)), "dev accuracy, %"]
    axes.set_xticks(range(len(titles)), [clean(n) for n in titles])
    axes.set_xlim(-0.25, len(titles) - 0.75)
    caption = (
        "Each line is a trial, through its value of every setting to its best dev accuracy: where "
        "the good ones run together, the setting matters."
    )
    return Figure(chart.svg(), caption, _key((styles[t.number] for t in trials), "line"))


def fronts(run: Run) -> list[Figure]:
    """Accuracy against the other objectives of a study, or against what a trial cost."""
    if run.kind != "study":
        return []
    costs = [(name, OBJECTIVES[name].label, 1) for name in run.several if name != ACCURACY]
    if not costs:
        memory = f"peak memory, MiB{f' ({run.memory_of})' * bool(run.memory_of)}"
        costs = [(STEP_SECONDS, "time per step, ms", 1000), (PEAK_MEMORY_MB, memory, 1)]
    found = (_front(run, *cost) for cost in costs)
    return [figure for figure in found if figure is not None]


@drawing()
def _front(run: Run, cost: str, label: str, scale: float) -> Figure | None:
    """Accuracy against a cost, with the front; None where nothing was measured."""
    points = costed(run, cost)
    if not points:
        return None
    best = front(points)
    costs = [scale * p.cost for p in points]
    chart = Chart(f"Accuracy against {label}", label, "best dev accuracy, %")
    end = chart.range_x(costs, log=max(costs) > 8 * min(costs) > 0)
    corners = [(scale * p.cost, 100 * p.accuracy) for p in best]
    chart.line([*corners, (end, corners[-1][1])], "other", "Pareto front", steps=True)
    trials, styles = {t.number: t for t in run.trials}, _styles(run)
    chart.points(
        (
            scale * p.cost,
            100 * p.accuracy,
            styles[p.trial],
            f"{describe_trial(trials[p.trial])}; {label} {short(scale * p.cost)}",
        )
        for p in points
    )
    shown = run.best
    on_front = [t.number for t in run.best_trials] if run.several else [p.trial for p in best]
    for p in sorted(points, key=lambda p: (p.trial != shown, p.cost)):
        if p.trial in on_front:  # the caption names all, those without room for it as well
            chart.name((scale * p.cost, 100 * p.accuracy), f"#{p.trial}", color=COLOURS["ink"])
    names = ", ".join(f"trial {n}" for n in on_front)
    more = " (the line: of these two objectives alone)" if len(run.several) > 2 else ""
    left = run.count("PRUNED")
    less = f" Stopped early and left out: {left}." if left else ""
    caption = f"To the upper left is better. On the front, beaten by no other: {names}{more}.{less}"
    key = _key(styles[p.trial] for p in points)
    return Figure(chart.svg(), caption, (*key, ("line other", "Pareto front")))


@drawing()
def rung_plot(run: Run, rungs: Sequence[Rung]) -> Figure | None:
    """Who reached which rung of ASHA or Hyperband, and who went on."""
    filled = [r for r in rungs if r.entries]
    if not filled:
        return None
    several = any(r.bracket for r in filled)
    label = "bracket: rung" if several else "rung"
    chart = Chart(rungs_title(run), label, "dev accuracy at the rung, %", width=600)
    chart.names_x([f"{r.bracket}: " * several + f"{r.steps:,.0f} steps" for r in filled])
    places: list[tuple[float, float, str, str]] = []
    for i, rung in enumerate(filled):
        count = len(rung.entries)
        for j, e in enumerate(rung.entries):
            x = i + (0.7 * (j + 0.5) / count - 0.35 if count > 1 else 0.0)
            verdict, style = ("went on", "other") if e.promoted else ("stopped", "pruned")
            places.append((x, 100 * e.accuracy, style, f"trial {e.trial}: {verdict}"))
    chart.points(places)
    if len(places) <= _MANY_POINTS:
        for x, y, _, tip in places:
            if math.isfinite(y):
                chart.name((x, y), "#" + tip.split()[1].rstrip(":"), (0, 6), ha="center")
    caption = (
        "At each rung, in the order of arrival. A trial goes on when it is in the top share of "
        "those that arrived before it, so early ones have it easier."
    )
    return Figure(chart.svg(), caption, (("point other", "went on"), ("point pruned", "stopped")))
