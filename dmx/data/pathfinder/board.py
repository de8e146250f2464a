"""The working memory of one image in the making, and its starting state."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmx.data.pathfinder.geometry import Geometry
from dmx.data.pathfinder.parameters import GeneratorParameters

Bits = NDArray[np.uint64]
"""A set of pixels. Pixel (y, x) is bit x % 64 of word 1 + (y + bit_frame) * stride + 1 + x // 64;
bits outside the image (rows above and below, words left and right, one guard word at each end)
are set where the set means `no obstacle`."""


class Counts(NamedTuple):
    """How many paddles and snakes an image has."""

    contour_length: int
    distractor_length: int
    num_distractors: int


class Board(NamedTuple):
    """Arrays that the compiled core reads and writes; owned by one generator, for one margin."""

    mask: NDArray[np.uint8]
    """[side * side] the image with a frame; 255 = taken, 0 in the frame."""
    free: Bits
    """Where the kept mask is at most 0.3, and the frame."""
    kept_mask: NDArray[np.uint8]
    """Without the snake that is being placed."""
    fresh_mask: NDArray[np.uint8]
    """The empty image: only its border of `padding` pixels is taken."""
    fresh_free: Bits
    inside: Bits
    """The image without the frame."""
    target_zone: Bits
    """All but the band of 2 * seed_distance along the border: no first target lies on that."""
    distractor_zone: Bits
    """All but a band of one pixel."""
    source: Bits
    result: Bits
    shares: NDArray[np.float64]
    """[K] the favoured candidates' weights, then their cumulated shares."""
    chosen: NDArray[np.int64]
    """[K] which candidates those are."""
    ranks: NDArray[np.int64]
    """[K] number of a candidate among those inside the image, -1 outside."""
    first: NDArray[np.int64]
    """[1] the candidate of rank 0."""
    lanes: NDArray[np.float64]
    """[8] running sums of the weights."""
    snakes: NDArray[np.int64]
    """[2, 6] of each growing snake: pivot y, x; direction; last paddle's start y, x and picture."""
    tips: NDArray[np.int64]
    """[2, 2, 2] start and end (y, x) of both targets."""
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
