"""The two discs that ask the question of an image, and its final scaling to 0..255."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dmx.data.pathfinder.paddles import reduce_clipped, reduce_raw


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
