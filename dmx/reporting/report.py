"""A run as one page of HTML, markdown (the page without its figures), JSON (everything) or CSV."""

from __future__ import annotations

import base64
import json
import logging
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dmx import __version__
from dmx.attention.base import attention_label
from dmx.errors import ConfigError, DataError, DmxError
from dmx.format import csv_text, duration, percent, scaled
from dmx.reporting import figures, tables
from dmx.reporting.caveats import caveats, comparable
from dmx.reporting.chart import clean
from dmx.reporting.importance import importances
from dmx.reporting.published import column_of, load_published
from dmx.runs.curriculum import Stage
from dmx.runs.folders import kind_of, load, load_all, runs_below
from dmx.runs.layout import (
    DEV_ACCURACY,
    NUM_WORKERS,
    PEAK_MEMORY_MB,
    STEP_SECONDS,
    STEPS,
    TEST_ACCURACY,
)
from dmx.runs.run import Run
from dmx.runs.study import Study
from dmx.schema import finite, flatten
from dmx.storage.files import write_atomic

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
    own_page = format == "html" and out is None
    folders = (runs_below(folder) if own_page and kind_of(folder) is None else []) or [folder]
    runs, errors = load_all(folders)
    for run in runs:
        try:
            write(FORMATS[format](run), str(run.folder / REPORT_FILE) if own_page else out)
        except DmxError as error:
            errors.append(error)
        except Exception as error:  # of what a foreign file holds; it must not hide the others
            why = f"{type(error).__name__}: {error}"
            errors.append(DataError(f"{run.folder} cannot be shown ({why})."))
    if len(errors) == len(folders):
        raise errors[0]
    sys.stdout.flush()
    for left_out in errors:
        logger.warning("left out: %s", left_out)


def write_page(folder: Path) -> Path | None:
    """Write a run's page into its folder, at its end; None where that fails, which costs no run."""
    path = folder / REPORT_FILE
    try:
        write_file(path, to_html(load(folder)))
    except (DmxError, OSError) as error:
        logger.warning("no report was written: %s", error)
        return None
    return path


def write(text: str, out: str | None) -> None:
    """Write to stdout (None or "-"), or into a file whose name is printed."""
    if out in (None, "-"):
        sys.stdout.write(_printable(text))
    else:
        write_file(Path(str(out)), text)
        sys.stdout.write(f"{out}\n")


def write_file(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder; name a file")
        write_atomic(path, _printable(text))
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}.") from None


def _printable(text: str) -> str:
    """The text with a `?` for what no encoding can hold (names of files may be any bytes)."""
    return text.encode("utf-8", "replace").decode("utf-8")


# -- what stands where is in the templates ------------------------------------------------------


def render(format: str, title: str, **values: Any) -> str:
    """The page of a run, or of leaderboards; texts are escaped, Markup is not.

    Args:
        format: "html", "md", or, of leaderboards, "latex".
    """
    import jinja2

    escape = {"html": clean, "md": markdown_escape, "latex": latex_escape}[format]
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else escape(value),
        loader=jinja2.PackageLoader("dmx", "reporting"),
        trim_blocks=format != "html",
    )
    values = {"run": None, "boards": (), "version": __version__, "title": title, **values}
    page = environment.get_template(f"page.{format}.j2")
    return page.render(**values).strip() + "\n"


def markdown_escape(text: object) -> Markup:
    """A text that markdown shows as it is, on one line."""
    return Markup(re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(text).split())))


_LATEX = str.maketrans(
    {
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
        **{
            "<": r"\textless{}",
            ">": r"\textgreater{}",
            "|": r"\textbar{}",
            "–": "--",
            "±": r"$\pm$",
        },
        **{"†": r"$^\dagger$", "‡": r"$^\ddagger$", "*": r"$^\ast$", "§": r"$^\S$", "¶": r"$^\P$"},
        **{c: f"\\{c}" for c in "#$%&_{}"},
    }
)


def latex_escape(text: object) -> Markup:
    """A text that LaTeX sets as it is."""
    return Markup(" ".join(str(text).split()).translate(_LATEX))


def to_html(run: Run) -> str:
    """The page of a study, a single run or a curriculum; the same bytes for the same run.

    It is self-contained: no scripts, nothing loaded from elsewhere.
    """
    return _page("html", run)


def to_markdown(run: Run) -> str:
    """The tables of the page."""
    return _page("md", run)


def _page(format: str, run: Run) -> str:
    what = {"study": "Search of", "run": "Training of", "curriculum": "Curriculum of"}[run.kind]
    column = column_of(run.task)
    return render(
        format,
        f"{run.name}: {run.attention} on {run.task}",
        run=run,
        subtitle=f"{what} {run.attention} on {run.task}",
        caveats=caveats(run),
        command=train_command(run),
        importances=importances(run),
        rungs=tables.filled_rungs(run),
        published=load_published() if column else None,
        trap=load_published().traps.get(column or ""),
        chains=_chains(run.stages),
        maps=_maps(run.folder / "attention_maps"),
        **{"tables": tables, "figures": figures},
        **{"percent": percent, "duration": duration, "scaled": scaled},
    )


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


def _maps(folder: Path) -> list[tuple[str, str]]:
    """(name, base64) of the pictures that dmx.attention_maps has drawn of the best checkpoint."""
    paths = [p for p in sorted(folder.glob("*.png")) if p.stat().st_size <= _MAP_BYTES]
    return [(p.stem, base64.b64encode(p.read_bytes()).decode()) for p in paths[:_MAPS]]


# -- CSV and JSON -----------------------------------------------------------------------------


def to_csv(run: Run) -> str:
    """Trials of a study, stages of a curriculum, evaluations of a single run."""
    about = {"run": run.name, "attention": run.attention, "task": run.task}
    if isinstance(run, Study):
        return csv_text([{**about, **row} for row in run.trial_rows()])
    if run.kind == "run":
        return csv_text(
            [{**about, "data": run.data, **r} for t in run.trials[:1] for r in t.reports]
        )
    return csv_text(
        [
            {
                "run": run.name,
                "stage": s.name,
                "task": s.task,
                "data": s.data,
                "status": s.progress,
                "parent": s.parent,
                "attempts": len(s.attempts),
                DEV_ACCURACY: s.dev_accuracy,
                TEST_ACCURACY: s.test_accuracy,
                STEPS: s.steps,
                "test_accuracy_on_last_stage": s.test_on_last,
                "attention": s.attention,
                "all_steps": s.all_steps,
                "all_train_seconds": s.seconds,
            }
            for s in run.stages
        ]
    )


_RUN = (
    *("kind", "name", "folder", "task", "attention", "data", "is_sample", "data_checksum"),
    *("complete", "config", "best", "best_step", "test_accuracy", "test_loss", "finals", "search"),
    *("environment", "options", "seconds", "train_seconds", "goal", "shown", "recipe"),
    *("num_dev", "dev_majority"),
)
_TRIAL = ("number", "status", "params", "drawn", "reports", "error")
_STAGE = (
    *("name", "task", "attention", "data", "data_checksum", "parent", "steps"),
    *("all_steps", "seconds", "dev_accuracy", "test_accuracy", "test_on_last", "checkpoint"),
    *("start", "data_root", "reinit", "config"),
)
_ATTEMPT = ("number", "reports", "passed", "reason", "steps", "all_steps", "search")


def _plain(value: object, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def to_json(run: Run) -> str:
    """Everything the report knows, with what it worked out. Accuracies lie in 0..1."""
    stages = [
        {
            **_plain(stage, _STAGE),
            "status": stage.progress,
            "promoted": stage.promoted_attempt,
            "attempts": [
                {**_plain(a, _ATTEMPT), "seconds": a.all_seconds if a.reports else None}
                for a in stage.attempts
            ],
        }
        for stage in run.stages
    ]
    costs = (STEP_SECONDS, PEAK_MEMORY_MB)
    content = {
        **_plain(run, _RUN),
        "trials": [_plain(trial, _TRIAL) for trial in run.trials],
        "stages": stages,
        "caveats": caveats(run),
        "comparable_with_published": comparable(run),
        "command": train_command(run),
        "importances": importances(run),
        "pareto": {key: tables.front(tables.costed(run, key)) for key in costs},
        "front": {t.number: t.values for t in run.best_trials} if run.several else {},
        "rungs": tables.filled_rungs(run),
        "published": load_published().of(column_of(run.task)),
    }
    return json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Run], str]] = {
    "html": to_html,
    "md": to_markdown,
    "json": to_json,
    "csv": to_csv,
}


# -- the command that trains the best configuration again ---------------------------------------


def train_command(run: Run) -> str:
    """The command that trains the best configuration again, with all that is not a default.

    It names only what differs from the task's preset and the defaults, so that it stays readable.
    """
    config = run.config
    if config is None or not isinstance(config.get("task"), str):
        return ""
    label = attention_label(config)
    stage, env = run.shown_stage, run.environment
    root = run.options.get("data_root") if stage is None else stage.data_root
    start = run.init.get("path") if stage is None else stage.start
    reinit = run.init.get("reinit") if stage is None else stage.reinit
    last = run.best_trial.last(NUM_WORKERS) if run.best_trial else math.nan
    workers = int(last) if math.isfinite(last) else 1
    on_cpu = env.get("device") == "cpu"
    words = ["python", "-m", "dmx.train", "--attention", label, "--task", str(config["task"])]
    words += ["--name", f"{run.name}-again"]
    words += ["--data-root", str(root)] if root else []
    words += ["--init-from", str(start)] if start else []
    if on_cpu and isinstance(env.get("threads"), int):  # the bits of a result depend on them
        words += ["--threads", str(env["threads"] * workers)]
    if workers > 1:
        words += ["--workers-per-trial" if on_cpu else "--gpus-per-trial", str(workers)]
    words += [f"init.reinit=[{', '.join(map(str, reinit))}]"] if reinit else []
    words += [f"{key}={_as_yaml(value)}" for key, value in _differences(config, label).items()]
    return shlex.join(words)


def _differences(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Dotted settings that `--attention LABEL --task TASK` alone would not give.

    One at a time, since a setting may bring another along (a butterfly's inner dropout).
    """
    from dmx.config import parse_run_config
    from dmx.schema import to_dict

    sizes = ("model.vocab_size", "model.max_length", "model.num_classes", "data.root")
    skipped = ("task", "attention.name", "init", "init.path", "init.sha256", "init.reinit", *sizes)
    ours = {k: v for k, v in flatten(config).items() if k not in skipped}
    found: dict[str, Any] = {}
    for _ in ours:
        try:
            layers = {"task": config["task"], "attention": label}
            default = flatten(to_dict(parse_run_config(layers, found)))
        except ConfigError:  # impossible half-way: give every setting
            return ours
        open_keys = (k for k, v in ours.items() if k not in found and default.get(k) != v)
        key = next(open_keys, None)
        if key is None:
            break
        parent = key.rpartition(".")[0]
        if parent.count(".") and f"{parent}.name" in ours:  # a nested choice needs its name
            found[f"{parent}.name"] = ours[f"{parent}.name"]
        found[key] = ours[key]
    return found


def _as_yaml(value: Any) -> str:
    """A value as YAML reads it back."""
    return value if isinstance(value, str) else json.dumps(value)
