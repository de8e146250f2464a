"""Pictures: a paddle at every angle, the mask that keeps others away, discs, final scaling."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

LANCZOS = Image.Resampling.LANCZOS


class PaddleShape(NamedTuple):
    """What a picture depends on besides the angle, in pixels (see GeneratorParameters)."""

    length: int
    thickness: float
    margin: int
    antialias: int

    @property
    def half(self) -> int:
        """Pixels from the centre of a picture, where the paddle starts, to its edge."""
        return self.length + math.ceil(self.thickness) + self.margin


class PaddlePictures(NamedTuple):
    """Read-only pictures [angles, 2 * half + 1, 2 * half + 1]; the paddle starts in the centre."""

    lines: NDArray[np.uint8]
    """The dash, 0..255, reduced with clipping."""
    raw_lines: NDArray[np.float32]
    """The dash, about 0..1, reduced in floating point: over- and undershoots of Lanczos kept."""
    masks: NDArray[np.uint8]
    """The dash widened by `margin`, 0..255."""


@lru_cache(maxsize=16)
def paddle_pictures(shape: PaddleShape, angles: tuple[float, ...]) -> PaddlePictures:
    """Draw a paddle at each angle (radians, from +x towards +y, that is downwards)."""
    canvases = np.stack([_draw(shape, angle) for angle in angles])
    widened = _widen(canvases, shape.margin * shape.antialias)
    side = 2 * shape.half + 1
    pictures = PaddlePictures(
        lines=np.stack([reduce_clipped(canvas, side, side) for canvas in canvases]),
        raw_lines=np.stack(
            [reduce_raw(canvas, side, side) / np.float32(255) for canvas in canvases]
        ),
        masks=np.stack([reduce_clipped(canvas, side, side) for canvas in widened]),
    )
    for array in pictures:
        array.setflags(write=False)
    return pictures


def move(coordinate: int, displacement: float) -> int:
    """One coordinate after a displacement, rounded up: the original's bias right and down."""
    return math.ceil(coordinate + displacement)


def disc_offsets(radius: int) -> NDArray[np.int64]:
    """All (dy, dx) with dy^2 + dx^2 <= radius^2, shape [n, 2]."""
    span = range(-radius, radius + 1)
    return np.array([(y, x) for y in span for x in span if y * y + x * x <= radius * radius])


def reduce_clipped(canvas: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Lanczos reduction in 8 bits: rounded and clipped to 0..255."""
    return np.asarray(Image.fromarray(canvas).resize((width, height), LANCZOS))


def reduce_raw(canvas: NDArray[np.floating], height: int, width: int) -> NDArray[np.float32]:
    """Lanczos reduction in single precision: neither rounded nor clipped."""
    image = Image.fromarray(np.asarray(canvas, dtype=np.float32))
    return np.asarray(image.resize((width, height), LANCZOS))


def _draw(shape: PaddleShape, angle: float) -> NDArray[np.uint8]:
    centre = shape.half * shape.antialias
    side = 2 * centre + 1
    length = float(shape.length * shape.antialias)
    # libm's sine, not numpy's: the original ran on libm, and a last-bit difference could move
    # the rounded end point by a pixel.
    end = (move(centre, length * math.cos(angle)), move(centre, length * math.sin(angle)))
    canvas = Image.new("F", (side, side), 0)
    width = round(shape.thickness * shape.antialias)
    ImageDraw.Draw(canvas).line([(centre, centre), end], fill=255, width=width)
    return np.asarray(canvas).astype(np.uint8)


def _widen(canvases: NDArray[np.uint8], radius: int) -> NDArray[np.uint8]:
    """Maximum over a disc around each pixel; what lies outside a canvas counts as 0."""
    height, width = canvases.shape[1:]
    framed = np.pad(canvases, ((0, 0), (radius, radius), (radius, radius)))
    widened = np.zeros_like(canvases)
    for dy, dx in disc_offsets(radius).tolist():
        shifted = framed[:, radius + dy : radius + dy + height, radius + dx : radius + dx + width]
        np.maximum(widened, shifted, out=widened)
    return widened


def add_disc(
    image: NDArray[np.float64], tip: tuple[int, int], radius: float, antialias: int, *, raw: bool
) -> None:
    """Brighten `image` [H, W] in place by a disc around `tip` (y, x).

    raw: reduced without clipping, up to 1.16 in the middle; otherwise 0..1.
    """
    reach = math.ceil(radius) + 8  # Lanczos spreads over 3 pixels; twice as far all is 0
    spans = []
    for centre, size in zip(tip, image.shape, strict=True):
        first, last = max(0, centre - reach), min(size, centre + reach + 1)
        if first >= last:
            return
        spans.append((first, last, centre - first))
    (top, bottom, y), (left, right, x) = spans
    disc = _disc(bottom - top, right - left, y, x, radius, antialias, raw)
    part = image[top:bottom, left:right]
    np.maximum(part, disc, out=part)


@lru_cache(maxsize=1024)
def _disc(
    height: int, width: int, y: int, x: int, radius: float, antialias: int, raw: bool
) -> NDArray[np.float64]:
    """A disc around (y, x) in a cut-out [height, width], which may end at the image's border."""
    rows = np.arange(-y * antialias, (height - y) * antialias)[:, None]
    columns = np.arange(-x * antialias, (width - x) * antialias)[None, :]
    full = rows**2 + columns**2 <= (radius * antialias) ** 2
    if raw:
        return reduce_raw(full.astype(np.float32), height, width).astype(np.float64)
    return reduce_clipped(full.astype(np.uint8) * np.uint8(255), height, width) / 255.0


def stretch(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Linear map of least..greatest to 0..255, rounded to nearest: as scipy's imsave did."""
    low, high = image.min(), image.max()
    scaled = (image - low) * (255.0 / ((high - low) or 1.0))
    return (scaled.clip(0, 255) + 0.5).astype(np.uint8)


def stretch_down(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Linear map of 0..greatest to 0..255, rounded down: as in the released LRA images."""
    return np.floor(255 * image / image.max()).astype(np.uint8)
