"""How values and settings read in a line of text or in a cell of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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
