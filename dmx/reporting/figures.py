"""The figures of a report, each as a chart with its legend and its caption."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dmx.format import percent, short
from dmx.reporting.axis import Axis
from dmx.reporting.markup import Markup, el
from dmx.reporting.pareto import Costed, against, costed, front, study_front
from dmx.reporting.records import RunReport, Trial, number
from dmx.reporting.rungs import best_so_far
from dmx.reporting.studies import history
from dmx.reporting.svg import Chart, bars, legend
from dmx.runs.metrics import DEV_ACCURACY, STEPS
from dmx.runs.objectives import OBJECTIVES

_STYLE = {"COMPLETE": "complete", "PRUNED": "pruned", "FAILED": "failed", "RUNNING": "running"}
_WORDS = {
    "complete": "full budget",
    "pruned": "stopped early",
    "failed": "failed",
    "running": "not ended",
    "best": "best trial",
}
MANY_TRIALS = 12
"""Beyond so many, points carry no numbers."""


def figure(chart: Markup, caption: str, key: Markup | None = None) -> Markup:
    """A chart with what is below it."""
    return el("figure", el("div", chart, class_="scroll"), key, el("figcaption", caption))


def _style(run: RunReport, trial: Trial) -> str:
    return "best" if trial.number == run.best else _STYLE[trial.status]


def _key(run: RunReport, trials: Sequence[Trial], kind: str = "point") -> Markup:
    used = {_style(run, t) for t in trials}
    order = [s for s in ("best", "complete", "pruned", "running", "failed") if s in used]
    return legend([(f"{kind} {s}", _WORDS[s]) for s in order])


def accuracy_axis(values: Sequence[float], label: str = "best dev accuracy, %") -> Axis:
    """An axis of accuracies in per cent, from values in 0..1."""
    return Axis.around(label, [100 * v for v in values])


def _tip(trial: Trial) -> str:
    values = ", ".join(f"{k.split('.')[-1]} {short(v)}" for k, v in trial.params.items())
    return f"trial {trial.number}: {percent(trial.best)} %, {trial.steps} steps; {values}"


def optimisation_history(run: RunReport) -> Markup:
    """Accuracy by trial number, and the best so far."""
    scored = [t for t in run.trials if math.isfinite(t.best)]
    last = max((t.number for t in run.trials), default=0)
    x = Axis(label="trial, in the order of proposal", low=-0.5, high=last + 0.5, whole=True)
    chart = Chart("Optimisation history", x, accuracy_axis([t.best for t in scored]))
    so_far: list[tuple[float, float]] = []
    for trial in scored:
        best = max([trial.best] + [y / 100 for _, y in so_far[-1:]])
        so_far.append((trial.number, 100 * best))
    chart.line([*so_far, *([(last, so_far[-1][1])] if so_far else [])], "best faint", steps=True)
    for trial in scored:
        chart.point(trial.number, 100 * trial.best, _style(run, trial), _tip(trial))
    return figure(
        chart.render(),
        "Each point is a trial; the line is the best so far. It goes flat when further trials stop "
        "helping.",
        _key(run, scored),
    )


def learning_curves(run: RunReport, metric: str, label: str, scale: float = 1.0) -> Markup:
    """A metric against optimizer steps, the best trial on top."""
    curves = [
        (t, [(number(r, STEPS), scale * number(r, metric)) for r in t.reports]) for t in run.trials
    ]
    drawn = [(t, c) for t, c in curves if any(math.isfinite(y) for _, y in c)]
    steps = [x for _, c in drawn for x, _ in c]
    x = Axis(label="optimizer steps", low=0, high=max(steps, default=1) or 1, whole=True)
    y = Axis.around(label, [v for _, c in drawn for _, v in c])
    chart = Chart(f"{label} against steps", x, y)
    if metric == DEV_ACCURACY:
        chart.level(scale * chance(run), "chance")
    single = len(run.trials) == 1
    for trial, curve in sorted(drawn, key=lambda item: item[0].number == run.best):
        style = _style(run, trial)
        faint = " faint" if style == "complete" and len(drawn) > 6 else ""
        chart.line(curve, style + faint, _tip(trial))
        if len(curve) == 1 or single:
            for px, py in curve:
                chart.point(px, py, style, f"step {px:.0f}: {py:.4g}", size=3)
    key = None if single else _key(run, [t for t, _ in drawn], "line")
    return figure(chart.render(), f"{label[0].upper()}{label[1:]}, at every evaluation.", key)


def stage_curves(run: RunReport) -> Markup | None:
    """Dev accuracy of all stages, one after another; attempts that a gate refused are dashed."""
    attempts = [(s, a) for s in run.stages for a in s.attempts if a.reports]
    lengths = [max(number(a.reports[-1], STEPS), 1.0) for _, a in attempts]
    if not attempts:
        return None
    total = math.fsum(lengths)
    x = Axis(label="optimizer steps, stage after stage", low=0, high=total, whole=True)
    scores = [number(r, DEV_ACCURACY) for _, a in attempts for r in a.reports]
    chart = Chart("Learning curves", x, accuracy_axis(scores, "dev accuracy, %"), width=960)
    start, before = 0.0, ""
    for (stage, attempt), length in zip(attempts, lengths, strict=True):
        style = "pruned" if attempt.passed is False else "complete"
        points = [
            (start + number(r, STEPS), 100 * number(r, DEV_ACCURACY)) for r in attempt.reports
        ]
        name = f"{stage.name}, attempt {attempt.number}"
        chart.line(points, style, name)
        for px, py in points[: 1 if len(points) > 1 else None]:
            chart.point(px, py, style, name, size=3)
        if stage.name != before:
            chart.boundary(start, stage.name)
        start, before = start + length, stage.name
    return figure(
        chart.render(),
        "Each stage begins with its parent's weights. A stage's name stands at its first step. "
        "Of a search the best trial is drawn.",
        legend([("line complete", "passed or open"), ("line pruned", "refused by its gate")]),
    )


def chance(run: RunReport) -> float:
    """The accuracy of guessing among equally frequent classes; NaN where unknown."""
    model = (run.config or {}).get("model")
    classes = model.get("num_classes") if isinstance(model, dict) else None
    return 1.0 / classes if isinstance(classes, int) and classes else math.nan


def best_for_compute(run: RunReport) -> Markup | None:
    """The best accuracy so far against the optimizer steps of all trials together."""
    points = best_so_far([(n, s, a) for n, s, a, _ in history(run.folder)])
    if not points:
        return None
    x = Axis(label="optimizer steps, all trials together", low=0, high=points[-1][0], whole=True)
    chart = Chart("Best so far", x, accuracy_axis([a for _, a in points], "best so far, %"))
    chart.line([(s, 100 * a) for s, a in points], "best", steps=True)
    return figure(chart.render(), "What the whole search had found for its compute.")


def importance_bars(values: dict[str, float]) -> Markup:
    """Shares of each hyperparameter."""
    widest = max(values.values())
    rows = [(name, share / widest, f"{100 * share:.0f} %") for name, share in values.items()]
    return bars("Hyperparameter importances", rows)


def slice_plot(run: RunReport, name: str) -> Markup | None:
    """Accuracy against one searched value; None where no trial had it."""
    assert run.search is not None
    trials = [t for t in run.trials if name in t.drawn and math.isfinite(t.best)]
    if not trials:
        return None
    kind, *values = run.search.searched[name]
    if kind == "choice":
        options = list(dict.fromkeys([*values, *(t.drawn[name] for t in trials)]))
        places = {repr(o): i for i, o in enumerate(options)}
        texts = tuple(short(o) for o in options)
        x = Axis(label=name, low=-0.6, high=len(options) - 0.4, categories=texts)
        at = [float(places[repr(t.drawn[name])]) for t in trials]
    else:
        at = [float(t.drawn[name]) for t in trials]
        log = kind.startswith("log")
        whole = kind.endswith("int")
        around = Axis.around(name, [*at, *(float(v) for v in values)], log=log)
        x = Axis(label=name, low=around.low, high=around.high, log=log, whole=whole)
    y = accuracy_axis([t.best for t in trials], "best dev acc., %")
    chart = Chart(f"Accuracy against {name}", x, y, width=340, height=220)
    for trial, px in sorted(zip(trials, at, strict=True), key=lambda p: p[0].number == run.best):
        chart.point(px, 100 * trial.best, _style(run, trial), _tip(trial))
    return el("figure", chart.render())


def pareto_plot(run: RunReport, metric: str, label: str, scale: float = 1.0) -> Markup | None:
    """Accuracy against a cost, with the front; None where nothing was measured."""
    return _cost_plot(run, costed(run, metric), label, scale)


def objective_plot(run: RunReport, objective: str) -> Markup | None:
    """Accuracy against another objective of the study, with the study's own front."""
    return _cost_plot(run, against(run, objective), OBJECTIVES[objective].label, 1.0)


def _cost_plot(run: RunReport, points: list[Costed], label: str, scale: float) -> Markup | None:
    if not points:
        return None
    best = front(points)
    of_study = study_front(run)
    costs = [scale * p.cost for p in points]
    log = max(costs) > 8 * min(costs) > 0
    x = Axis.around(label, costs, log=log)
    chart = Chart(f"Accuracy against {label}", x, accuracy_axis([p.accuracy for p in points]))
    corners = [(scale * p.cost, 100 * p.accuracy) for p in best]
    if corners:
        chart.line([*corners, (x.high, corners[-1][1])], "other", "Pareto front", steps=True)
    on_front = set(of_study) or {p.trial for p in best}
    trials = {t.number: t for t in run.trials}
    for p in points:
        trial = trials[p.trial]
        px, py = scale * p.cost, 100 * p.accuracy
        chart.point(px, py, _style(run, trial), f"{_tip(trial)}; {label} {short(px)}")
    for p in sorted(points, key=lambda p: (p.trial != run.best, p.cost)):
        if p.trial in on_front:  # the caption names all, those without room for it as well
            at = (scale * p.cost, 100 * p.accuracy)
            chart.name(at, f"#{p.trial}", (7, -7), style="note strong")
    drawn = [trials[p.trial] for p in points]
    names = ", ".join(f"trial {n}" for n in (of_study or [p.trial for p in best]))
    more = " (the line: of these two objectives alone)" if len(run.several) > 2 else ""
    left = run.count("PRUNED")
    less = f" Stopped early and left out: {left}." if left else ""
    return figure(
        chart.render(),
        f"To the upper left is better. On the front, beaten by no other: {names}{more}.{less}",
        el(
            "div",
            _key(run, drawn),
            legend([("line other", "Pareto front")]),
        ),
    )
