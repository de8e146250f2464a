"""Numbers, durations and settings as text, once for the terminal and for reports."""

from __future__ import annotations

import csv
import io
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"


def percent(value: float, digits: int = 2) -> str:
    """An accuracy in 0..1 as per cent, without the sign."""
    return f"{100 * value:.{digits}f}" if math.isfinite(value) else MISSING


def mean_and_deviation(values: tuple[float, ...]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for fewer than two values)."""
    finite = [v for v in values if math.isfinite(v)]
    mean = statistics.fmean(finite) if finite else math.nan
    return mean, statistics.stdev(finite) if len(finite) > 1 else math.nan


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
    power = 0
    while abs(value) >= base and power < 6:
        value, power = value / base, power + 1
    prefix = ("", "k", "M", "G", "T", "P", "E")[power]
    if base == 1024 and prefix:
        prefix = prefix.upper() + "i"
    digits = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{digits} {prefix}{unit}".strip()


def short_names(names: Sequence[str]) -> list[str]:
    """`block_size` for `attention.block_size`, where no other name ends so."""
    ends = [name.rpartition(".")[2] for name in names]
    return [e if ends.count(e) == 1 else n for n, e in zip(names, ends, strict=True)]


def settings_text(point: Mapping[str, Any]) -> str:
    """`{"attention.block_size": 64, ...}` as `block_size=64, ...`."""
    names = short_names(list(point))
    return ", ".join(f"{n}={short(v)}" for n, v in zip(names, point.values(), strict=True))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with every column that any of them has; a cell is empty where there is no number."""
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        missing = {k: "" for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
        writer.writerow({**row, **missing})
    return text.getvalue()


def command_line(module: str, argv: Sequence[str], *, add: str = "") -> str:
    """The command as a user would type it again, with an option added."""
    there = any(word == add or word.startswith(f"{add}=") for word in argv)
    words = [*argv, *([add] if add and not there else [])]
    return f"python -m {module} " + " ".join(shlex.quote(word) for word in words)
