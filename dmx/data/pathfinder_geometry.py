"""All that a snake can do from where it stands, in tables, and the working memory of an image.

Placing a snake needs no trigonometry so. A direction has a number: 0..359 are the whole degrees
-180..179 that first paddles take, from 360 on come the directions to the candidate points that a
next paddle may end at. Sines are libm's: rounded-up coordinates and therefore images would
otherwise depend on numpy's CPU dispatch.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dmx.data.pathfinder import GeneratorParameters, reduce_clipped, reduce_raw
from dmx.data.pathfinder_core import DEGREES

NEGLIGIBLE = 1e-30
"""A weight below it is the rounding error of cos(pi / 2)^2."""


class Geometry(NamedTuple):
    """Read-only tables for one margin. D = 360 + K directions, K candidates, S = 2 * half + 1."""

    contour_length: int
    distractor_length: int
    num_distractors: int
    window: int
    half: int
    frame: int  # pixels around the mask, so that no look-up near its border needs a check
    side: int  # of the mask with its frame
    bit_frame: int
    """Rows above and below the bit set of free pixels, for the same reason: length + margin, which
    is how far kernel and candidates reach."""
    stride: int  # 64-bit words of a row of the bit set, with one word of frame on each side
    levels: NDArray[np.float64]
    """[256] mask levels as the original holds them: k / 255 rounded to single precision."""
    masks: NDArray[np.uint8]  # [D, S, S] masks of a paddle that starts at the centre
    boxes: NDArray[np.int64]
    """[D, 4] top, left, bottom, right of a mask's pixels above 0, from the paddle's start."""
    steps: NDArray[np.float64]
    """[D, 2] (y, x) from one pivot to the next: over a paddle and the gap behind it."""
    heads: NDArray[np.float64]  # [360, 2] from the start of a first paddle to its end
    backs: NDArray[np.float64]
    """[360, 2] from the end of a first paddle to the pivot before its start."""
    ring: NDArray[np.float64]  # [360, 2] from the start of the first target to that of the second
    candidates: NDArray[np.int64]
    """[K, 2] from the pivot to the points where the next paddle may end, in (y, x) order."""
    weights: NDArray[np.float64]  # [D, K] preference for a candidate, given the last direction
    favoured_ends: NDArray[np.int64]
    """[D + 1] where each direction's part of `favoured` begins and ends."""
    favoured: NDArray[np.int64]
    """Candidates less than a quarter turn (over continuity) from a direction."""
    disc: NDArray[np.int64]  # offsets in the framed, flat mask of the pixels within `margin`
    kernel_ends: NDArray[np.int64]
    """[361] where each degree's part of `kernel_words` and `kernel_shifts` begins and ends."""
    kernel_words: NDArray[np.int64]
    kernel_shifts: NDArray[np.uint64]
    """A first paddle needs these pixels around its start free: words on, then bits to the right."""
    usable: NDArray[np.bool_]
    """[360] False: the original finds no start in this direction, see `_usable`."""


class PaddlePictures(NamedTuple):
    """Read-only pictures [D, S, S] of a paddle in every direction; it starts in the centre."""

    lines: NDArray[np.uint8]  # the dash, 0..255, reduced with clipping
    raw_lines: NDArray[np.float32]
    """The dash, about 0..1, reduced in floating point: over- and undershoots of Lanczos kept."""
    masks: NDArray[np.uint8]  # the dash widened by the margin, 0..255


@lru_cache(maxsize=16)
def pictures_for(parameters: GeneratorParameters, margin: int) -> PaddlePictures:
    """The pictures of all D directions, a candidate's drawn from the candidate to the pivot."""
    angles = [_radians(degree) for degree in range(-180, 180)]
    candidates = _candidates(parameters.paddle_length + margin)
    angles += [_opposite(math.atan2(y, x)) for y, x in candidates.tolist()]
    half = _half(parameters, margin)
    canvases = np.stack([_draw(parameters, half, angle) for angle in angles])
    widened = _widen(canvases, margin * parameters.antialias)
    side = 2 * half + 1
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


def _half(parameters: GeneratorParameters, margin: int) -> int:
    """Pixels from the centre of a picture, where the paddle starts, to its edge."""
    return parameters.paddle_length + math.ceil(parameters.paddle_thickness) + margin


def _draw(parameters: GeneratorParameters, half: int, angle: float) -> NDArray[np.uint8]:
    """A paddle at an angle (radians, from +x towards +y, that is downwards), enlarged."""
    centre = half * parameters.antialias
    length = float(parameters.paddle_length * parameters.antialias)
    # libm's sine, not numpy's: the original ran on libm, and a last-bit difference could move
    # the end point by a pixel; it is rounded up, the original's bias right and down.
    end = tuple(math.ceil(centre + length * move(angle)) for move in (math.cos, math.sin))
    canvas = Image.new("F", (2 * centre + 1, 2 * centre + 1), 0)
    width = round(parameters.paddle_thickness * parameters.antialias)
    ImageDraw.Draw(canvas).line([(centre, centre), end], fill=255, width=width)
    return np.asarray(canvas).astype(np.uint8)


def _widen(canvases: NDArray[np.uint8], radius: int) -> NDArray[np.uint8]:
    """Maximum over a disc around each pixel; what lies outside a canvas counts as 0."""
    height, width = canvases.shape[1:]
    framed = np.pad(canvases, ((0, 0), (radius, radius), (radius, radius)))
    widened = np.zeros_like(canvases)
    for dy, dx in _disc_offsets(radius).tolist():
        shifted = framed[:, radius + dy : radius + dy + height, radius + dx : radius + dx + width]
        np.maximum(widened, shifted, out=widened)
    return widened


def _disc_offsets(radius: int) -> NDArray[np.int64]:
    """All (dy, dx) with dy^2 + dx^2 <= radius^2, shape [n, 2]."""
    span = range(-radius, radius + 1)
    return np.array([(y, x) for y in span for x in span if y * y + x * x <= radius * radius])


@lru_cache(maxsize=32)
def geometry_for(parameters: GeneratorParameters, margin: int) -> Geometry:
    """Build the tables of one margin."""
    reach = parameters.paddle_length + margin
    half = _half(parameters, margin)
    frame = half + parameters.seed_distance
    side = parameters.window + 2 * frame
    degrees = [_radians(degree) for degree in range(-180, 180)]
    candidates = _candidates(reach)
    angles = [math.atan2(y, x) for y, x in candidates.tolist()]
    masks = pictures_for(parameters, margin).masks
    stride = -(-parameters.window // 64) + 2
    weights = _weights(degrees + angles, angles, parameters.continuity)
    favoured = [np.flatnonzero(row > NEGLIGIBLE) for row in weights]
    kernels = [_kernel(mask, half, reach) for mask in masks[:DEGREES]]
    flat = np.concatenate(kernels)
    geometry = Geometry(
        contour_length=parameters.contour_length,
        distractor_length=parameters.distractor_length,
        num_distractors=parameters.num_distractors,
        window=parameters.window,
        half=half,
        frame=frame,
        side=side,
        bit_frame=reach,
        stride=stride,
        levels=(np.arange(256) / 255.0).astype(np.float32).astype(np.float64),
        masks=masks,
        boxes=np.array([_box(mask) for mask in masks]) - half,
        steps=_displacements(degrees + angles, reach + margin),
        heads=_displacements(degrees, parameters.paddle_length),
        backs=_displacements([_opposite(angle) for angle in degrees], reach),
        ring=_displacements([_radians(degree) for degree in range(360)], parameters.seed_distance),
        candidates=candidates,
        weights=weights,
        favoured_ends=_ends(favoured),
        favoured=np.concatenate(favoured),
        disc=_disc_offsets(margin) @ np.array([side, 1]),
        kernel_ends=_ends(kernels),
        kernel_words=flat[:, 0] * stride + flat[:, 1] // 64,
        kernel_shifts=(flat[:, 1] % 64).astype(np.uint64),
        usable=np.array([_usable(kernel) for kernel in kernels]),
    )
    for array in geometry:
        if isinstance(array, np.ndarray):
            array.setflags(write=False)
    return geometry


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


def _candidates(radius: int) -> NDArray[np.int64]:
    """Pixels on the circle of that radius, one sample per pixel of its circumference.

    The original truncates pivot + offset; for points inside the image that is pivot + floor(offset)
    as long as no offset is within rounding error of an integer, other than being one.
    """
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


def _kernel(mask: NDArray[np.uint8], half: int, reach: int) -> NDArray[np.int64]:
    """Offsets [n, 2] from a start whose pixels must be free for a first paddle.

    Two traits of the original are kept: the paddle's mask lies one pixel right and down of the
    start, and only its full pixels count, so ringing of the Lanczos filter makes holes. Without a
    full pixel OpenCV's dilation takes the kernel's first corner.
    """
    first = half - reach - 1
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


Bits = NDArray[np.uint64]
"""A set of pixels. Pixel (y, x) is bit x % 64 of word 1 + (y + bit_frame) * stride + 1 + x // 64;
bits outside the image (rows above and below, words left and right, one guard word at each end)
are set where the set means `no obstacle`."""


class Board(NamedTuple):
    """Arrays that the compiled core reads and writes; owned by one generator, for one margin."""

    mask: NDArray[np.uint8]  # [side * side] the image with a frame; 255 = taken, 0 in the frame
    free: Bits  # where the kept mask is at most 0.3, and the frame
    kept_mask: NDArray[np.uint8]  # without the snake that is being placed
    fresh_mask: NDArray[np.uint8]  # the empty image: only its border of `padding` pixels is taken
    fresh_free: Bits
    inside: Bits  # the image without the frame
    target_zone: Bits
    """All but the band of 2 * seed_distance along the border: no first target lies on that."""
    distractor_zone: Bits  # all but a band of one pixel
    source: Bits
    result: Bits
    shares: NDArray[np.float64]  # [K] the favoured candidates' weights, then their cumulated shares
    chosen: NDArray[np.int64]  # [K] which candidates those are
    ranks: NDArray[np.int64]  # [K] number of a candidate among those inside the image, -1 outside
    first: NDArray[np.int64]  # [1] the candidate of rank 0
    lanes: NDArray[np.float64]  # [8] running sums of the weights
    snakes: NDArray[np.int64]
    """[2, 6] of each growing snake: pivot y, x; direction; last paddle's start y, x and picture."""
    tips: NDArray[np.int64]  # [2, 2, 2] start and end (y, x) of both targets
    paddles: NDArray[np.int64]
    """[most, 4] start y, x, picture and role of the paddles placed so far."""

    def clear(self) -> None:
        """Back to the empty image."""
        self.mask[:] = self.fresh_mask
        self.kept_mask[:] = self.fresh_mask
        self.free[:] = self.fresh_free


def make_board(parameters: GeneratorParameters, geometry: Geometry) -> Board:
    """Allocate a board for images of these parameters."""
    window, padding = parameters.window, parameters.padding
    image = np.full((window, window), 255, np.uint8)
    image[padding:-padding, padding:-padding] = 0
    fresh_mask = np.pad(image, geometry.frame).ravel()
    fresh_free = _all_but_band(geometry, padding)
    inside = ~_all_but_band(geometry, window)
    count = len(geometry.candidates)
    most = 2 * parameters.contour_length + parameters.num_distractors * parameters.distractor_length
    return Board(
        mask=fresh_mask.copy(),
        free=fresh_free.copy(),
        kept_mask=fresh_mask.copy(),
        fresh_mask=fresh_mask,
        fresh_free=fresh_free,
        inside=inside,
        target_zone=_all_but_band(geometry, 2 * parameters.seed_distance),
        distractor_zone=_all_but_band(geometry, 1),
        source=np.zeros_like(inside),
        result=np.zeros_like(inside),
        shares=np.zeros(count),
        chosen=np.zeros(count, np.int64),
        ranks=np.zeros(count, np.int64),
        first=np.zeros(1, np.int64),
        lanes=np.zeros(8),
        snakes=np.zeros((2, 6), np.int64),
        tips=np.zeros((2, 2, 2), np.int64),
        paddles=np.zeros((most, 4), np.int64),
    )


def _all_but_band(geometry: Geometry, band: int) -> Bits:
    """Every bit set but those of the image's pixels within `band` pixels of its border."""
    window, rows, words = geometry.window, geometry.bit_frame, geometry.stride
    pixels = np.ones((window + 2 * rows, words * 64), np.uint8)
    image = pixels[rows : rows + window, 64 : 64 + window]
    inner = image[band : window - band, band : window - band].copy()
    image[:] = 0
    image[band : window - band, band : window - band] = inner
    packed = np.packbits(pixels, axis=1, bitorder="little").reshape(-1).view("<u8")
    guard = np.full(1, 2**64 - 1, np.uint64)
    return np.concatenate([guard, packed.astype(np.uint64), guard])
