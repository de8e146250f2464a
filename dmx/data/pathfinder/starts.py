"""Finding a free pixel to start a snake at: a dilation of the mask, 64 pixels at a time."""

from __future__ import annotations

import numpy as np

from dmx.data.pathfinder.board import Bits, Board
from dmx.data.pathfinder.compiled import helper
from dmx.data.pathfinder.geometry import Geometry


@helper
def count_bits(word: np.uint64) -> int:
    """Bits set in a word."""
    one, two, four = np.uint64(1), np.uint64(2), np.uint64(4)
    word = word - ((word >> one) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> two) & np.uint64(0x3333333333333333))
    word = (word + (word >> four)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))  # type: ignore[return-value]


@helper
def count_free(b: Board) -> int:
    """Pixels of the image whose mask is at most 0.3."""
    total = 0
    for n in range(b.free.size):
        total += count_bits(b.free[n] & b.inside[n])
    return total


@helper
def find_starts(g: Geometry, b: Board, zone: Bits, degree: int) -> int:
    """Collect in b.result the pixels where a first paddle of this direction finds its room free.

    Free means: all pixels under the paddle's kernel that lie inside the image are free and in the
    zone. Returns how many there are.
    """
    if not g.usable[degree]:
        return 0
    for n in range(b.source.size):
        b.source[n] = b.free[n] & zone[n]
        b.result[n] = b.inside[n]
    first = 1 + g.bit_frame * g.stride
    last = first + g.window * g.stride
    result = b.result[first:last]
    for k in range(g.kernel_ends[degree], g.kernel_ends[degree + 1]):
        offset = g.kernel_words[k]
        right = g.kernel_shifts[k]
        near = b.source[first + offset : last + offset]
        far = b.source[first + offset + 1 : last + offset + 1]
        rest = np.uint64(63) - right
        for n in range(result.size):
            result[n] &= (near[n] >> right) | ((far[n] << rest) << np.uint64(1))
    total = 0
    for n in range(result.size):
        total += count_bits(result[n])
    return total


@helper
def pick_start(g: Geometry, b: Board, rank: int) -> tuple[int, int]:
    """The pixel (y, x) of that rank in b.result, in row-major order."""
    n = 0
    while True:
        here = count_bits(b.result[n])
        if rank < here:
            break
        rank -= here
        n += 1
    word = b.result[n]
    for _ in range(rank):
        word &= word - np.uint64(1)
    bit = count_bits((word & (~word + np.uint64(1))) - np.uint64(1))
    place = n - 1 - g.bit_frame * g.stride
    return place // g.stride, (place % g.stride - 1) * 64 + bit
