"""The published LRA numbers (published.yaml), and which of them stand beside a task of ours."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from dmx.schema import read_yaml


class Column(NamedTuple):
    """A column of the published tables, and dmx's name of its task."""

    title: str
    task: str


COLUMNS = {
    "listops": Column("ListOps", "listops"),
    "text": Column("Text", "text"),
    "retrieval": Column("Retrieval", "retrieval"),
    "image": Column("Image", "image"),
    "pathfinder": Column("Pathfinder", "pathfinder32-curv_contour_length_14"),
    "pathx": Column("Path-X", "pathfinder128-curv_contour_length_14"),
}
"""In their order."""
CHANCE = {"pathx": 50.0}
"""What failing means, in per cent, where papers report failure."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where numbers were read."""

    title: str
    url: str
    copy: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of one source; accuracies in per cent, by column.

    Attributes:
        attention: dmx's name of the attention, or "". chance: columns where it failed to learn.
    """

    source: str
    model: str
    attention: str = ""
    accuracies: Mapping[str, float]
    chance: tuple[str, ...] = ()
    average: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Published:
    """All of it. `traps`: what to know before comparing, by column."""

    sources: Mapping[str, Source]
    rows: tuple[Row, ...]
    not_found: str
    traps: Mapping[str, str]

    def of(self, column: str | None) -> tuple[Row, ...]:
        """Rows that report a column, failures included, source by source, best first."""
        order = list(self.sources)
        found = [r for r in self.rows if column in r.accuracies or column in r.chance]
        found.sort(key=lambda r: (order.index(r.source), -r.accuracies.get(str(column), 0.0)))
        return tuple(found)


def column_of(task: str) -> str | None:
    """The published column of a task; None for sets that nobody published on."""
    return next((name for name, column in COLUMNS.items() if column.task == task), None)


@functools.cache
def load_published() -> Published:
    """Read published.yaml, which ships with the package."""
    raw = read_yaml(Path(str(resources.files("dmx.reporting"))) / "published.yaml")

    def row(found: dict[str, Any]) -> Row:
        accuracies = {column: found.pop(column) for column in COLUMNS if column in found}
        return Row(accuracies=accuracies, chance=tuple(found.pop("chance", ())), **found)

    return Published(
        sources={key: Source(**value) for key, value in raw["sources"].items()},
        rows=tuple(map(row, raw["rows"])),
        not_found=raw["not_found"],
        traps=raw["traps"],
    )
