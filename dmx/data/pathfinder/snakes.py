"""Placing snakes: the compiled core of the generator. Random words in, places of paddles out.

Coordinates are (y, x). Nothing here computes an angle, see geometry.py for the tables `g` and
board.py for the working memory `b`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dmx.data.pathfinder.board import Bits, Board, Counts
from dmx.data.pathfinder.compiled import entry, helper
from dmx.data.pathfinder.geometry import DEGREES, Geometry
from dmx.data.pathfinder.growth import extend, keep, restore, take
from dmx.data.pathfinder.starts import count_free, find_starts, pick_start
from dmx.data.pathfinder.words import Cursor, Words, below

FIRST_PADDLE_TRIALS = 3
DISTRACTOR_TRIALS = 5
LEAST_FREE_SHARE = 0.01
TARGET, DISTRACTOR = 0, 1
WORDS_EXHAUSTED = -1


@entry
def place(g: Geometry, b: Board, counts: Counts, words: Words, cursor: Cursor) -> tuple[int, int]:
    """Place both targets, then the distractors; the paddles go to b.paddles, the ends to b.tips.

    The board must be cleared, the cursor 0. Returns the number of paddles and the target whose
    start gets the disc. Number WORDS_EXHAUSTED: drop the words before the cursor, add others
    behind, and call again; the attempts that failed on those need not be made again.
    """
    none = used = begin = int(cursor[0])  # a variable: a literal 0 would compile the calls twice
    while used < 2 * counts.contour_length:
        if cursor[0] > words.size:
            cursor[0] = begin
            return WORDS_EXHAUSTED, 0
        begin = int(cursor[0])
        restore(g, b, none, used)
        used = _place_targets(g, b, counts, words, cursor)
    keep(g, b, none, used)
    for _ in range(counts.num_distractors):
        for _ in range(DISTRACTOR_TRIALS):
            end = used + _place_distractor(g, b, counts, used, words, cursor)
            if end == used + counts.distractor_length:
                keep(g, b, used, end)
                used = end
                break
            restore(g, b, used, end)
    origin = below(words, cursor, 2)
    if cursor[0] > words.size:
        cursor[0] = begin
        return WORDS_EXHAUSTED, 0
    return used, origin


@entry
def draw(
    g: Geometry,
    paddles: NDArray[np.int64],
    targets: NDArray[np.float32],
    distractors: NDArray[np.float32],
    image: NDArray[np.float32],
) -> None:
    """Enter the pictures [D, S, S] of all paddles in an image [window, window], keeping maxima."""
    side = 2 * g.half + 1
    for n in range(paddles.shape[0]):
        top, left = paddles[n, 0] - g.half, paddles[n, 1] - g.half
        picture = (targets if paddles[n, 3] == TARGET else distractors)[paddles[n, 2]]
        for i in range(max(0, -top), min(side, g.window - top)):
            for j in range(max(0, -left), min(side, g.window - left)):
                if picture[i, j] > image[top + i, left + j]:
                    image[top + i, left + j] = picture[i, j]


@helper
def _place_targets(g: Geometry, b: Board, counts: Counts, words: Words, cursor: Cursor) -> int:
    """One attempt at two snakes that grow in turn. Returns how many paddles it got to."""
    first, second = b.snakes[0], b.snakes[1]
    if not _start(g, b, first, b.target_zone, 0.0, words, cursor):
        return 0
    if not _start_second(g, first, second, words, cursor):
        return 0
    for n in range(2 * counts.contour_length):
        snake = b.snakes[n % 2]
        if n < 2:
            b.tips[n, 0, 0], b.tips[n, 0, 1] = snake[3], snake[4]
        else:
            y, x, picture = snake[3], snake[4], snake[5]
            if not extend(g, b, snake, words, cursor):
                return n
            take(g, b, y, x, picture)
        b.tips[n % 2, 1, 0], b.tips[n % 2, 1, 1] = snake[3], snake[4]
        _record(b, n, snake, TARGET)
    # As in the original, the first target's last paddle never joins the mask: a distractor may
    # cross it.
    take(g, b, second[3], second[4], second[5])
    return 2 * counts.contour_length


@helper
def _place_distractor(
    g: Geometry, b: Board, counts: Counts, used: int, words: Words, cursor: Cursor
) -> int:
    """One attempt at a distractor, after `used` paddles. Returns how many paddles it got to."""
    snake = b.snakes[0]
    if not _start(g, b, snake, b.distractor_zone, LEAST_FREE_SHARE, words, cursor):
        return 0
    _record(b, used, snake, DISTRACTOR)
    for n in range(1, counts.distractor_length):
        y, x, picture = snake[3], snake[4], snake[5]
        if not extend(g, b, snake, words, cursor):
            return n
        take(g, b, y, x, picture)
        _record(b, used + n, snake, DISTRACTOR)
    take(g, b, snake[3], snake[4], snake[5])
    return counts.distractor_length


@helper
def _start(
    g: Geometry,
    b: Board,
    snake: NDArray[np.int64],
    zone: Bits,
    least_free: float,
    words: Words,
    cursor: Cursor,
) -> bool:
    """First paddle of a distractor or of the first target, at a random free pixel of the zone."""
    enough = count_free(b) / float(g.window * g.window) >= least_free
    for _ in range(FIRST_PADDLE_TRIALS):
        degree = below(words, cursor, DEGREES)
        available = find_starts(g, b, zone, degree) if enough else 0
        if available == 0:
            return False
        y, x = pick_start(g, b, below(words, cursor, available))
        if _stand(g, snake, degree, y, x):
            return True
    return False


@helper
def _start_second(
    g: Geometry,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    words: Words,
    cursor: Cursor,
) -> bool:
    """First paddle of the second target: at a distance from the first's, whatever lies there."""
    for _ in range(FIRST_PADDLE_TRIALS):
        degree = below(words, cursor, DEGREES)
        way = g.ring[below(words, cursor, DEGREES)]
        y, x = int(np.rint(first[3] + way[0])), int(np.rint(first[4] + way[1]))
        if _stand(g, second, degree, y, x):
            return True
    return False


@helper
def _stand(g: Geometry, snake: NDArray[np.int64], degree: int, y: int, x: int) -> bool:
    """Set a first paddle with its start at (y, x), if its end and its pivot are in the image."""
    head_y = math.ceil(y + g.heads[degree, 0])
    head_x = math.ceil(x + g.heads[degree, 1])
    pivot_y = math.ceil(head_y + g.backs[degree, 0])
    pivot_x = math.ceil(head_x + g.backs[degree, 1])
    if min(head_y, head_x, pivot_y, pivot_x) < 0:
        return False
    if max(head_y, head_x, pivot_y, pivot_x) >= g.window:
        return False
    snake[0], snake[1], snake[2] = pivot_y, pivot_x, degree
    snake[3], snake[4], snake[5] = y, x, degree
    return True


@helper
def _record(b: Board, n: int, snake: NDArray[np.int64], role: int) -> None:
    """Note the snake's last paddle as the image's n-th."""
    b.paddles[n, 0], b.paddles[n, 1], b.paddles[n, 2] = snake[3], snake[4], snake[5]
    b.paddles[n, 3] = role
