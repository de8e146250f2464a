"""Numbers and commands as texts, the same in every format."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from dmx.overrides import flatten
from dmx.reporting.labels import attention_label
from dmx.reporting.records import RunReport
from dmx.runs.metrics import NUM_WORKERS

MISSING = "–"


def percent(value: float, digits: int = 2) -> str:
    """An accuracy in 0..1 as per cent, without the sign."""
    return f"{100 * value:.{digits}f}" if math.isfinite(value) else MISSING


def mean_and_deviation(values: tuple[float, ...]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for fewer than two values)."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return math.nan, math.nan
    mean = math.fsum(finite) / len(finite)
    if len(finite) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in finite) / (len(finite) - 1))


def with_spread(values: tuple[float, ...]) -> str:
    """`64.20 ± 0.31`, or the mean alone where there is one value."""
    mean, deviation = mean_and_deviation(values)
    return percent(mean) + (f" ± {percent(deviation)}" if math.isfinite(deviation) else "")


def short(value: Any) -> str:
    """Any value, in few characters."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return MISSING
        if value == 0:
            return "0"
        if abs(value) < 1e-3:
            return f"{value:.2e}".replace("e-0", "e-")
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def duration(seconds: float) -> str:
    """`3 h 12 min`, `4 min 5 s`, `41 s`, `210 ms`."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours / 24:.1f} days"


def scaled(value: float, unit: str = "", base: int = 1000) -> str:
    """`1.23 G` and the like; base 1024 for memory."""
    if not math.isfinite(value):
        return MISSING
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    prefix = prefixes[power]
    if base == 1024 and prefix:
        prefix = prefix.upper() + "i"
    digits = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{digits} {prefix}{unit}".strip()


def train_command(run: RunReport) -> str:
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
    words += _means(run)
    if reinit := run.init.get("reinit"):
        words.append(f"init.reinit=[{', '.join(map(str, reinit))}]")
    words += [f"{key}={_plain(value)}" for key, value in _differences(config, label).items()]
    return " ".join(shlex.quote(word) for word in words)


def _means(run: RunReport) -> list[str]:
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
