"""A run as markdown: the tables of the page, without its figures."""

from __future__ import annotations

import math
import re

from dmx.format import MISSING
from dmx.reporting import stopping, tables
from dmx.reporting.caveats import caveats, comparable
from dmx.reporting.importance import importances
from dmx.reporting.published import column_of, load
from dmx.reporting.records import RunReport
from dmx.reporting.tables import Table
from dmx.reporting.text import train_command

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def escape(text: str) -> str:
    """A text that markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def table(data: Table) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(escape(c) for c in data.columns) + " |"]
    rules = ("---:" if i in data.numeric else "---" for i in range(len(data.columns)))
    lines.append("|" + "|".join(rules) + "|")
    for row, style in zip(data.rows, data.styles, strict=True):
        cells = [escape(c) for c in row]
        if style in ("best", "ours", "group"):
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render(run: RunReport) -> str:
    """The document."""
    kind = {"study": "Search of", "run": "Training of", "curriculum": "Curriculum of"}[run.kind]
    state = "complete" if run.complete else "not complete"
    parts = [
        f"# {escape(run.name)}",
        f"{kind} {escape(run.attention)} on {escape(run.task)}, {state}. "
        f"Data: **{escape(run.data)}**.",
    ]
    parts += [
        f"> **{escape(c.text)}**" if c.level == "severe" else f"> {escape(c.text)}"
        for c in caveats(run)
    ]
    test = tables.ours(run)
    seeds = f" over {len(run.finals.seeds)} seeds" if run.finals else ""
    seeds += f" (stage {escape(run.shown)})" if run.stages else ""
    best = run.best_trial
    if test != MISSING:
        parts.append(f"Test accuracy: {test} %{seeds}.")
    if best is not None and math.isfinite(best.best):
        stage = f"stage {run.shown}"
        where = {"study": f"trial {best.number}", "run": "", "curriculum": stage}[run.kind]
        where = f" ({escape(where)})" if where else ""
        parts.append(f"Best dev accuracy: {100 * best.best:.2f} %{where}.")
    command = train_command(run)
    if command:
        stage = f"Configuration of stage {escape(run.shown)}"
        title = stage if run.stages else "Best configuration"
        parts += [f"## {title}", f"```\n{command}\n```"]
    if run.stages:
        parts += ["## Stages", table(tables.stages_table(run))]
        if (searches := tables.searches_table(run)).rows:
            parts += ["## Searches: what each chose", table(searches)]
    if run.kind == "study" and run.trials:
        parts += ["## Trials", table(tables.trials_table(run))]
        if run.several:
            parts.append(f"## The Pareto front of {', '.join(run.several)}")
            parts.append(table(tables.front_table(run)))
        parts += _importance(run)
        if run.is_population:
            parts.append("## The population: who took over whom")
            parts.append(table(tables.population_table(run)))
        rungs = stopping.filled_rungs(run)
        if any(r.entries for r in rungs) and run.search is not None:
            parts.append(f"## {stopping.rungs_title(run)}")
            parts.append(table(stopping.rungs_table(rungs, run.search.reduction_factor)))
    if column_of(run.task) is not None:
        parts.append("## Published numbers")
        if not comparable(run):
            parts.append("Not a comparison: see the notes at the top.")
        parts.append(table(tables.published_table(run, load())))
        parts += [f"- {escape(s.title)}: <{s.url}>" for s in load().sources.values()]
    parts += ["## Data and environment", table(tables.provenance(run))]
    return "\n\n".join(parts) + "\n"


def _importance(run: RunReport) -> list[str]:
    found = importances(run)
    if not found.values:
        return ["## Importances", escape(found.note)]
    rows = [(k, f"{100 * v:.0f} %") for k, v in found.values.items()]
    note = f"{found.meaning}, by {found.method} over {found.num_trials} trials. {found.note}"
    return ["## Importances", table(tables.make("setting|>share", list(rows))), escape(note)]
