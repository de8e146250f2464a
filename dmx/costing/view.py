"""An estimate as lines for the terminal, and as plain values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dmx.costing.estimate import Cost
from dmx.reporting.text import duration, scaled


def describe(cost: Cost) -> list[str]:
    """The estimate as lines for the terminal."""
    lines = [f"cost of the {cost.what}:"]
    low, high = cost.kinds[0], cost.kinds[-1]
    smallest = min(k.parameters for k in cost.kinds)
    greatest = max(k.parameters for k in cost.kinds)
    memory = [k.memory_bytes for k in cost.kinds]
    of = "" if cost.num_kinds == 1 else f" ({len(cost.kinds)} of {cost.num_kinds} sizes counted)"
    lines.append(f"  parameters: {_range(smallest, greatest)}{of}")
    lines.append(
        f"  per step: {_range(low.flops, high.flops, 'FLOP')}, "
        f"{_range(min(k.bytes for k in cost.kinds), max(k.bytes for k in cost.kinds), 'B', 1024)} "
        f"moved, {scaled(low.tokens)} real tokens"
    )
    needed = _range(min(memory), max(memory), "B", 1024)
    process = "" if cost.gpus_per_trial else "; the process itself needs about 400 MiB more"
    lines.append(f"  memory for weights, optimizer and activations: {needed}{process}")
    peaks = [p.peak_memory_bytes for p in cost.probes if p.peak_memory_bytes is not None]
    if peaks:
        lines.append(f"  memory measured on the GPU: {_range(min(peaks), max(peaks), 'B', 1024)}")
    if cost.num_trials > 1:
        lines.append(
            f"  optimizer steps: about {scaled(cost.steps.expected)} of {scaled(cost.steps.full)}; "
            f"early stopping saves about {100 * cost.steps.saved:.0f} %"
        )
    lines += _time_lines(cost)
    return lines


def _time_lines(cost: Cost) -> list[str]:
    if not cost.probes:
        return [f"  time: not estimated ({cost.note or 'nothing was measured'})"]
    times = [p.step_seconds for p in cost.probes]
    device = cost.probes[0].device
    lines = [
        f"  measured on {device}: {_span(times)} a step, "
        f"{_span([p.eval_seconds for p in cost.probes])} an evaluation"
    ]
    trial = cost.trial_seconds / max(cost.num_trials, 1)
    if cost.num_trials > 1:
        lines.append(f"  time: about {duration(trial)} a trial on average, {cost.slots} at once")
    lines.append(f"  wall time: about {duration(cost.wall_seconds)}, without start-up")
    if cost.gpus_per_trial:
        lines.append(f"  GPU-hours: about {cost.gpu_hours:.2f}")
    else:
        lines.append(f"  core-hours: about {cost.cpu_hours:.2f} (no GPU)")
    if cost.money is not None:
        lines.append(
            f"  money: about {cost.money:.2f} at {cost.price_per_gpu_hour:g} a GPU-hour"
            + ("" if cost.gpus_per_trial else "; no GPU is used")
        )
    return lines


def _range(low: float, high: float, unit: str = "", base: int = 1000) -> str:
    first, last = scaled(low, unit, base), scaled(high, unit, base)
    return first if first == last else f"{first} to {last}"


def _span(times: list[float]) -> str:
    first, last = duration(min(times)), duration(max(times))
    return first if first == last else f"{first} to {last}"


def to_plain(cost: Cost) -> dict[str, Any]:
    """For JSON: the estimate with what follows from it."""
    plain = dataclasses.asdict(cost)
    for key in ("step_seconds", "trial_seconds", "wall_seconds", "gpu_hours", "cpu_hours", "money"):
        value = getattr(cost, key)
        plain[key] = None if value is None or not math.isfinite(value) else value
    return plain
