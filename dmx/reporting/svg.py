"""A small plotting library: lines, points and bars as SVG that the page's CSS colours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from dmx.reporting.axis import Axis
from dmx.reporting.markup import Markup, el, join

Point = tuple[float, float]
_NAME = (32, 12)
"""Width and height of a point's name, such as `#123`, in pixels."""


class Chart:
    """Collects shapes in data coordinates; `render` makes the SVG."""

    def __init__(
        self, title: str, x: Axis, y: Axis, *, width: int = 540, height: int = 300
    ) -> None:
        self.title, self.x, self.y = title, x, y
        self.width, self.height = width, height
        tick_width = max((len(text) for _, text in y.ticks(5)), default=3) * 6.6
        self.left, self.right, self.top, self.bottom = 34 + tick_width, 16, 14, 46
        self._shapes: list[Markup] = []
        self._over: list[Markup] = []
        self._named: list[Point] = []

    def at(self, x: float, y: float) -> Point:
        """Data coordinates -> picture coordinates."""
        across = self.width - self.left - self.right
        down = self.height - self.top - self.bottom
        return (
            round(self.left + self.x.place(x) * across, 1),
            round(self.top + (1 - self.y.place(y)) * down, 1),
        )

    def line(
        self, points: Sequence[Point], style: str, title: str = "", *, steps: bool = False
    ) -> None:
        """A line through finite points; `steps`: level until the next point."""
        finite = [p for p in points if all(map(math.isfinite, p))]
        if not finite:
            return
        places = [self.at(*p) for p in finite]
        if steps:
            corners = [places[0]]
            for (_, y0), (x1, y1) in itertools.pairwise(places):
                corners += [(x1, y0), (x1, y1)]
            places = corners
        path = " ".join(f"{x},{y}" for x, y in places)
        tip = el("title", title) if title else None
        self._shapes.append(el("polyline", tip, points=path, class_=f"line {style}"))

    def point(self, x: float, y: float, style: str, title: str = "", *, size: float = 4.5) -> None:
        """One point; nothing where a coordinate is not finite."""
        if not (math.isfinite(x) and math.isfinite(y)):
            return
        px, py = self.at(x, y)
        tip = el("title", title) if title else None
        if "failed" in style.split():
            left, right, top, base = px - size, px + size, py - size, py + size
            d = f"M{left},{top}L{right},{base}M{left},{base}L{right},{top}"
            self._shapes.append(el("path", tip, d=d, class_=f"point {style}"))
        else:
            self._shapes.append(el("circle", tip, cx=px, cy=py, r=size, class_=f"point {style}"))

    def level(self, y: float, text: str = "", style: str = "level") -> None:
        """A dashed horizontal line with a name at its right end."""
        if not (math.isfinite(y) and self.y.low <= y <= self.y.high):
            return
        _, py = self.at(self.x.low, y)
        right = self.width - self.right
        line = el("line", x1=self.left, x2=right, y1=py, y2=py, class_=style)
        self._shapes.append(line)
        if text:
            self.text(right - 4, py - 5, text, "end", "note")

    def boundary(self, x: float, text: str) -> None:
        """A vertical line with a name at its upper end, written downwards."""
        px, _ = self.at(x, self.y.low)
        base = self.height - self.bottom
        line = el("line", x1=px, x2=px, y1=self.top, y2=base, class_="boundary")
        self._shapes.append(line)
        place = f"translate({px + 5} {self.top + 4}) rotate(90)"
        self._over.append(el("text", text, transform=place, class_="label note"))

    def text(self, x: float, y: float, text: str, anchor: str = "start", style: str = "") -> None:
        """A text at picture coordinates, above all shapes."""
        self._over.append(
            el("text", text, x=x, y=y, text_anchor=anchor, class_=f"label {style}".strip())
        )

    def name(
        self, point: Point, text: str, offset: Point, anchor: str = "start", style: str = ""
    ) -> None:
        """A point's name beside it; one that would cover an earlier one is left out."""
        px, py = self.at(*point)
        if all(abs(px - a) > _NAME[0] or abs(py - b) > _NAME[1] for a, b in self._named):
            self._named.append((px, py))
            self.text(px + offset[0], py + offset[1], text, anchor, style)

    def render(self) -> Markup:
        """The SVG, scalable, with its title for screen readers."""
        return el(
            "svg",
            el("title", self.title),
            self._axes(),
            *self._shapes,
            *self._over,
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            class_="chart",
            style=f"min-width:{min(self.width, 330)}px;max-width:{self.width * 1.15:.0f}px",
        )

    def _axes(self) -> Markup:
        right, base = self.width - self.right, self.height - self.bottom
        parts = []
        room = (right - self.left) / 64
        for value, text in _thinned(self.x.ticks(max(int(room), 2)), right - self.left):
            px, _ = self.at(value, self.y.low)
            parts.append(el("line", x1=px, x2=px, y1=base, y2=base + 4, class_="tick"))
            parts.append(el("text", text, x=px, y=base + 17, text_anchor="middle", class_="label"))
        for value, text in self.y.ticks(5):
            _, py = self.at(self.x.low, value)
            parts.append(el("line", x1=self.left, x2=right, y1=py, y2=py, class_="grid"))
            parts.append(
                el("text", text, x=self.left - 7, y=py + 4, text_anchor="end", class_="label")
            )
        parts.append(el("line", x1=self.left, x2=right, y1=base, y2=base, class_="axis"))
        middle, height = (self.left + right) / 2, (self.top + base) / 2
        parts.append(
            el(
                *("text", self.x.label),
                x=middle,
                y=self.height - 8,
                text_anchor="middle",
                class_="name",
            )
        )
        parts.append(
            el(
                *("text", self.y.label),
                transform=f"translate(13 {height:.0f}) rotate(-90)",
                text_anchor="middle",
                class_="name",
            )
        )
        return join(*parts)


def _thinned(found: list[tuple[float, str]], room: float) -> list[tuple[float, str]]:
    """Every second, third, ... tick where the texts would touch."""
    widest = max((len(text) for _, text in found), default=1) * 6.6 + 10
    every = max(math.ceil(len(found) * widest / max(room, 1)), 1)
    return found[::every]


def bars(title: str, values: Sequence[tuple[str, float, str]], *, width: int = 600) -> Markup:
    """Horizontal bars: (name, share of the widest bar in 0..1, text behind the bar)."""
    row, left = 28, min(max((len(n) for n, _, _ in values), default=4) * 7.2 + 14, width * 0.45)
    room = width - left - 76
    parts = []
    for i, (name, share, text) in enumerate(values):
        y = 6 + i * row
        length = max(room * min(max(share, 0.0), 1.0), 1.5)
        parts.append(el("text", name, x=left - 8, y=y + 16, text_anchor="end", class_="label"))
        parts.append(el("rect", x=left, y=y + 3, width=length, height=row - 10, rx=3, class_="bar"))
        parts.append(el("text", text, x=left + length + 7, y=y + 16, class_="label"))
    height = 12 + row * len(values)
    return el(
        *("svg", el("title", title), *parts),
        viewBox=f"0 0 {width} {height}",
        role="img",
        class_="chart",
        style=f"min-width:{min(width, 330)}px;max-width:{width}px",
    )


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """(style, text) pairs as an HTML legend below a chart."""
    items = []
    for style, text in entries:
        if style.startswith("line"):
            mark = el("polyline", points="1,6 21,6", class_=style)
        elif "failed" in style:
            mark = el("path", d="M7,2L15,10M7,10L15,2", class_=style)
        else:
            mark = el("circle", cx=11, cy=6, r=4.5, class_=style)
        items.append(el("span", el("svg", mark, viewBox="0 0 22 12", class_="mark"), " ", text))
    return el("div", *items, class_="legend")
