"""One self-contained HTML page of a run: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dmx import __version__
from dmx.errors import DataError, DmxError
from dmx.format import duration, percent, scaled
from dmx.reporting import chart, export, figures, tables
from dmx.reporting.caveats import caveats, comparable
from dmx.reporting.export import train_command
from dmx.reporting.importance import importances
from dmx.reporting.published import column_of, load_published
from dmx.runs import layout
from dmx.runs.folders import kind_of, load, load_all, runs_below
from dmx.runs.layout import (
    DEV_ACCURACY,
    LEARNING_RATE,
    PARAMETERS,
    PEAK_MEMORY_MB,
    STEP_SECONDS,
    TRAIN_LOSS,
    TRAIN_SECONDS,
)
from dmx.runs.run import Run
from dmx.runs.stages import Stage
from dmx.runs.trial import ACCURACY

logger = logging.getLogger("dmx.report")

REPORT_FILE = "report.html"
_MAPS, _MAP_BYTES = 8, 1 << 20
"""At most so many attention maps are shown, none larger than that."""


def write_report(folder: Path, format: str = "html", out: str | None = None) -> None:
    """Write a run's report; without `out`, html goes to RUN/report.html and the rest to stdout.

    A folder of several runs gets a page in each; those that cannot be made are warned of.

    Args:
        format: one of FORMATS. out: a file, or "-" for stdout.

    Raises:
        DmxError: there is no run, or its files are damaged, or the file cannot be written.
    """
    if kind_of(folder) is None and format == "html" and out is None and runs_below(folder):
        _write_pages(runs_below(folder))
        return
    run = load(folder)
    text = FORMATS[format](run)
    if out is None and format == "html":
        out = str(run.folder / REPORT_FILE)
    export.write(text, out)


def _write_pages(folders: Sequence[Path]) -> None:
    errors: list[DmxError] = []
    for folder in folders:
        runs, unread = load_all([folder])
        errors += unread
        for run in runs:
            try:
                export.write(render_page(run), str(folder / REPORT_FILE))
            except DmxError as error:
                errors.append(error)
            except Exception as error:  # of what a foreign file holds; it must not hide the others
                errors.append(DataError(f"{folder} cannot be shown ({type(error).__name__})."))
    if len(errors) == len(folders):
        raise errors[0]
    sys.stdout.flush()
    for left_out in errors:
        logger.warning("left out: %s", left_out)


def write_page(folder: Path) -> Path | None:
    """Write a run's page into its folder, at its end; None where that fails, which costs no run."""
    path = folder / REPORT_FILE
    try:
        export.write_file(path, render_page(load(folder)))
    except (DmxError, OSError) as error:
        logger.warning("no report was written: %s", error)
        return None
    return path


def render(title: str, **values: Any) -> str:
    """The page with its style sheet; texts are escaped, Markup is not."""
    import jinja2
    from markupsafe import Markup

    own = resources.files("dmx.reporting")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else chart.clean(value),
    )
    css = Markup(own.joinpath("page.css").read_text("utf-8"))
    template = environment.from_string(own.joinpath("page.html.j2").read_text("utf-8"))
    defaults: dict[str, Any] = {"run": None, "boards": (), "css": css, "version": __version__}
    return template.render(defaults | {"title": title} | values) + "\n"


def render_page(run: Run) -> str:
    """The page of a study, a single run or a curriculum; the same bytes for the same run."""
    what = {"study": "Search of", "run": "Training of", "curriculum": "Curriculum of"}[run.kind]
    published, column = load_published(), column_of(run.task)
    near = {"lra", "nystromformer", "flashattention"}
    found = importances(run)
    rungs = tables.filled_rungs(run)
    return render(
        f"{run.name}: {run.attention} on {run.task}",
        run=run,
        subtitle=f"{what} {run.attention} on {run.task}",
        tiles=_tiles(run),
        caveats=caveats(run),
        comparable=comparable(run),
        command=train_command(run),
        config=tables.config_table(run.config or {}),
        chains=_chains(run.stages),
        scores=_scores,
        gates=tables.stages_table(run),
        searches=tables.searches_table(run),
        stage_curves=figures.stage_curves(run),
        trials_table=tables.trials_table(run),
        curves=_curves(run),
        importances=found,
        bars=figures.importance_bars(found) if found.values else None,
        slices=_slices(run),
        parallel=figures.parallel_view(run),
        fronts=_fronts(run),
        front_table=tables.front_table(run),
        population_table=tables.population_table(run),
        rung_plot=figures.rung_plot(run, rungs),
        rungs_title=tables.rungs_title(run),
        rungs_table=tables.rungs_table(run, rungs),
        published=published,
        published_near=tables.published_table(run, published, near) if column else None,
        published_records=tables.published_table(run, published, {"records"}),
        trap=published.traps.get(column or ""),
        samples=_samples(run),
        maps=_maps(run.folder / "attention_maps"),
        provenance=tables.provenance(run),
    )


FORMATS: dict[str, Callable[[Run], str]] = {
    "html": render_page,
    "md": export.to_markdown,
    "json": export.to_json,
    "csv": export.to_csv,
}


def _tiles(run: Run) -> list[tuple[str, str]]:
    """(figure, what it is) of the headline."""
    best = run.best_trial
    found: list[tuple[str, str]] = []
    if run.finals is not None:
        seeds = len(run.finals.seeds)
        found.append((tables.ours(run) + " %", f"test accuracy over {seeds} seeds"))
    if math.isfinite(run.test_accuracy):
        which = f"stage {run.shown}" if run.stages else "best checkpoint"
        found.append((percent(run.test_accuracy) + " %", f"test accuracy, {which}"))
    if best is not None:
        what = "best dev accuracy" + (f", stage {run.shown}" if run.stages else "")
        at = f", step {run.best_step:,}" if run.best_step else ""
        found.append((percent(best.best) + " %", what + at))
    if run.kind == "study":
        ended = {s: run.count(s) for s in ("COMPLETE", "PRUNED", "FAILED", "RUNNING")}
        words = ("full", "stopped early", "failed", "not ended")
        text = ", ".join(f"{n} {w}" for n, w in zip(ended.values(), words, strict=True) if n)
        found.append((str(len(run.trials)), f"trials: {text}"))
    if run.stages:
        passed = sum(s.status == "passed" for s in run.stages)
        found.append((f"{passed} of {len(run.stages)}", "stages passed"))
    trained = math.fsum(s for t in run.trials if math.isfinite(s := t.last(TRAIN_SECONDS)))
    if math.isfinite(run.train_seconds):
        trained = run.train_seconds
    if math.isfinite(run.seconds):
        what = "attempts" if run.stages else "trials"
        inside = f"; training of all {what} {duration(trained)}" if trained else ""
        found.append((duration(run.seconds), "wall time" + inside))
    elif trained:
        found.append((duration(trained), "training time"))
    if best is not None:
        whose = "the model" if run.stages else "the best model"
        found.append((scaled(best.last(PARAMETERS)), f"parameters of {whose}"))
    return found


def _chains(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages in rows: each follows its parent; a second child of a parent begins a row."""
    rows: list[list[Stage]] = []
    for stage in stages:
        row = next((r for r in rows if r[-1].name == stage.parent), None)
        if row is None:
            rows.append([stage])
        else:
            row.append(stage)
    return rows


def _scores(stage: Stage) -> str:
    scores = (("dev", stage.dev_accuracy), ("test", stage.test_accuracy))
    found = [f"{name} {percent(value)} %" for name, value in scores if math.isfinite(value)]
    return ", ".join(found) or "no accuracy yet"


def _curves(run: Run) -> list[figures.Figure | None]:
    if run.kind == "curriculum" or not any(t.reports for t in run.trials):
        return []
    found = [
        figures.learning_curves(run, DEV_ACCURACY, "dev accuracy, %", 100),
        figures.learning_curves(run, TRAIN_LOSS, "training loss"),
    ]
    if run.kind == "study":
        return [figures.optimisation_history(run), *found, figures.best_for_compute(run)]
    return [*found, figures.learning_curves(run, LEARNING_RATE, "learning rate")]


def _slices(run: Run) -> list[figures.Figure]:
    names = run.search.searched if run.kind == "study" and run.search else ()
    return [found for n in names if (found := figures.slice_plot(run, n)) is not None]


def _fronts(run: Run) -> list[figures.Figure]:
    """Accuracy against the other objectives of a study, or against what a trial cost."""
    if run.kind != "study":
        return []
    if run.several:
        found = [figures.objective_plot(run, name) for name in run.several if name != ACCURACY]
    else:
        memory = f"peak memory, MiB ({run.memory_of})" if run.memory_of else "peak memory, MiB"
        found = [
            figures.pareto_plot(run, STEP_SECONDS, "time per step, ms", 1000),
            figures.pareto_plot(run, PEAK_MEMORY_MB, memory),
        ]
    return [figure for figure in found if figure is not None]


def _samples(run: Run) -> tables.Table:
    """What the best checkpoint says about its sample examples; empty where it has none."""
    folder = run.folder / layout.BEST_DIR
    if not run.complete and run.kind == "study":
        folder = run.checkpoint
    titles = "example of the dev split|>label|>the model says|>with probability, %|right"
    try:
        found: Mapping[str, Any] = json.loads((folder / layout.SAMPLES_FILE).read_text("utf-8"))
        names = ("indices", "labels", "predictions", "probabilities")
        rows = [
            (str(i), str(y), str(said), percent(p[said], 1), "yes" if said == y else "no")
            for i, y, said, p in zip(*(found[name] for name in names), strict=True)
        ]
    except (OSError, ValueError, LookupError, TypeError):  # a view: it is not what a report is for
        rows = []
    return tables.make(titles, rows, [])


def _maps(folder: Path) -> list[tuple[str, str]]:
    """(name, base64) of the pictures that dmx.attention_maps has drawn of the best checkpoint."""
    paths = [p for p in sorted(folder.glob("*.png")) if p.stat().st_size <= _MAP_BYTES]
    return [(p.stem, base64.b64encode(p.read_bytes()).decode()) for p in paths[:_MAPS]]
