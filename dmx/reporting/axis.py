"""Axes of a chart: where a value lies, and round numbers for its ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis from `low` to `high`.

    Attributes:
        log: logarithmic. categories: names at 0, 1, 2, ... instead of numbers.
        unit: behind each tick's number. whole: ticks only at whole numbers.
    """

    label: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    categories: tuple[str, ...] = ()
    unit: str = ""
    whole: bool = False

    @classmethod
    def around(cls, label: str, values: Sequence[float], *, log: bool = False) -> Axis:
        """An axis with some room around the finite values."""
        finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        if not finite:
            return cls(label=label)
        low, high = min(finite), max(finite)
        if log:
            factor = max((high / low) ** 0.06, 1.15)
            return cls(label=label, low=low / factor, high=high * factor, log=True)
        margin = (high - low) * 0.07 or abs(high) * 0.1 or 0.5
        return cls(label=label, low=low - margin, high=high + margin)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end; kept inside."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """(value, text) of about `count` round values."""
        if self.categories:
            return [(float(i), name) for i, name in enumerate(self.categories)]
        values = log_ticks(self.low, self.high, count) if self.log else []
        if len(values) < 2:
            values = ticks(self.low, self.high, count, whole=self.whole)
        return [(v, _number(v) + self.unit) for v in values]


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round values in [low, high], about `count` of them."""
    raw = (high - low) / max(count, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    if whole:
        step = max(float(math.ceil(step)), 1.0)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten in [low, high], with 2 and 5 between them where there is room."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors]
        found = [float(f"{v:.12g}") for v in found if low * 0.9999 <= v <= high * 1.0001]
        if len(found) <= count + 1:
            break
    return found
