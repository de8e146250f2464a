"""One self-contained HTML page of a run: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import datetime
import math

from dmx import __version__
from dmx.format import duration, percent, scaled
from dmx.reporting import sections, tables
from dmx.reporting.caveats import caveats
from dmx.reporting.markup import Markup, el
from dmx.reporting.records import RunReport
from dmx.reporting.style import sheet
from dmx.runs.metrics import PARAMETERS, TRAIN_SECONDS


def render(run: RunReport) -> str:
    """The page."""
    found = sections.all_sections(run)
    links = [el("a", title, href=f"#{key}") for key, title, _ in found]
    label = el("span", f"data: {run.data}", class_="chip warn" if run.is_sample else "chip")
    what = {"study": "Search of", "run": "Training of", "curriculum": "Curriculum of"}[run.kind]
    head = el(
        "header",
        el("h1", run.name),
        el("p", f"{what} {run.attention} on {run.task}", class_="sub"),
        label,
        el("span", "complete" if run.complete else "not complete", class_="chip"),
        _banner(run),
        _tiles(run),
        el("nav", *links),
    )
    bodies = [el("section", el("h2", title), body, id=key) for key, title, body in found]
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    foot = el("footer", f"dmx {__version__}, report of {run.folder}, made {made}.")
    page = el(
        "html",
        el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", name="viewport", content="width=device-width,initial-scale=1"),
            el("title", f"{run.name}: {run.attention} on {run.task}"),
            el("style", sheet()),
        ),
        el("body", head, el("main", *bodies), foot),
        lang="en",
    )
    return "<!doctype html>\n" + page + "\n"


def _banner(run: RunReport) -> Markup | None:
    severe = [c for c in caveats(run) if c.level == "severe"]
    if not severe:
        return None
    return el("div", *(el("p", c.text) for c in severe), class_="banner", role="note")


def _tiles(run: RunReport) -> Markup:
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
    tiles = (
        el("div", el("b", b, class_="long" if len(b) > 10 else None), el("span", t), class_="tile")
        for b, t in found
    )
    return el("div", *tiles, class_="tiles")
