"""Growing a snake by one paddle: weigh the points it may end at, draw one, take its room."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dmx.data.pathfinder.board import Board
from dmx.data.pathfinder.compiled import helper
from dmx.data.pathfinder.geometry import DEGREES, FREE_LEVEL, Geometry
from dmx.data.pathfinder.words import Cursor, Words, unit

TRIALS = 3
LEAST_TOTAL_WEIGHT = 1e-4
OVERLAP_LIMIT = 1.8


@helper
def extend(g: Geometry, b: Board, snake: NDArray[np.int64], words: Words, cursor: Cursor) -> bool:
    """Add a paddle to the snake (a row of b.snakes), or return False with the snake unchanged."""
    direction = snake[2]
    pivot_y = math.ceil(snake[0] + g.steps[direction, 0])
    pivot_x = math.ceil(snake[1] + g.steps[direction, 1])
    count = _rank_candidates(g, b, pivot_y, pivot_x)
    favoured = _weigh(g, b, pivot_y, pivot_x, direction, count)
    for _ in range(TRIALS if favoured > 0 else 0):
        share = unit(words, cursor)
        candidate = b.first[0]
        for n in range(favoured):
            if b.shares[n] - share > 0:
                candidate = b.chosen[n]
                break
        y = pivot_y + g.candidates[candidate, 0]
        x = pivot_x + g.candidates[candidate, 1]
        picture = DEGREES + candidate
        if _fits(g, b, y, x, picture):
            snake[0], snake[1], snake[2] = pivot_y, pivot_x, picture
            snake[3], snake[4], snake[5] = y, x, picture
            return True
    return False


@helper
def take(g: Geometry, b: Board, y: int, x: int, picture: int) -> None:
    """Enter a paddle's mask in the board's."""
    top, left, bottom, right = _box(g, y, x, picture)
    for i in range(top, bottom):
        row = (i + g.frame) * g.side + g.frame
        for j in range(left, right):
            level = g.masks[picture, i - y + g.half, j - x + g.half]
            if level > b.mask[row + j]:
                b.mask[row + j] = level


@helper
def keep(g: Geometry, b: Board, first: int, last: int) -> None:
    """Paddles first..last-1 belong to complete snakes: make what they took permanent."""
    for n in range(first, last):
        top, left, bottom, right = _box(g, b.paddles[n, 0], b.paddles[n, 1], b.paddles[n, 2])
        for i in range(top, bottom):
            row = (i + g.frame) * g.side + g.frame
            word = 1 + (i + g.bit_frame) * g.stride + 1
            for j in range(left, right):
                b.kept_mask[row + j] = b.mask[row + j]
                if b.mask[row + j] > FREE_LEVEL:
                    b.free[word + j // 64] &= ~(np.uint64(1) << np.uint64(j % 64))


@helper
def restore(g: Geometry, b: Board, first: int, last: int) -> None:
    """Paddles first..last-1 belong to a failed attempt: give back the rows that they touched."""
    highest, lowest = g.window, 0
    for n in range(first, last):
        box = g.boxes[b.paddles[n, 2]]
        highest = min(highest, b.paddles[n, 0] + box[0])
        lowest = max(lowest, b.paddles[n, 0] + box[2])
    begin, end = max(0, highest), min(g.window, lowest)
    for place in range((begin + g.frame) * g.side, (end + g.frame) * g.side):
        b.mask[place] = b.kept_mask[place]


@helper
def _box(g: Geometry, y: int, x: int, picture: int) -> tuple[int, int, int, int]:
    """Where a paddle that starts at (y, x) has its mask: top, left, bottom, right in the image."""
    box = g.boxes[picture]
    return (
        max(0, y + box[0]),
        max(0, x + box[1]),
        min(g.window, y + box[2]),
        min(g.window, x + box[3]),
    )


@helper
def _rank_candidates(g: Geometry, b: Board, pivot_y: int, pivot_x: int) -> int:
    """Number the candidates inside the image in b.ranks (outside: -1); return how many there are.

    b.first gets the first of them, which the original takes if rounding leaves a draw above all
    shares.
    """
    total = g.candidates.shape[0]
    if min(pivot_y, pivot_x) >= g.bit_frame and max(pivot_y, pivot_x) < g.window - g.bit_frame:
        for n in range(total):
            b.ranks[n] = n
        b.first[0] = 0
        return total
    count = 0
    for n in range(total):
        y, x = pivot_y + g.candidates[n, 0], pivot_x + g.candidates[n, 1]
        inside = 0 <= y < g.window and 0 <= x < g.window
        b.ranks[n] = count if inside else -1
        if inside:
            if count == 0:
                b.first[0] = n
            count += 1
    return count


@helper
def _weigh(g: Geometry, b: Board, pivot_y: int, pivot_x: int, direction: int, count: int) -> int:
    """Cumulated shares of the favoured candidates inside the image, in b.shares and b.chosen.

    Returns their number; 0 if they have all but no weight, which ends the snake. The candidates
    that are not favoured count in the original with cos(pi / 2)^2 = 4e-33: too little to change a
    sum or ever to be drawn. The total is numpy's sum of all `count` candidates: eight running sums
    over the whole eights, then the rest one by one.
    """
    favoured = 0
    eights = count // 8 * 8
    for lane in range(8):
        b.lanes[lane] = 0.0
    for k in range(g.favoured_ends[direction], g.favoured_ends[direction + 1]):
        n = g.favoured[k]
        if b.ranks[n] >= 0:
            y, x = pivot_y + g.candidates[n, 0], pivot_x + g.candidates[n, 1]
            centre = (y + g.frame) * g.side + x + g.frame
            taken = 0
            for m in range(g.disc.size):
                taken = max(taken, int(b.mask[centre + g.disc[m]]))
            weight = (1.0 - g.levels[taken]) * g.weights[direction, n]
            b.shares[favoured] = weight
            b.chosen[favoured] = n
            favoured += 1
            if b.ranks[n] < eights:
                b.lanes[b.ranks[n] % 8] += weight
    lanes = b.lanes
    total = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
        (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
    )
    for n in range(favoured):
        if b.ranks[b.chosen[n]] >= eights:
            total += b.shares[n]
    if total < LEAST_TOTAL_WEIGHT:
        return 0
    cumulated = 0.0
    for n in range(favoured):
        cumulated += b.shares[n] / total
        b.shares[n] = cumulated
    return favoured


@helper
def _fits(g: Geometry, b: Board, y: int, x: int, picture: int) -> bool:
    """Whether a paddle's mask and the board's add up to less than the limit everywhere."""
    top, left, bottom, right = _box(g, y, x, picture)
    for i in range(top, bottom):
        row = (i + g.frame) * g.side + g.frame
        for j in range(left, right):
            new = g.masks[picture, i - y + g.half, j - x + g.half]
            if g.levels[b.mask[row + j]] + g.levels[new] >= OVERLAP_LIMIT:
                return False
    return True
