"""The figures of a report: drawn by matplotlib, as inline SVG that the page's CSS colours."""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar
from xml.etree import ElementTree

from markupsafe import Markup

from dmx.format import percent, short, short_names
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
from dmx.runs.metrics import DEV_ACCURACY, STEPS
from dmx.runs.objectives import OBJECTIVES
from dmx.runs.run import Run, Trial, number
from dmx.search.rungs import Rung

MANY_TRIALS = 12
"""Beyond so many, points carry no numbers."""
COLOURS = {
    "complete": "#1f6feb",
    "pruned": "#8a94a3",
    "failed": "#c9302c",
    "best": "#d9620f",
    "other": "#2a9d78",
    "card": "#ffffff",
    "ink": "#1c2430",
    "soft": "#5b6675",
    "rule": "#e2e6eb",
}
"""What page.css calls --complete and so on; a picture that stands alone has them as they are."""
_NAMES = {colour: name for name, colour in COLOURS.items()}
_MEANINGS = {
    "best": "best trial",
    "complete": "full budget",
    "pruned": "stopped early",
    "running": "not ended",
    "failed": "failed",
}
_STYLE = {"COMPLETE": "complete", "PRUNED": "pruned", "FAILED": "failed", "RUNNING": "running"}
_RC: Any = {
    "figure.dpi": 72,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a `$` in a name is a dollar
    "font.size": 11,
    "axes.edgecolor": COLOURS["soft"],
    "axes.labelcolor": COLOURS["ink"],
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "text.color": COLOURS["soft"],
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}
_NAME_ROOM = (30, 11)
"""Width and height of a point's name, such as `#123`."""
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff]")

Point = tuple[float, float]
Key = tuple[tuple[str, str], ...]
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Figure:
    """`key`: (style, what it means) for the legend below the picture."""

    svg: Markup
    caption: str = ""
    key: Key = ()


def drawing(draw: Callable[P, R]) -> Callable[P, R]:
    """Call a function with the style of all figures, which is nobody else's."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(_RC), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of glyphs that the measuring font lacks
            return draw(*args, **kwargs)

    return styled


class Chart:
    """A pair of axes, in pixels; within `drawing` only."""

    def __init__(
        self,
        title: str,
        x: str = "",
        y: str = "",
        *,
        width: int = 480,
        height: int = 280,
        left: int = 62,
    ) -> None:
        from matplotlib.figure import Figure as Canvas

        self._title, self._width = clean(title), width
        self._tips: dict[str, list[str]] = {}
        self._named: list[Point] = []
        self._canvas = Canvas(figsize=(width / 72, height / 72))
        self._canvas.subplots_adjust(left / width, 46 / height, 1 - 14 / width, 1 - 14 / height)
        self.axes = self._canvas.add_subplot()
        self.axes.set_xlabel(clean(x))
        self.axes.set_ylabel(clean(y))
        self.axes.xaxis.set_major_formatter(lambda value, _: _tick(value))
        self.axes.yaxis.set_major_formatter(lambda value, _: _tick(value))
        self.axes.yaxis.set_major_locator(_locator(5))

    def line(
        self,
        points: Iterable[Point],
        style: str,
        tip: str = "",
        *,
        steps: bool = False,
        **more: Any,
    ) -> None:
        """A line through finite points; `steps`: level until the next point."""
        finite = [p for p in points if all(map(math.isfinite, p))]
        look: dict[str, Any] = {
            "color": COLOURS[{"running": "complete"}.get(style, style)],
            "linewidth": {"best": 2.4, "pruned": 1.2}.get(style, 1.8),
            "linestyle": (0, (4, 3)) if style == "pruned" else "-",
            "drawstyle": "steps-post" if steps else "default",
            "zorder": 3 if style == "best" else 2,
        }
        if finite:
            xs, ys = zip(*finite, strict=True)
            self.axes.plot(
                xs, ys, clip_on=False, gid=self._tip([tip] if tip else []), **look | more
            )

    def points(self, found: Iterable[tuple[float, float, str, str]], size: float = 7) -> None:
        """(x, y, style, tip) of each point; those of one style together, the best on top."""
        styles: dict[str, list[tuple[float, float, str]]] = {}
        for x, y, style, tip in found:
            if math.isfinite(x) and math.isfinite(y):
                styles.setdefault(style, []).append((x, y, tip))
        for style, points in styles.items():
            colour = COLOURS[{"running": "complete"}.get(style, style)]
            hollow = style in ("pruned", "running")
            self.axes.plot(
                [x for x, _, _ in points],
                [y for _, y, _ in points],
                linestyle="none",
                marker="x" if style == "failed" else "o",
                markersize=size,
                markerfacecolor=COLOURS["card"] if hollow else colour,
                markeredgecolor=colour if hollow or style == "failed" else COLOURS["card"],
                markeredgewidth=1.6 if hollow or style == "failed" else 1,
                zorder=5 if style == "best" else 4,
                clip_on=False,
                gid=self._tip([tip for _, _, tip in points]),
            )

    def _tip(self, texts: list[str]) -> str:
        gid = f"tips{len(self._tips)}"
        self._tips[gid] = texts
        return gid

    def name(self, point: Point, text: str, offset: Point = (6, 5), **more: Any) -> None:
        """A point's name beside it; one that would cover an earlier one is left out."""
        x, y = self.axes.transData.transform(point)
        if all(abs(x - a) > _NAME_ROOM[0] or abs(y - b) > _NAME_ROOM[1] for a, b in self._named):
            self._named.append((x, y))
            self.axes.annotate(
                clean(text), point, offset, textcoords="offset points", fontsize=9, **more
            )

    def level(self, y: float, text: str) -> None:
        """A dotted horizontal line with a name at its right end, where it lies within the axes."""
        low, high = self.axes.get_ylim()
        if low <= y <= high:
            self.axes.axhline(y, color=COLOURS["soft"], linewidth=1, linestyle=":")
            place = self.axes.get_yaxis_transform()
            self.axes.text(1, y, text, ha="right", va="bottom", fontsize=10, transform=place)

    def whole_x(self, low: float, high: float) -> None:
        """The x axis from `low` to `high`, with ticks at whole numbers."""
        self.axes.set_xlim(low, high)
        self.axes.xaxis.set_major_locator(_locator(6, integer=True))

    def log_x(self, low: float, high: float) -> None:
        """A logarithmic x axis."""
        from matplotlib.ticker import LogLocator, NullLocator

        decades = math.log10(high / low)
        self.axes.set_xscale("log")
        self.axes.set_xlim(low, high)
        subs = (1,) if decades > 2 else (1, 3) if decades > 1.2 else (1, 2, 5)
        short_range = decades < 0.6
        self.axes.xaxis.set_major_locator(_locator(4) if short_range else LogLocator(subs=subs))
        self.axes.xaxis.set_minor_locator(NullLocator())
        self.axes.xaxis.set_major_formatter(lambda value, _: _tick(value))

    def names_x(self, names: Sequence[str]) -> None:
        """Names at 0, 1, 2, ...; some are left out where they would touch."""
        every = math.ceil(sum(len(n) * 6.5 + 10 for n in names) / (self._width - 80))
        self.axes.set_xticks(range(len(names))[::every], [clean(n) for n in names[::every]])
        self.axes.set_xlim(-0.6, len(names) - 0.4)

    def svg(self) -> Markup:
        """The picture for a page of HTML; it scales with its place."""
        return Markup(ElementTree.tostring(self._tree(), encoding="unicode"))

    def standalone(self) -> str:
        """The picture as a file of its own."""
        root = self._tree()
        root.set("xmlns", "http://www.w3.org/2000/svg")
        return ElementTree.tostring(root, encoding="unicode") + "\n"

    def _tree(self) -> ElementTree.Element:
        import matplotlib

        buffer = io.StringIO()
        # The salt makes ids that are the same on every run, and another figure's differ.
        with matplotlib.rc_context({"svg.hashsalt": self._title}):
            self._canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        root = ElementTree.fromstring(re.sub(r"(\d\.\d)\d+", r"\1", buffer.getvalue()))
        used = set(re.findall(r"#([\w-]+)", buffer.getvalue()))
        for part in list(root)[:2]:  # metadata, and CSS that would hold for the whole page
            root.remove(part)
        for node in root.iter():
            node.tag = node.tag.rpartition("}")[2]
            for key in [k for k in node.attrib if k.startswith("{")]:
                node.set(key.rpartition("}")[2], node.attrib.pop(key))
            if "style" in node.attrib:
                node.set("style", _themed(node.attrib["style"]))
            if texts := self._tips.get(node.attrib.get("id", "")):
                _add_tips(node, texts)
            if node.attrib.get("id") not in used:
                node.attrib.pop("id", None)
        for key in ("width", "height", "version"):
            del root.attrib[key]
        title = ElementTree.Element("title")
        title.text = self._title
        root.insert(0, title)
        size = f"min-width:{min(self._width, 330)}px;max-width:{self._width * 1.25:.0f}px"
        root.attrib |= {"class": "chart", "role": "img", "style": size}
        return root


def clean(text: object) -> str:
    """A text without what XML cannot hold."""
    return _UNFIT.sub("\ufffd", str(text))


def _themed(style: str) -> str:
    """A style with the page's font, and its colours where it has them."""
    style = re.sub(r"font-family: [^;]*;? ?", "", style)
    return re.sub(
        r"#[0-9a-f]{6}",
        lambda m: f"var(--{_NAMES[m[0]]},{m[0]})" if m[0] in _NAMES else m[0],
        style,
    )


def _add_tips(node: ElementTree.Element, texts: list[str]) -> None:
    """Titles, which a browser shows at the pointer: of each marker, or of a whole line."""
    marks = [inner for inner in node.iter() if inner.tag.endswith("use")] or [node]
    for mark, text in zip(marks, texts, strict=True):
        ElementTree.SubElement(mark, "title").text = clean(text)


def _tick(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}"


def _locator(count: int, **more: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10], **more)


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
    chart.axes.invert_yaxis()
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
        f"Accuracy against {name}", name, "best dev acc., %", width=330, height=220, left=54
    )
    drawn = [t.drawn[name] for t in trials]
    if kind == "choice":
        options = list(dict.fromkeys([*values, *drawn]))
        places = {repr(o): float(i) for i, o in enumerate(options)}
        at = [places[repr(v)] for v in drawn]
        chart.names_x([short(o) for o in options])
    else:
        at = [float(v) for v in drawn]
        low, high = min(*at, *values), max(*at, *values)
        if kind.startswith("log"):
            room = max((high / low) ** 0.06, 1.15)
            chart.log_x(low / room, high * room)
        else:
            room = (high - low) * 0.07 or abs(high) * 0.1 or 0.5
            chart.axes.set_xlim(low - room, high + room)
            chart.axes.xaxis.set_major_locator(_locator(4, integer=kind.endswith("int")))
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
        axes.axvline(x, color=COLOURS["soft"], linewidth=1)
        side: dict[str, Any] = {"ha": "right" if x == len(columns) - 1 else "left", "fontsize": 10}
        axes.text(x, 1.02, f" {clean(top)} ", va="bottom", **side)
        axes.text(x, -0.02, f" {clean(bottom)} ", va="top", **side)
    axes.set_ylim(-0.1, 1.1)
    axes.set_yticks([])
    axes.spines.bottom.set_visible(False)
    names = [*short_names(list(searched)), "dev accuracy, %"]
    axes.set_xticks(range(len(names)), [clean(n) for n in names])
    axes.set_xlim(-0.1, len(names) - 0.9)
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
    low, high = min(costs), max(costs)
    if high > 8 * low > 0:
        room = max((high / low) ** 0.06, 1.15)
        low, high = low / room, high * room
        chart.log_x(low, high)
    else:
        room = (high - low) * 0.07 or abs(high) * 0.1 or 0.5
        low, high = low - room, high + room
        chart.axes.set_xlim(low, high)
        chart.axes.xaxis.set_major_locator(_locator(6))
    corners = [(scale * p.cost, 100 * p.accuracy) for p in best]
    chart.line([*corners, (high, corners[-1][1])], "other", "Pareto front", steps=True)
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
