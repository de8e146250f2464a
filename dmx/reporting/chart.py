"""A pair of axes as inline SVG: drawn by matplotlib, coloured by the page's CSS."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

COLOURS = {
    "complete": "#1f6feb",
    "pruned": "#8a94a3",
    "failed": "#c9302c",
    "best": "#d9620f",
    "other": "#2a9d78",
    "card": "#ffffff",
    "ink": "#1c2430",
    "soft": "#5b6675",
    "rule": "#e2e6eb",
}
"""What page.css calls --complete and so on; a picture that stands alone has them as they are."""
_VARIABLES = {colour: f"var(--{name},{colour})" for name, colour in COLOURS.items()}
_RC: Any = {
    "figure.dpi": 72,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a `$` in a name is a dollar
    "font.size": 11,
    "axes.edgecolor": COLOURS["soft"],
    "axes.labelcolor": COLOURS["ink"],
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "text.color": COLOURS["soft"],
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}
_NAME_ROOM = (30, 11)
"""Width and height of a point's name, such as `#123`."""
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
_SVG = "http://www.w3.org/2000/svg"

Point = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """`key`: (style, what it means) for the legend below the picture."""

    svg: Markup
    caption: str = ""
    key: tuple[tuple[str, str], ...] = ()


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """The style of all figures, which is nobody else's; decorates what draws one."""
    import matplotlib

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the measuring font lacks
        yield


class Chart:
    """A pair of axes, in pixels; within `drawing` only.

    Args:
        left: room for the names of the y axis' ticks, and for its own.
    """

    def __init__(
        self,
        title: str,
        x: str = "",
        y: str = "",
        *,
        width: int = 480,
        height: int = 280,
        left: int = 74,
    ) -> None:
        from matplotlib.figure import Figure as Canvas

        self._title, self._width = clean(title), width
        self._tips: list[list[str]] = []
        self._named: list[Point] = []
        self._canvas = Canvas(figsize=(width / 72, height / 72))
        self._canvas.subplots_adjust(left / width, 46 / height, 1 - 14 / width, 1 - 14 / height)
        self.axes = self._canvas.add_subplot(xlabel=clean(x), ylabel=clean(y))
        self.axes.yaxis.set_label_coords(-(left - 14) / (width - left - 14), 0.5)
        self.axes.xaxis.set_major_formatter(_tick)
        self.axes.yaxis.set_major_formatter(_tick)
        self.axes.yaxis.set_major_locator(_round_ticks(5))

    def line(
        self,
        points: Iterable[Point],
        style: str,
        tip: str = "",
        *,
        steps: bool = False,
        **more: Any,
    ) -> None:
        """A line through finite points; `steps`: level until the next point."""
        finite = [p for p in points if all(map(math.isfinite, p))]
        look: dict[str, Any] = {
            "color": _colour(style),
            "linewidth": {"best": 2.4, "pruned": 1.2}.get(style, 1.8),
            "linestyle": (0, (4, 3)) if style == "pruned" else "-",
            "drawstyle": "steps-post" if steps else "default",
            "zorder": 3 if style == "best" else 2,
        }
        if finite:
            gid = self._tip([tip] if tip else [])
            self.axes.plot(*zip(*finite, strict=True), clip_on=False, gid=gid, **look | more)

    def points(self, found: Iterable[tuple[float, float, str, str]], size: float = 7) -> None:
        """(x, y, style, tip) of each point; those of one style together, the best on top."""
        styles: dict[str, list[tuple[float, float, str]]] = {}
        for x, y, style, tip in found:
            if math.isfinite(x) and math.isfinite(y):
                styles.setdefault(style, []).append((x, y, tip))
        for style, points in styles.items():
            xs, ys, tips = zip(*points, strict=True)
            thin = style in ("pruned", "running", "failed")  # hollow, or a cross
            self.axes.plot(
                xs,
                ys,
                linestyle="none",
                marker="x" if style == "failed" else "o",
                markersize=size,
                markerfacecolor=COLOURS["card"] if thin else _colour(style),
                markeredgecolor=_colour(style) if thin else COLOURS["card"],
                markeredgewidth=1.6 if thin else 1,
                zorder=5 if style == "best" else 4,
                clip_on=False,
                gid=self._tip(tips),
            )

    def _tip(self, texts: Sequence[str]) -> str:
        self._tips.append(list(texts))
        return f"tips{len(self._tips) - 1}"

    def name(self, point: Point, text: str, offset: Point = (6, 5), **more: Any) -> None:
        """A point's name beside it; one that would cover an earlier one is left out."""
        x, y = self.axes.transData.transform(point)
        if all(abs(x - a) > _NAME_ROOM[0] or abs(y - b) > _NAME_ROOM[1] for a, b in self._named):
            self._named.append((x, y))
            self.axes.annotate(
                clean(text), point, offset, textcoords="offset points", fontsize=9, **more
            )

    def level(self, y: float, text: str) -> None:
        """A dotted horizontal line with a name at its right end, where it lies within the axes."""
        low, high = self.axes.get_ylim()
        if low <= y <= high:
            self.axes.axhline(y, color=COLOURS["soft"], linewidth=1, linestyle=":")
            place = self.axes.get_yaxis_transform()
            self.axes.text(1, y, text, ha="right", va="bottom", fontsize=10, transform=place)

    def whole_x(self, low: float, high: float) -> None:
        """The x axis from `low` to `high`, with ticks at whole numbers."""
        self.axes.set_xlim(low, high)
        self.axes.xaxis.set_major_locator(_round_ticks(6, integer=True))

    def range_x(
        self, values: Sequence[float], *, log: bool = False, whole: bool = False, count: int = 6
    ) -> float:
        """The x axis with some room around the values, linear or logarithmic; returns its end."""
        from matplotlib.ticker import LogLocator, NullLocator

        low, high = min(values), max(values)
        ticks = _round_ticks(count, integer=whole)
        if log:
            room = max((high / low) ** 0.06, 1.15)
            low, high = low / room, high * room
            self.axes.set_xscale("log")
            decades = math.log10(high / low)
            if decades > 0.6:
                subs = (1,) if decades > 2 else (1, 3) if decades > 1.2 else (1, 2, 5)
                ticks = LogLocator(subs=subs)
            self.axes.xaxis.set_minor_locator(NullLocator())
            self.axes.xaxis.set_major_formatter(_tick)
        else:
            room = (high - low) * 0.07 or abs(high) * 0.1 or 0.5
            low, high = low - room, high + room
        self.axes.set_xlim(low, high)
        self.axes.xaxis.set_major_locator(ticks)
        return high

    def names_x(self, names: Sequence[str]) -> None:
        """Names at 0, 1, 2, ...; some are left out where they would touch."""
        every = math.ceil(sum(len(n) * 6.5 + 10 for n in names) / (self._width - 80))
        self.axes.set_xticks(range(len(names))[::every], [clean(n) for n in names[::every]])
        self.axes.set_xlim(-0.6, len(names) - 0.4)

    def svg(self) -> Markup:
        """The picture, inline or as a file of its own; it scales with its place."""
        import matplotlib

        buffer = io.StringIO()
        # The salt makes ids that are the same on every run, and another figure's differ.
        with matplotlib.rc_context({"svg.hashsalt": self._title}):
            self._canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        used = set(re.findall(r"#([\w-]+)", buffer.getvalue()))
        root = ElementTree.fromstring(buffer.getvalue())
        for part in list(root)[:2]:  # metadata, and CSS that would hold for the whole page
            root.remove(part)
        for node in root.iter():
            node.tag = node.tag.rpartition("}")[2]
            node.attrib = {key.rpartition("}")[2]: _tidy(key, v) for key, v in node.attrib.items()}
            name = node.get("id", "")
            if name.startswith("tips"):
                _add_tips(node, self._tips[int(name.removeprefix("tips"))])
            if name not in used:
                node.attrib.pop("id", None)
        title = ElementTree.Element("title")
        title.text = self._title
        root.insert(0, title)
        least = 600 if self._width > 600 else min(self._width, 330)  # a phone scrolls the widest
        size = f"min-width:{least}px;max-width:{self._width * 1.25:.0f}px"
        root.attrib = {
            **{"xmlns": _SVG, "viewBox": root.attrib["viewBox"]},
            **{"class": "chart", "role": "img", "style": size},
        }
        return Markup(ElementTree.tostring(root, encoding="unicode"))


def clean(text: object) -> str:
    """A text without what XML cannot hold."""
    return _UNFIT.sub("\ufffd", str(text))


def _colour(style: str) -> str:
    return COLOURS["complete" if style == "running" else style]


def _tidy(key: str, value: str) -> str:
    """An attribute with the page's font and colours, in tenths of a pixel."""
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        return re.sub(r"#[0-9a-f]{6}", lambda m: _VARIABLES.get(m[0], m[0]), value)
    return re.sub(r"(\d\.\d)\d+", r"\1", value) if key in ("d", "x", "y", "transform") else value


def _add_tips(node: ElementTree.Element, texts: list[str]) -> None:
    """Titles, which a browser shows at the pointer: of each marker, or of a whole line."""
    marks = [inner for inner in node.iter() if inner.tag.endswith("use")] or [node]
    for mark, text in zip(marks, texts, strict=bool(texts)):  # a line may have none
        ElementTree.SubElement(mark, "title").text = clean(text)


def _tick(value: float, _: object = None) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}"


def _round_ticks(count: int, **more: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10], **more)
