"""The lineage of a curriculum: which stage started from which, drawn as boxes and arrows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dmx.format import percent
from dmx.reporting.markup import Markup, el
from dmx.reporting.records import Stage

_WIDTH, _HEIGHT, _ACROSS, _DOWN = 208, 112, 44, 22
_PER_ROW = 4


def places(stages: Sequence[Stage]) -> dict[str, tuple[int, int]]:
    """(column, row) of each stage: children stand to the right of their parent.

    A second child of the same parent gets a row of its own. A chain longer than a row continues
    on the next row.
    """
    found: dict[str, tuple[int, int]] = {}
    used: set[tuple[int, int]] = set()
    for stage in stages:
        parent = found.get(stage.parent or "")
        column, row = (0, 0) if parent is None else (parent[0] + 1, parent[1])
        if column >= _PER_ROW:
            column, row = 0, row + 1
        while (column, row) in used or (parent is None and any(r == row for _, r in used)):
            row += 1
        used.add((column, row))
        found[stage.name] = (column, row)
    return found


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def lineage_chart(stages: Sequence[Stage]) -> Markup:
    """The SVG."""
    at = places(stages)
    columns = max((c for c, _ in at.values()), default=0) + 1
    rows = max((r for _, r in at.values()), default=0) + 1
    width = columns * (_WIDTH + _ACROSS) - _ACROSS + 20
    height = rows * (_HEIGHT + _DOWN) - _DOWN + 20
    parts: list[Markup] = [
        el(
            "defs",
            el(
                "marker",
                el("path", d="M0,0L8,4L0,8z", class_="arrowhead"),
                id="head",
                orient="auto",
                refX=7,
                refY=4,
                markerWidth=8,
                markerHeight=8,
            ),
        )
    ]
    for stage in stages:
        if stage.parent in at:
            parts.append(_arrow(_corner(at[stage.parent]), _corner(at[stage.name])))
    for stage in stages:
        parts.extend(_box(stage, *_corner(at[stage.name])))
    return el(
        *("svg", el("title", "Lineage of the stages"), *parts),
        viewBox=f"0 0 {width} {height}",
        role="img",
        class_="chart",
        style=f"min-width:{min(width, 900)}px;max-width:{width}px",
    )


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return 10 + place[0] * (_WIDTH + _ACROSS), 10 + place[1] * (_HEIGHT + _DOWN)


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> Markup:
    x0, y0 = start[0] + _WIDTH, start[1] + _HEIGHT // 2
    x1, y1 = end[0], end[1] + _HEIGHT // 2
    if x1 > x0:
        middle = x0 + _ACROSS // 2
        d = f"M{x0},{y0}L{middle},{y0}L{middle},{y1}L{x1},{y1}"
    else:  # on to the next row
        between = end[1] - _DOWN // 2
        x0, top = start[0] + _WIDTH // 2, start[1] + _HEIGHT
        x1 = end[0] + _WIDTH // 2
        d = f"M{x0},{top}L{x0},{between}L{x1},{between}L{x1},{end[1]}"
    return el("path", d=d, class_="arrow", marker_end="url(#head)")


def _box(stage: Stage, x: int, y: int) -> list[Markup]:
    style = {"passed": "box passed", "failed": "box failed"}.get(stage.status, "box")
    scores = []
    if math.isfinite(stage.dev_accuracy):
        scores.append(f"dev {percent(stage.dev_accuracy)} %")
    if math.isfinite(stage.test_accuracy):
        scores.append(f"test {percent(stage.test_accuracy)} %")
    tries = len(stage.attempts)
    state = stage.status + (f" after {tries} attempts" if tries > 1 else "")
    lines = (
        (_clip(stage.name, 28), "label strong"),
        (_clip(stage.task, 32) if stage.task != stage.name else "", "label note"),
        (_clip(stage.attention, 32), "label note"),
        (", ".join(scores) or "no accuracy yet", "label"),
        (state, "label note"),
    )
    tip = el("title", f"{stage.name}: {stage.task}, {stage.status}")
    found = [el("rect", tip, x=x, y=y, width=_WIDTH, height=_HEIGHT, rx=8, class_=style)]
    for i, (text, class_) in enumerate((t, c) for t, c in lines if t):
        found.append(el("text", text, x=x + 12, y=y + 22 + 20 * i, class_=class_))
    return found
