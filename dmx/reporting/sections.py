"""The sections of the HTML page, each left out where a run has nothing for it."""

from __future__ import annotations

import dataclasses

from dmx.reporting import figures, stopping, tables
from dmx.reporting.caveats import caveats, comparable
from dmx.reporting.importance import importances
from dmx.reporting.lineage import lineage_chart
from dmx.reporting.markup import Markup, el, join
from dmx.reporting.published import column_of, load
from dmx.reporting.records import RunReport
from dmx.reporting.tables import Table
from dmx.reporting.text import train_command
from dmx.runs.metrics import DEV_ACCURACY, LEARNING_RATE, PEAK_MEMORY_MB, STEP_SECONDS, TRAIN_LOSS
from dmx.runs.objectives import ACCURACY

Section = tuple[str, str, Markup]
"""(anchor, title, content)."""
_MANY_ROWS, _FIRST_ROWS = 40, 25
"""A longer table of trials is folded after its best ones: the figures below it are read first."""


def all_sections(run: RunReport) -> list[Section]:
    """Those that the run has something for, in the page's order."""
    makers = (
        *(_result, _stages, _trials, _history, _importances, _pareto, _rungs, _published),
        _provenance,
    )
    return [section for make in makers if (section := make(run)) is not None]


def table(data: Table) -> Markup:
    """A table, scrolling sideways where the screen is narrow."""

    def cell(i: int, text: str) -> Markup:
        style = "num" if i in data.numeric else None
        if data.columns[i] == "status":
            style = text
        if data.columns[i] in ("error", "which rule fired", "value"):
            style = "wrap"
        return el("td", text, class_=style)

    head = (
        el("th", _unbroken(c), class_="num" if i in data.numeric else None)
        for i, c in enumerate(data.columns)
    )
    rows = []
    for row, style in zip(data.rows, data.styles, strict=True):
        if style == "group":
            heading = el("th", row[0], colspan=len(data.columns))
            rows.append(el("tr", heading, class_="group"))
        else:
            rows.append(el("tr", *(cell(i, t) for i, t in enumerate(row)), class_=style or None))
    inner = el("table", el("thead", el("tr", *head)), el("tbody", *rows))
    return el("div", inner, class_="scroll")


def _unbroken(title: str) -> str:
    """A title that breaks at no more than one place."""
    return title.replace("best dev", "best\u00a0dev").replace(", %", ",\u00a0%")


def _result(run: RunReport) -> Section | None:
    command = train_command(run)
    if not command:
        return None
    words = {
        "study": "Train the best configuration again:",
        "run": "The same run again:",
        "curriculum": f"Stage {run.shown} again, by itself:",
    }[run.kind]
    notes = [el("p", c.text, class_="soft") for c in caveats(run) if c.level == "note"]
    assert run.config is not None
    every = el("details", el("summary", "Every setting"), table(tables.config_table(run.config)))
    title = f"Configuration of stage {run.shown}" if run.stages else "Best configuration"
    return "best", title, join(el("p", words), el("pre", command), *notes, every)


def _stages(run: RunReport) -> Section | None:
    if not run.stages:
        return None
    chart = el("div", lineage_chart(run.stages), class_="scroll")
    parts: list[Markup] = [el("h3", "Gates"), table(tables.stages_table(run))]
    searches = tables.searches_table(run)
    if searches.rows:
        parts += [el("h3", "Searches: what each chose"), table(searches)]
    body = join(chart, *parts, figures.stage_curves(run))
    return "stages", "Stages: lineage and gates", body


def _trials(run: RunReport) -> Section | None:
    if run.kind != "study" or not run.trials:
        return None
    data = tables.trials_table(run)
    if len(data.rows) <= _MANY_ROWS:
        return "trials", "Trials", table(data)
    summary = el("summary", f"The other {len(data.rows) - _FIRST_ROWS} trials")
    rest = el("details", summary, table(_part(data, slice(_FIRST_ROWS, None))))
    words = el("p", f"The best {_FIRST_ROWS} of {len(data.rows)}.", class_="soft")
    first = table(_part(data, slice(_FIRST_ROWS)))
    return "trials", "Trials", join(words, first, rest)


def _part(data: Table, rows: slice) -> Table:
    return dataclasses.replace(data, rows=data.rows[rows], styles=data.styles[rows])


def _history(run: RunReport) -> Section | None:
    if run.kind == "curriculum" or not any(t.reports for t in run.trials):
        return None
    curves = [
        figures.learning_curves(run, DEV_ACCURACY, "dev accuracy, %", 100),
        figures.learning_curves(run, TRAIN_LOSS, "training loss"),
    ]
    if run.kind == "study":
        curves.insert(0, figures.optimisation_history(run))
        compute = figures.best_for_compute(run)
        curves += [] if compute is None else [compute]
    else:
        curves.append(figures.learning_curves(run, LEARNING_RATE, "learning rate"))
    return "curves", "Optimisation and learning curves", el("div", *curves, class_="figures")


def _importances(run: RunReport) -> Section | None:
    if run.kind != "study" or run.search is None or not run.search.searched:
        return None
    found = importances(run)
    parts: list[Markup] = []
    if found.values:
        caption = f"{found.meaning}, by {found.method} over {found.num_trials} trials. {found.note}"
        parts.append(figures.figure(figures.importance_bars(dict(found.values)), caption))
    else:
        parts.append(el("p", f"No importances: {found.note}"))
    for name, count in found.left_out.items():
        parts.append(
            el("p", f"{name} exists in {count} trials only and is not ranked.", class_="soft")
        )
    slices = [p for n in run.search.searched if (p := figures.slice_plot(run, n)) is not None]
    if slices:
        parts.append(el("h3", "Slices: accuracy against each value"))
        parts.append(el("div", *slices, class_="figures small"))
    return "importance", "Which hyperparameters matter", join(*parts)


def _pareto(run: RunReport) -> Section | None:
    if run.kind != "study":
        return None
    memory = f"peak memory, MiB ({run.memory_of})" if run.memory_of else "peak memory, MiB"
    plots = [
        figures.pareto_plot(run, STEP_SECONDS, "time per step, ms", 1000),
        figures.pareto_plot(run, PEAK_MEMORY_MB, memory),
    ]
    if run.several:
        plots = [figures.objective_plot(run, name) for name in run.several if name != ACCURACY]
    found = [p for p in plots if p is not None]
    if not found:
        return None
    body = el("div", *found, class_="figures")
    if not run.several:
        return "pareto", "What accuracy costs", body
    title = f"The Pareto front of {', '.join(run.several)}"
    return "pareto", title, join(body, table(tables.front_table(run)))


def _rungs(run: RunReport) -> Section | None:
    if run.is_population:
        words = "The table of trials shows what each began with."
        body = join(el("p", words, class_="soft"), table(tables.population_table(run)))
        return "population", "The population: who took over whom", body
    rungs = stopping.filled_rungs(run)
    plot = stopping.rung_plot(run, rungs)
    if plot is None or run.search is None:
        return None
    listing = table(stopping.rungs_table(rungs, run.search.reduction_factor))
    return "asha", f"Early stopping: {stopping.rungs_title(run)}", join(plot, listing)


def _published(run: RunReport) -> Section | None:
    published, column = load(), column_of(run.task)
    if column is None:
        return None
    parts: list[Markup] = []
    if not comparable(run):
        words = (
            "Not a comparison: see the notes at the top of this page. The tables show what a full "
            "run on the published data would stand beside."
        )
        parts.append(el("p", words, class_="banner"))
    if run.attention.startswith("butterfly"):
        parts.append(el("p", published.not_found))
    if column in published.traps:
        parts.append(el("p", published.traps[column], class_="soft"))
    near = {"lra", "nystromformer", "flashattention"}
    parts.append(table(tables.published_table(run, published, near)))
    records = table(tables.published_table(run, published, {"records"}))
    parts.append(el("details", el("summary", "Best records of any kind of model"), records))
    sources = []
    for s in published.sources.values():
        link = el("a", s.url, href=s.url)
        sources.append(el("li", f"{s.title}. {s.note} Read from: {s.copy}. ", link))
    parts.append(el("details", el("summary", "Sources"), el("ul", *sources)))
    return "published", "Published numbers", join(*parts)


def _provenance(run: RunReport) -> Section | None:
    return "provenance", "Data and environment", table(tables.provenance(run))
