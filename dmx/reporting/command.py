"""The command that trains the best configuration of a run again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from dmx.attention.labels import attention_label
from dmx.runs.metrics import NUM_WORKERS
from dmx.runs.run import Run
from dmx.schema import flatten


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
    if reinit := run.init.get("reinit"):
        words.append(f"init.reinit=[{', '.join(map(str, reinit))}]")
    words += [f"{key}={_plain(value)}" for key, value in _differences(config, label).items()]
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


def _plain(value: Any) -> str:
    """A value as YAML reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)
