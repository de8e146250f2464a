"""All that a snake can do from where it stands, in tables: so placing one needs no trigonometry.

A direction has a number: 0..359 are the whole degrees -180..179 that first paddles take, from 360
on come the directions to the candidate points that a next paddle may end at. Sines are libm's:
rounded-up coordinates and therefore images would otherwise depend on numpy's CPU dispatch.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmx.data.pathfinder.paddles import PaddlePictures, PaddleShape, disc_offsets, paddle_pictures
from dmx.data.pathfinder.parameters import GeneratorParameters

DEGREES = 360
FREE_LEVEL = 76
"""A pixel is free for a first paddle while its mask is at most 0.3, that is 76 of 255."""

NEGLIGIBLE = 1e-30
"""A weight below it is the rounding error of cos(pi / 2)^2."""


class Geometry(NamedTuple):
    """Read-only tables for one margin. D = 360 + K directions, K candidates, S = 2 * half + 1."""

    window: int
    half: int
    frame: int
    """Pixels around the mask, so that no look-up near its border needs a check."""
    side: int
    """Of the mask with its frame."""
    bit_frame: int
    """Rows above and below the bit set of free pixels, for the same reason: length + margin, which
    is how far kernel and candidates reach."""
    stride: int
    """64-bit words of a row of the bit set, with one word of frame on each side."""
    levels: NDArray[np.float64]
    """[256] mask levels as the original holds them: k / 255 rounded to single precision."""
    masks: NDArray[np.uint8]
    """[D, S, S] masks of a paddle that starts at the centre."""
    boxes: NDArray[np.int64]
    """[D, 4] top, left, bottom, right of a mask's pixels above 0, from the paddle's start."""
    steps: NDArray[np.float64]
    """[D, 2] (y, x) from one pivot to the next: over a paddle and the gap behind it."""
    heads: NDArray[np.float64]
    """[360, 2] from the start of a first paddle to its end."""
    backs: NDArray[np.float64]
    """[360, 2] from the end of a first paddle to the pivot before its start."""
    ring: NDArray[np.float64]
    """[360, 2] from the start of the first target to that of the second."""
    candidates: NDArray[np.int64]
    """[K, 2] from the pivot to the points where the next paddle may end, in (y, x) order."""
    weights: NDArray[np.float64]
    """[D, K] preference for a candidate, given the last direction."""
    favoured_ends: NDArray[np.int64]
    """[D + 1] where each direction's part of `favoured` begins and ends."""
    favoured: NDArray[np.int64]
    """Candidates less than a quarter turn (over continuity) from a direction."""
    disc: NDArray[np.int64]
    """Offsets in the framed, flat mask of the pixels within `margin`."""
    kernel_ends: NDArray[np.int64]
    """[361] where each degree's part of `kernel_words` and `kernel_shifts` begins and ends."""
    kernel_words: NDArray[np.int64]
    kernel_shifts: NDArray[np.uint64]
    """A first paddle needs these pixels around its start free: words on, then bits to the right."""
    usable: NDArray[np.bool_]
    """[360] False: the original finds no start in this direction, see `_usable`."""


def pictures_for(parameters: GeneratorParameters, margin: int) -> PaddlePictures:
    """The pictures of all D directions, a candidate's drawn from the candidate to the pivot."""
    shape = _shape(parameters, margin)
    angles = [_radians(degree) for degree in range(-180, 180)]
    angles += [_opposite(math.atan2(y, x)) for y, x in _candidates(shape).tolist()]
    return paddle_pictures(shape, tuple(angles))


@lru_cache(maxsize=32)
def geometry_for(parameters: GeneratorParameters, margin: int) -> Geometry:
    """Build the tables of one margin."""
    shape = _shape(parameters, margin)
    degrees = [_radians(degree) for degree in range(-180, 180)]
    candidates = _candidates(shape)
    angles = [math.atan2(y, x) for y, x in candidates.tolist()]
    frame = shape.half + parameters.seed_distance
    reach = shape.length + margin
    masks = pictures_for(parameters, margin).masks
    stride = -(-parameters.window // 64) + 2
    weights = _weights(degrees + angles, angles, parameters.continuity)
    favoured = [np.flatnonzero(row > NEGLIGIBLE) for row in weights]
    offsets = [_kernel(shape, mask) for mask in masks[:DEGREES]]
    flat = np.concatenate(offsets)
    geometry = Geometry(
        window=parameters.window,
        half=shape.half,
        frame=frame,
        side=parameters.window + 2 * frame,
        bit_frame=reach,
        stride=stride,
        levels=(np.arange(256) / 255.0).astype(np.float32).astype(np.float64),
        masks=masks,
        boxes=np.array([_box(mask) for mask in masks]) - shape.half,
        steps=_displacements(degrees + angles, shape.length + 2 * margin),
        heads=_displacements(degrees, shape.length),
        backs=_displacements([_opposite(angle) for angle in degrees], reach),
        ring=_displacements([_radians(degree) for degree in range(360)], parameters.seed_distance),
        candidates=candidates,
        weights=weights,
        favoured_ends=_ends(favoured),
        favoured=np.concatenate(favoured),
        disc=disc_offsets(margin) @ np.array([parameters.window + 2 * frame, 1]),
        kernel_ends=_ends(offsets),
        kernel_words=flat[:, 0] * stride + flat[:, 1] // 64,
        kernel_shifts=(flat[:, 1] % 64).astype(np.uint64),
        usable=np.array([_usable(part) for part in offsets]),
    )
    for array in geometry:
        if isinstance(array, np.ndarray):
            array.setflags(write=False)
    return geometry


def _shape(parameters: GeneratorParameters, margin: int) -> PaddleShape:
    return PaddleShape(
        parameters.paddle_length, parameters.paddle_thickness, margin, parameters.antialias
    )


def _radians(degree: int) -> float:
    return degree * math.pi / 180


def _opposite(angle: float) -> float:
    return angle + math.pi if angle < 0 else angle - math.pi


def _ends(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.cumsum([0] + [len(part) for part in parts])


def _box(mask: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _displacements(angles: list[float], distance: int) -> NDArray[np.float64]:
    far = float(distance)
    return np.array([(far * math.sin(angle), far * math.cos(angle)) for angle in angles])


def _candidates(shape: PaddleShape) -> NDArray[np.int64]:
    """Pixels on the circle of radius length + margin, one sample per pixel of its circumference.

    The original truncates pivot + offset; for points inside the image that is pivot + floor(offset)
    as long as no offset is within rounding error of an integer, other than being one.
    """
    radius = shape.length + shape.margin
    step = 360.0 / (2 * radius * math.pi)
    samples = (np.arange(0, 360, step) * math.pi / 180).tolist()
    offsets = _displacements(samples, radius)
    gaps = np.abs(offsets - np.rint(offsets))
    if np.any((gaps > 0) & (gaps < 1e-9)):
        raise AssertionError(f"radius {radius}: a candidate is not decided by its offset")
    return np.unique(np.floor(offsets).astype(np.int64), axis=0)


def _weights(last: list[float], new: list[float], continuity: float) -> NDArray[np.float64]:
    """cos^2 of the turn times continuity, 0 beyond a quarter circle."""
    weights = np.empty((len(last), len(new)))
    for row, before in enumerate(last):
        for column, angle in enumerate(new):
            difference = abs(angle - before)
            turn = min(min(difference, 2 * math.pi - difference) * continuity, 0.5 * math.pi)
            weights[row, column] = max(math.cos(turn), 0.0) ** 2
    return weights


def _kernel(shape: PaddleShape, mask: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Offsets [n, 2] from a start whose pixels must be free for a first paddle.

    Two traits of the original are kept: the paddle's mask lies one pixel right and down of the
    start, and only its full pixels count, so ringing of the Lanczos filter makes holes. Without a
    full pixel OpenCV's dilation takes the kernel's first corner.
    """
    reach = shape.length + shape.margin
    first = shape.half - reach - 1
    side = 2 * reach + 1
    full = np.argwhere(mask[first : first + side, first : first + side] == 255) - reach
    return full if len(full) else np.array([[-reach, -reach]])


def _usable(kernel: NDArray[np.int64]) -> bool:
    """Whether every pixel of the image has a pixel of the kernel inside the image.

    For one that has none, OpenCV's dilation returns the lowest number there is, and the original
    then declares all pixels taken. The corners are the worst pixels.
    """
    y, x = kernel[:, 0], kernel[:, 1]
    return all(
        bool(np.any((down * y >= 0) & (right * x >= 0))) for down in (1, -1) for right in (1, -1)
    )
