"""How values, settings and failures read in a line of text or in a cell of a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


def short(value: Any) -> str:
    """A value for a line or a table cell."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def short_names(names: Sequence[str]) -> list[str]:
    """`block_size` for `attention.block_size`, where no other name ends so."""
    ends = [name.rpartition(".")[2] for name in names]
    return [e if ends.count(e) == 1 else n for n, e in zip(names, ends, strict=True)]


def settings_text(point: Mapping[str, Any]) -> str:
    """`{"attention.block_size": 64, ...}` as `block_size=64, ...`."""
    names = short_names(list(point))
    return ", ".join(f"{n}={short(v)}" for n, v in zip(names, point.values(), strict=True))


_HELP = (
    (
        r"out of memory|allocate memory|OutOfMemory|does not fit",
        "a smaller model or train.micro_batch_size needs less memory, and so do fewer trials at "
        "once (--max-concurrent-trials)",
    ),
    (
        r"not finite",
        "search smaller learning rates, or set train.clip_gradient_norm=1.0",
    ),
    (
        r"made no progress",
        "allow more time (--trial-timeout), or search smaller models",
    ),
    (
        r"actor died|ActorDied|worker died|WorkerCrashed|NodeDied|SIGKILL",
        "the system ended its process, mostly for want of memory: run fewer trials at once "
        "(--max-concurrent-trials) or smaller models",
    ),
    (r"No space left|Disk quota", "make room on the disk, or give another --storage"),
    (r"reported no", "leave that objective out"),
)
"""(what an error says, what would help)."""


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
    kinds: dict[str, list[Ended]] = {}
    for trial in failed:
        kinds.setdefault(re.sub(r"\d[\d.,e+-]*", "#", trial.error), []).append(trial)
    most = max(kinds.values(), key=len)
    first = most[0]
    error = first.error.rstrip(". ") or "it left no message"
    total = "All" if len(failed) == len(trials) else f"{len(failed)} of {len(trials)}"
    text = f"{total} {'trials' if len(trials) > 1 else 'trial'} failed"
    if len(kinds) > 1:
        text += f", {len(most)} of them"
    text += f" as trial {first.number}: {error}"
    default = f"trials/{first.number:04d}/error.txt may tell more"
    return f"{text}; {next((h for said, h in _HELP if re.search(said, error)), default)}."
