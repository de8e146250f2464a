"""Numbers, durations, settings and failures as text, once for the terminal and for reports."""

from __future__ import annotations

import csv
import io
import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

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


_HELP = {
    r"out of memory|allocate memory|OutOfMemory|does not fit": (
        "a smaller model or train.micro_batch_size needs less memory, and so do fewer trials at "
        "once (--max-concurrent-trials)"
    ),
    r"not finite": "search smaller learning rates, or set train.clip_gradient_norm=1.0",
    r"made no progress": "allow more time (--trial-timeout), or search smaller models",
    r"actor died|ActorDied|worker died|WorkerCrashed|NodeDied|SIGKILL": (
        "the system ended its process, mostly for want of memory: run fewer trials at once "
        "(--max-concurrent-trials) or smaller models"
    ),
    r"No space left|Disk quota": "make room on the disk, or give another --storage",
    r"reported no": "leave that objective out",
}
"""What an error says -> what would help."""


class Ended(Protocol):
    """The part of a trial, in a result or in a report, that says how it ended."""

    @property
    def number(self) -> int: ...
    @property
    def status(self) -> str: ...
    @property
    def error(self) -> str: ...


def describe_failures(trials: Sequence[Ended]) -> str:
    """What failed most, and what would help, in one sentence; "" where nothing failed.

    Errors that differ in numbers only are one.
    """
    failed = [t for t in trials if t.status == "FAILED"]
    if not failed:
        return ""
    kinds = [re.sub(r"\d[\d.,e+-]*", "#", trial.error) for trial in failed]
    ((most, times),) = Counter(kinds).most_common(1)
    first = failed[kinds.index(most)]
    error = first.error.rstrip(". ") or "it left no message"
    total = "All" if len(failed) == len(trials) else f"{len(failed)} of {len(trials)}"
    text = f"{total} {'trials' if len(trials) > 1 else 'trial'} failed"
    if times < len(failed):
        text += f", {times} of them"
    helps = (remedy for said, remedy in _HELP.items() if re.search(said, error))
    remedy = next(helps, f"trials/{first.number:04d}/error.txt may tell more")
    return f"{text} as trial {first.number}: {error}; {remedy}."


def command_line(module: str, argv: Sequence[str], *, add: str = "") -> str:
    """The command as a user would type it again, with an option added."""
    there = any(word == add or word.startswith(f"{add}=") for word in argv)
    words = [*argv, *([add] if add and not there else [])]
    return f"python -m {module} " + " ".join(shlex.quote(word) for word in words)
