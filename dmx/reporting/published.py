"""The published LRA numbers (published.yaml), and which of them stand beside a task of ours."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from dmx.errors import DataError
from dmx.schema import read_yaml

COLUMNS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
"""The columns of the published tables, in their order."""
TITLES = {
    "listops": "ListOps",
    "text": "Text",
    "retrieval": "Retrieval",
    "image": "Image",
    "pathfinder": "Pathfinder",
    "pathx": "Path-X",
}
_TASKS = {
    "listops": "listops",
    "text": "text",
    "retrieval": "retrieval",
    "image": "image",
    "pathfinder32-curv_contour_length_14": "pathfinder",
    "pathfinder128-curv_contour_length_14": "pathx",
}
CHANCE = {"pathx": 50.0}
"""What failing means, in per cent, where papers report failure."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where numbers were read."""

    key: str
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
    attention: str
    accuracies: Mapping[str, float]
    chance: tuple[str, ...]
    average: float


@dataclass(frozen=True, kw_only=True)
class Published:
    """All of it. `traps`: what to know before comparing, by column."""

    sources: Mapping[str, Source]
    rows: tuple[Row, ...]
    not_found: str
    traps: Mapping[str, str]

    def of(self, column: str) -> tuple[Row, ...]:
        """Rows that report a column, failures included, source by source, best first."""
        order = list(self.sources)
        found = [r for r in self.rows if column in r.accuracies or column in r.chance]
        found.sort(key=lambda r: (order.index(r.source), -r.accuracies.get(column, 0.0)))
        return tuple(found)


def column_of(task: str) -> str | None:
    """The published column of a task; None for sets that nobody published on."""
    return _TASKS.get(task)


@functools.cache
def load_published() -> Published:
    """Read published.yaml, which ships with the package.

    Raises:
        DataError: the file is damaged.
    """
    path = Path(str(resources.files("dmx.reporting"))) / "published.yaml"
    raw = read_yaml(path)
    try:
        sources = {key: Source(key=key, **value) for key, value in raw["sources"].items()}
        rows = tuple(
            Row(
                source=row["source"],
                model=str(row["model"]),
                attention=row.get("attention", ""),
                accuracies={c: float(row[c]) for c in COLUMNS if c in row},
                chance=tuple(row.get("chance", ())),
                average=float(row.get("average", math.nan)),
            )
            for row in raw["rows"]
        )
        if any(row.source not in sources for row in rows):
            raise KeyError("source")
        return Published(
            sources=sources,
            rows=rows,
            not_found=str(raw["not_found"]).strip(),
            traps=dict(raw["traps"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}.") from None
