"""The figures of a report: which values of a run are drawn, and what each figure says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dmx.format import percent, short, short_names
from dmx.reporting.chart import COLOURS, Chart, Figure, clean, drawing
from dmx.reporting.importance import Importances
from dmx.reporting.tables import (
    Costed,
    against,
    best_so_far,
    costed,
    front,
    reports_of,
    rungs_title,
    study_front,
)
from dmx.runs.layout import DEV_ACCURACY, STEPS
from dmx.runs.run import Run
from dmx.runs.trial import OBJECTIVES, Trial, number
from dmx.search.rungs import Rung

MANY_TRIALS = 12
"""Beyond so many, points carry no numbers."""
_MEANINGS = {
    "best": "best trial",
    "complete": "full budget",
    "pruned": "stopped early",
    "running": "not ended",
    "failed": "failed",
}
_STYLE = {"COMPLETE": "complete", "PRUNED": "pruned", "FAILED": "failed", "RUNNING": "running"}


def _style(run: Run, trial: Trial) -> str:
    return "best" if trial.number == run.best else _STYLE[trial.status]


def _key(run: Run, trials: Iterable[Trial], kind: str = "point") -> tuple[tuple[str, str], ...]:
    used = {_style(run, t) for t in trials}
    return tuple((f"{kind} {s}", words) for s, words in _MEANINGS.items() if s in used)


def _tip(trial: Trial) -> str:
    names = short_names(list(trial.params))
    values = ", ".join(f"{n} {short(v)}" for n, v in zip(names, trial.params.values(), strict=True))
    return f"trial {trial.number}: {percent(trial.best)} %, {trial.steps:,} steps; {values}"


@drawing
def optimisation_history(run: Run) -> Figure:
    """Accuracy by trial number, and the best so far."""
    scored = [t for t in run.trials if math.isfinite(t.best)]
    last = max((t.number for t in run.trials), default=0)
    chart = Chart("Optimisation history", "trial, in the order of proposal", "best dev accuracy, %")
    chart.whole_x(-0.5, last + 0.5)
    best, so_far = -math.inf, []
    for trial in scored:
        best = max(best, 100 * trial.best)
        so_far.append((trial.number, best))
    chart.line([*so_far, (last, best)], "best", steps=True, alpha=0.5, linewidth=1.3)
    chart.points((t.number, 100 * t.best, _style(run, t), _tip(t)) for t in scored)
    caption = (
        "Each point is a trial; the line is the best so far. It goes flat when further trials stop "
        "helping."
    )
    return Figure(chart.svg(), caption, _key(run, scored))


@drawing
def learning_curves(run: Run, metric: str, label: str, scale: float = 1.0) -> Figure:
    """A metric against optimizer steps, the best trial on top."""
    curves = [
        (t, [(number(r, STEPS), scale * number(r, metric)) for r in t.reports]) for t in run.trials
    ]
    drawn = [(t, c) for t, c in curves if any(math.isfinite(y) for _, y in c)]
    chart = Chart(f"{label} against steps", "optimizer steps", label)
    chart.whole_x(0, max((x for _, c in drawn for x, _ in c), default=1) or 1)
    single = len(run.trials) == 1
    for trial, curve in drawn:
        style = _style(run, trial)
        faint = style != "best" and len(drawn) > 6
        chart.line(curve, style, _tip(trial), alpha=0.5 if faint else 1)
        if len(curve) == 1 or single:
            chart.points(((x, y, style, f"step {x:,.0f}: {y:.4g}") for x, y in curve), size=5)
    if metric == DEV_ACCURACY:
        chart.level(scale * _chance(run), "chance")
    key = () if single else _key(run, [t for t, _ in drawn], "line")
    return Figure(chart.svg(), f"{label[0].upper()}{label[1:]}, at every evaluation.", key)


def _chance(run: Run) -> float:
    """The accuracy of guessing among equally frequent classes; NaN where unknown."""
    model = (run.config or {}).get("model")
    classes = model.get("num_classes") if isinstance(model, dict) else None
    return 1.0 / classes if isinstance(classes, int) and classes else math.nan


@drawing
def stage_curves(run: Run) -> Figure | None:
    """Dev accuracy of all stages, one after another; attempts that a gate refused are dashed."""
    attempts = [(s, a) for s in run.stages for a in s.attempts if a.reports]
    if not attempts:
        return None
    chart = Chart(
        "Learning curves of the stages",
        "optimizer steps, stage after stage",
        "dev accuracy, %",
        width=960,
    )
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
            place = chart.axes.get_xaxis_transform()
            chart.axes.text(
                *(start, 0.98, " " + clean(stage.name)),
                rotation=90,
                va="top",
                fontsize=10,
                transform=place,
            )
        start, before = start + max(number(attempt.reports[-1], STEPS), 1.0), stage.name
    chart.whole_x(0, start)
    caption = (
        "Each stage begins with its parent's weights. A stage's name stands at its first step. "
        "Of a search the best trial is drawn."
    )
    key = (("line complete", "passed or open"), ("line pruned", "refused by its gate"))
    return Figure(chart.svg(), caption, key)


@drawing
def best_for_compute(run: Run) -> Figure | None:
    """The best accuracy so far against the optimizer steps of all trials together."""
    points = best_so_far(reports_of(run))
    if not points:
        return None
    chart = Chart("Best so far", "optimizer steps, all trials together", "best so far, %")
    chart.whole_x(0, points[-1][0])
    chart.line([(s, 100 * a) for s, a in points], "best", steps=True)
    return Figure(chart.svg(), "What the whole search had found for its compute.")


@drawing
def importance_bars(found: Importances) -> Figure:
    """Shares of each hyperparameter."""
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
    caption = f"{found.meaning}, by {found.method} over {found.num_trials} trials. {found.note}"
    return Figure(chart.svg(), caption)


@drawing
def slice_plot(run: Run, name: str) -> Figure | None:
    """Accuracy against one searched value; None where no trial had it."""
    assert run.search is not None
    trials = [t for t in run.trials if name in t.drawn and math.isfinite(t.best)]
    if not trials:
        return None
    kind, *values = run.search.searched[name]
    chart = Chart(
        f"Accuracy against {name}", name, "best dev acc., %", width=330, height=220, left=62
    )
    drawn = [t.drawn[name] for t in trials]
    if kind == "choice":
        options = list(dict.fromkeys([*values, *drawn]))
        places = {repr(o): float(i) for i, o in enumerate(options)}
        at = [places[repr(v)] for v in drawn]
        chart.names_x([short(o) for o in options])
    else:
        at = [float(v) for v in drawn]
        log, whole = kind.startswith("log"), kind.endswith("int")
        chart.range_x([*at, *map(float, values)], log=log, whole=whole, count=4)
    chart.points(
        (x, 100 * t.best, _style(run, t), _tip(t)) for t, x in zip(trials, at, strict=True)
    )
    return Figure(chart.svg())


@drawing
def parallel_view(run: Run) -> Figure | None:
    """Each trial as a line through its values and its accuracy; None of fewer than two values."""
    searched = run.search.searched if run.search is not None else {}
    trials = [t for t in run.trials if math.isfinite(t.best) and set(searched) <= set(t.drawn)]
    if len(searched) < 2 or len(trials) < 3:
        return None
    columns: list[tuple[list[float], str, str]] = []
    for name, (kind, *values) in searched.items():
        drawn = [t.drawn[name] for t in trials]
        if kind == "choice":
            options = [repr(o) for o in dict.fromkeys([*values, *drawn])]
            scale = max(len(options) - 1, 1)
            heights = [options.index(repr(v)) / scale for v in drawn]
            columns.append((heights, short(values[0]), short(values[-1])))
        else:
            on = math.log if kind.startswith("log") else float
            low, high = min(*drawn, *values), max(*drawn, *values)
            span = on(high) - on(low) or 1
            heights = [(on(v) - on(low)) / span for v in drawn]
            columns.append((heights, short(low), short(high)))
    scores = [t.best for t in trials]
    low, span = min(scores), max(scores) - min(scores) or 1
    columns.append(([(s - low) / span for s in scores], percent(low), percent(max(scores))))
    chart = Chart("Parallel view of all trials", width=960, height=300, left=40)
    axes = chart.axes
    for i, trial in enumerate(trials):
        style = _style(run, trial)
        points = [(float(x), heights[i]) for x, (heights, _, _) in enumerate(columns)]
        chart.line(points, style, _tip(trial), alpha=1 if style == "best" else 0.5)
    for x, (_, bottom, top) in enumerate(columns):
        axes.plot([x, x], [0, 1], color=COLOURS["soft"], linewidth=1)
        axes.text(x, 1.03, clean(top), va="bottom", ha="center", fontsize=10)
        axes.text(x, -0.03, clean(bottom), va="top", ha="center", fontsize=10)
    axes.set_ylim(-0.12, 1.12)
    axes.set_yticks([])
    axes.spines.bottom.set_visible(False)
    names = [*short_names(list(searched)), "dev accuracy, %"]
    axes.set_xticks(range(len(names)), [clean(n) for n in names])
    axes.set_xlim(-0.25, len(names) - 0.75)
    caption = (
        "Each line is a trial, through its value of every setting to its best dev accuracy: where "
        "the good ones run together, the setting matters."
    )
    return Figure(chart.svg(), caption, _key(run, trials, "line"))


def pareto_plot(run: Run, metric: str, label: str, scale: float = 1.0) -> Figure | None:
    """Accuracy against a cost, with the front; None where nothing was measured."""
    return _cost_plot(run, costed(run, metric), label, scale)


def objective_plot(run: Run, objective: str) -> Figure | None:
    """Accuracy against another objective of the study, with the study's own front."""
    return _cost_plot(run, against(run, objective), OBJECTIVES[objective].label, 1.0)


@drawing
def _cost_plot(run: Run, points: list[Costed], label: str, scale: float) -> Figure | None:
    if not points:
        return None
    best, of_study = front(points), study_front(run)
    costs = [scale * p.cost for p in points]
    chart = Chart(f"Accuracy against {label}", label, "best dev accuracy, %")
    end = chart.range_x(costs, log=max(costs) > 8 * min(costs) > 0)
    corners = [(scale * p.cost, 100 * p.accuracy) for p in best]
    chart.line([*corners, (end, corners[-1][1])], "other", "Pareto front", steps=True)
    trials = {t.number: t for t in run.trials}
    chart.points(
        (
            scale * p.cost,
            100 * p.accuracy,
            _style(run, trials[p.trial]),
            f"{_tip(trials[p.trial])}; {label} {short(scale * p.cost)}",
        )
        for p in points
    )
    on_front = list(of_study) or [p.trial for p in best]
    for p in sorted(points, key=lambda p: (p.trial != run.best, p.cost)):
        if p.trial in on_front:  # the caption names all, those without room for it as well
            chart.name((scale * p.cost, 100 * p.accuracy), f"#{p.trial}", color=COLOURS["ink"])
    names = ", ".join(f"trial {n}" for n in on_front)
    more = " (the line: of these two objectives alone)" if len(run.several) > 2 else ""
    left = run.count("PRUNED")
    less = f" Stopped early and left out: {left}." if left else ""
    caption = f"To the upper left is better. On the front, beaten by no other: {names}{more}.{less}"
    key = _key(run, [trials[p.trial] for p in points])
    return Figure(chart.svg(), caption, (*key, ("line other", "Pareto front")))


@drawing
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
            verdict = "went on" if e.promoted else "stopped"
            style = "other" if e.promoted else "pruned"
            places.append((x, 100 * e.accuracy, style, f"trial {e.trial}: {verdict}"))
    chart.points(places)
    if len(places) <= 2 * MANY_TRIALS:
        for x, y, _, tip in places:
            if math.isfinite(y):
                chart.name((x, y), "#" + tip.split()[1].rstrip(":"), (0, 6), ha="center")
    caption = (
        "At each rung, in the order of arrival. A trial goes on when it is in the top share of "
        "those that arrived before it, so early ones have it easier."
    )
    return Figure(chart.svg(), caption, (("point other", "went on"), ("point pruned", "stopped")))
