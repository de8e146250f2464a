"""The search-efficiency benchmark's curves: best so far against compute, and what they say."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmx.reporting.chart import COLOURS, Chart, drawing
from dmx.reporting.tables import best_so_far, reports_of
from dmx.runs.folders import load

METHODS = ("random", "tpe+asha")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One study: (optimizer steps of all trials, best dev accuracy so far), and its method."""

    method: str
    seed: int
    points: tuple[tuple[float, float], ...]

    def at(self, steps: float) -> float:
        """The best accuracy known after so many steps; NaN before the first report."""
        place = bisect.bisect_right([s for s, _ in self.points], steps)
        return self.points[place - 1][1] if place else math.nan

    def reaches(self, accuracy: float) -> float:
        """Steps until the accuracy is reached; infinity where it never is."""
        return next((s for s, a in self.points if a >= accuracy), math.inf)


def read_curve(folder: Path, method: str, seed: int, budget: float) -> Curve:
    """A study's best-so-far, up to the budget."""
    points = best_so_far(reports_of(load(folder)))
    return Curve(method=method, seed=seed, points=tuple((s, a) for s, a in points if s <= budget))


def summarise(curves: Sequence[Curve], budget: float) -> dict[str, Any]:
    """Means over the seeds, and how soon TPE with ASHA reaches random search's final best."""
    pairs: list[dict[str, Any]] = []
    for seed in sorted({c.seed for c in curves}):
        mine = {c.method: c for c in curves if c.seed == seed}
        goal = mine["random"].at(budget)
        steps = mine["tpe+asha"].reaches(goal)
        pairs.append(
            {
                "seed": seed,
                "random_best": goal,
                "tpe_asha_best": mine["tpe+asha"].at(budget),
                "random_steps": mine["random"].reaches(goal),
                "tpe_asha_steps": steps if math.isfinite(steps) else None,
                "share_of_budget": steps / budget if math.isfinite(steps) else None,
            }
        )
    # A seed that never reached it counts as beyond the budget; leaving it out would flatter.
    reached = [p["share_of_budget"] for p in pairs if p["share_of_budget"] is not None]
    shares = [*reached, *[math.inf] * (len(pairs) - len(reached))]
    median = statistics.median(shares)
    random = statistics.fmean(p["random_best"] for p in pairs)
    asha = [c for c in curves if c.method == "tpe+asha"]
    return {
        "budget_steps": budget,
        "seeds": pairs,
        "random_best_mean": random,
        "tpe_asha_best_mean": statistics.fmean(p["tpe_asha_best"] for p in pairs),
        "seeds_that_reached": len(reached),
        "median_share_of_budget": median if math.isfinite(median) else None,
        "mean_share_of_budget": _mean_reaches(asha, random, budget),
    }


def _mean_reaches(curves: Sequence[Curve], accuracy: float, budget: float) -> float | None:
    """The share of the budget after which the curves' mean has the accuracy; None for never."""
    for steps in sorted({s for c in curves for s, _ in c.points}):
        if statistics.fmean(c.at(steps) for c in curves) >= accuracy:  # NaN before the first report
            return steps / budget
    return None


def describe(summary: Mapping[str, Any]) -> list[str]:
    """The summary in words."""
    share = summary["median_share_of_budget"]
    reached = f"{summary['seeds_that_reached']} of {len(summary['seeds'])} seeds"
    lines = [
        f"{summary['attention']} on {summary['task']} (data: {summary['data']}), "
        f"{summary['budget_steps']:,.0f} optimizer steps for each method and seed",
        f"best dev accuracy, mean: random {100 * summary['random_best_mean']:.2f} %, "
        f"TPE with ASHA {100 * summary['tpe_asha_best_mean']:.2f} %",
        f"TPE with ASHA reached random search's final best in {reached}"
        + (
            ", in less than half of them: the median is beyond the budget"
            if share is None
            else f", after {100 * share:.0f} % of the compute (median of all seeds)"
        ),
    ]
    share = summary["mean_share_of_budget"]
    when = "within the budget it does not" if share is None else f"after {share:.0%} of the compute"
    lines.append(
        "TPE with ASHA's mean over the seeds reaches the mean of random search's final bests: "
        + when
    )
    if "not LRA" in summary["data"]:
        lines.append("The data are a sample, not LRA.")
    return lines


def table(summary: Mapping[str, Any], curves: Sequence[Curve]) -> list[str]:
    """Two markdown tables: the best so far along the budget, and what each seed needed."""
    budget = summary["budget_steps"]
    shares = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    lines = [
        "| best dev accuracy so far, %, mean | " + " | ".join(f"{s:.0%}" for s in shares) + " |"
    ]
    lines.append("|---|" + "---:|" * len(shares))
    for method in METHODS:
        own = [c for c in curves if c.method == method]
        cells = [_percent(statistics.fmean(c.at(share * budget) for c in own)) for share in shares]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| seed | random: best, % | random: its steps | TPE with ASHA: best, % | "
        "steps to random's best | share of the compute |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for p in summary["seeds"]:
        steps, share = p["tpe_asha_steps"], p["share_of_budget"]
        lines.append(
            f"| {p['seed']} | {_percent(p['random_best'])} | {p['random_steps']:,.0f} | "
            f"{_percent(p['tpe_asha_best'])} | "
            + (
                "not reached | more than 100 % |"
                if steps is None
                else f"{steps:,.0f} | {share:.0%} |"
            )
        )
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:.2f}" if math.isfinite(value) else "–"


@drawing()
def plot(curves: Sequence[Curve], budget: float, label: str) -> str:
    """Mean of the best so far over the seeds, each seed faint, as an SVG that stands alone."""
    title = f"Search efficiency (data: {label})"
    across = "optimizer steps, all trials together"
    chart = Chart(title, across, "best dev accuracy so far, %", width=720, height=400)
    chart.whole_x(0, budget)
    styles = {"random": "pruned", "tpe+asha": "best"}
    names = {"random": "random, full length (dashed)", "tpe+asha": "TPE with ASHA"}
    for curve in curves:
        points = [(s, 100 * a) for s, a in curve.points]
        points.append((budget, points[-1][1]))
        chart.line(points, styles[curve.method], steps=True, alpha=0.45, linewidth=1.3)
    for i, method in enumerate(METHODS):
        mine = [c for c in curves if c.method == method]
        grid = sorted({s for c in mine for s, _ in c.points} | {budget})
        means = [(s, [c.at(s) for c in mine]) for s in grid]
        known = [(s, 100 * statistics.fmean(v)) for s, v in means if all(map(math.isfinite, v))]
        chart.line(known, styles[method], f"{method}, mean", steps=True, linewidth=3)
        place = {"transform": chart.axes.transAxes, "color": COLOURS[styles[method]]}
        chart.axes.text(0.02, 0.95 - 0.055 * i, names[method], **place)
    return str(chart.svg()) + "\n"
