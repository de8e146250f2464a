"""A run as markdown (the page without its figures), JSON (everything), CSV, and as a command."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmx.attention.base import attention_label
from dmx.errors import ConfigError
from dmx.format import MISSING
from dmx.reporting import tables
from dmx.reporting.caveats import caveats, comparable
from dmx.reporting.importance import importances
from dmx.reporting.published import column_of, load_published
from dmx.reporting.tables import escape
from dmx.runs.layout import (
    BEST_DEV_ACCURACY,
    DEV_ACCURACY,
    NUM_WORKERS,
    PEAK_MEMORY_MB,
    STEP_SECONDS,
    STEPS,
    TEST_ACCURACY,
)
from dmx.runs.run import Run
from dmx.schema import finite, flatten
from dmx.storage.files import write_atomic


def write(text: str, out: str | None) -> None:
    """Write to stdout (None or "-"), or into a file whose name is printed."""
    if out in (None, "-"):
        sys.stdout.write(printable(text))
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
        write_atomic(path, printable(text))
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}.") from None


def printable(text: str) -> str:
    """The text with a `?` for what no encoding can hold (names of files may be any bytes)."""
    return text.encode("utf-8", "replace").decode("utf-8")


def csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with every column that any of them has; missing cells are empty."""
    import pandas as pd

    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = ([_cell(row.get(c)) for c in columns] for row in rows)
    return str(pd.DataFrame(cells, columns=columns, dtype=object).to_csv(index=False))


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_csv(run: Run) -> str:
    """Trials of a study, stages of a curriculum, evaluations of a single run."""
    common = {"run": run.name, "attention": run.attention, "task": run.task, "data": run.data}
    if run.kind == "run":
        return csv([{**common, **r} for t in run.trials[:1] for r in t.reports])
    if run.kind == "curriculum":
        return csv(
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
    rows = []
    front = tables.study_front(run)
    for trial in run.trials:
        last = dict(trial.reports[-1]) if trial.reports else {}
        last.pop(BEST_DEV_ACCURACY, None)
        row: dict[str, Any] = {"trial": trial.number, "status": trial.status}
        row[BEST_DEV_ACCURACY] = trial.best
        if run.several:
            row["front"] = "yes" if trial.number in front else "no"
            row |= {f"objective.{name}": value for name, value in trial.values.items()}
        rows.append({**common, **row, **last, **trial.params, "error": trial.error})
    return csv(rows)


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
    return {name: finite(getattr(value, name)) for name in names}


def to_json(run: Run) -> str:
    """Everything the report knows, with what it worked out. Accuracies lie in 0..1."""
    content = _plain(run, _RUN)
    content["trials"] = [_plain(trial, _TRIAL) for trial in run.trials]
    content["stages"] = [
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
    content["caveats"] = finite(caveats(run))
    content["comparable_with_published"] = comparable(run)
    content["command"] = train_command(run)
    content["importances"] = finite(importances(run))
    content["pareto"] = {
        key: finite(tables.front(tables.costed(run, key))) for key in (STEP_SECONDS, PEAK_MEMORY_MB)
    }
    content["front"] = finite(tables.study_front(run))
    content["rungs"] = finite(tables.filled_rungs(run))
    column = column_of(run.task)
    content["published"] = finite(load_published().of(column)) if column else []
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def to_markdown(run: Run) -> str:
    """The tables of the page."""
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
    if command := train_command(run):
        stage = f"Configuration of stage {escape(run.shown)}"
        parts += [f"## {stage if run.stages else 'Best configuration'}", f"```\n{command}\n```"]
    if run.stages:
        parts += ["## Stages", tables.stages_table(run).markdown()]
        if (searches := tables.searches_table(run)).rows:
            parts += ["## Searches: what each chose", searches.markdown()]
    if run.kind == "study" and run.trials:
        parts += _of_study(run)
    if column_of(run.task) is not None:
        parts.append("## Published numbers")
        if not comparable(run):
            parts.append("Not a comparison: see the notes at the top.")
        parts.append(tables.published_table(run, load_published()).markdown())
        parts += [f"- {escape(s.title)}: <{s.url}>" for s in load_published().sources.values()]
    parts += ["## Data and environment", tables.provenance(run).markdown()]
    return "\n\n".join(parts) + "\n"


def _of_study(run: Run) -> list[str]:
    parts = ["## Trials", tables.trials_table(run).markdown()]
    if run.several:
        parts += [f"## The Pareto front of {', '.join(run.several)}"]
        parts += [tables.front_table(run).markdown()]
    found = importances(run)
    parts.append("## Importances")
    if found.values:
        rows = [(k, f"{100 * v:.0f} %") for k, v in found.values.items()]
        parts.append(tables.make("setting|>share", rows).markdown())
        by = f"{found.meaning}, by {found.method} over {found.num_trials} trials. "
        parts.append(escape(by + found.note))
    else:
        parts.append(escape(found.note))
    if run.is_population:
        parts.append("## The population: who took over whom")
        parts.append(tables.population_table(run).markdown())
    rungs = tables.filled_rungs(run)
    if any(r.entries for r in rungs):
        parts.append(f"## {tables.rungs_title(run)}")
        parts.append(tables.rungs_table(run, rungs).markdown())
    return parts


def train_command(run: Run) -> str:
    """The command that trains the best configuration again, with all that is not a default.

    It names only what differs from the task's preset and the defaults, so that it stays readable.
    """
    config = run.config
    if config is None or not isinstance(config.get("task"), str):
        return ""
    label = attention_label(config)
    words = ["python", "-m", "dmx.train", "--attention", label, "--task", str(config["task"])]
    words += ["--name", f"{run.name}-again"]
    stage = run.shown_stage
    root = run.options.get("data_root") if stage is None else stage.data_root
    start = run.init.get("path") if stage is None else stage.start
    words += ["--data-root", str(root)] if root else []
    words += ["--init-from", str(start)] if start else []
    words += _resources(run)
    if reinit := run.init.get("reinit") if stage is None else stage.reinit:
        words.append(f"init.reinit=[{', '.join(map(str, reinit))}]")
    words += [f"{key}={_as_yaml(value)}" for key, value in _differences(config, label).items()]
    return " ".join(shlex.quote(word) for word in words)


def _resources(run: Run) -> list[str]:
    """Options for what the bits of a result depend on beside its settings."""
    env = run.environment
    threads, device = env.get("threads"), env.get("device")
    last = run.best_trial.last(NUM_WORKERS) if run.best_trial else math.nan
    workers = int(last) if math.isfinite(last) else 1
    words = []
    if device == "cpu" and isinstance(threads, int):
        words += ["--threads", str(threads * workers)]
    if workers > 1:
        words += ["--workers-per-trial" if device == "cpu" else "--gpus-per-trial", str(workers)]
    return words


def _differences(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Dotted settings that `--attention LABEL --task TASK` alone would not give.

    One at a time, since a setting may bring another along (a butterfly's inner dropout).
    """
    from dmx.config import parse_run_config
    from dmx.errors import ConfigError
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
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)
