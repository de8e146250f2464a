"""Early stopping in a report: who reached which rung of a study, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence

from dmx.format import MISSING, percent
from dmx.reporting.axis import Axis
from dmx.reporting.figures import MANY_TRIALS, accuracy_axis, figure
from dmx.reporting.markup import Markup
from dmx.reporting.records import RunReport
from dmx.reporting.studies import history
from dmx.reporting.svg import Chart, legend
from dmx.reporting.tables import Table, make
from dmx.search.rungs import Brackets, Rung


def filled_rungs(run: RunReport) -> list[Rung]:
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
    brackets.fill((n, s, a) for n, s, a, _ in history(run.folder))
    return brackets.rungs


def rungs_table(rungs: list[Rung], factor: float) -> Table:
    """One row a rung."""
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


def rungs_title(run: RunReport) -> str:
    """Whose rungs they are."""
    hyperband = run.search is not None and run.search.scheduler == "hyperband"
    return "Hyperband's rungs" if hyperband else "ASHA's rungs"


def rung_plot(run: RunReport, rungs: Sequence[Rung]) -> Markup | None:
    """Who reached which rung of ASHA, and who went on."""
    filled = [r for r in rungs if r.entries]
    if not filled:
        return None
    several = any(r.bracket for r in filled)
    names = tuple(f"{r.bracket}: " * several + f"{r.steps:,.0f} steps" for r in filled)
    label = "bracket: rung" if several else "rung"
    x = Axis(label=label, low=-0.6, high=len(filled) - 0.4, categories=names)
    values = [e.accuracy for r in filled for e in r.entries]
    y = accuracy_axis(values, "dev accuracy at the rung, %")
    chart = Chart(rungs_title(run), x, y, width=640)
    for i, rung in enumerate(filled):
        count = len(rung.entries)
        for j, e in enumerate(rung.entries):
            across = i + (0.7 * (j + 0.5) / count - 0.35 if count > 1 else 0.0)
            verdict = "went on" if e.promoted else "stopped"
            style = "other" if e.promoted else "pruned"
            chart.point(across, 100 * e.accuracy, style, f"trial {e.trial}: {verdict}")
            if len(values) <= 2 * MANY_TRIALS:
                chart.name((across, 100 * e.accuracy), f"#{e.trial}", (0, -8), "middle", "note")
    return figure(
        chart.render(),
        "At each rung, in the order of arrival. A trial goes on when it is in the top share of "
        "those that arrived before it, so early ones have it easier.",
        legend([("point other", "went on"), ("point pruned", "stopped")]),
    )
