"""Placing snakes: the compiled core of the generator. Random words in, places of paddles out.

Coordinates are (y, x). Nothing here computes an angle: pathfinder_geometry has the tables `g` and
the working memory `b`. All compiled functions stand in this one file, since numba's code on disk
goes stale when the file of the function that Python calls changes, and with no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numba import njit
from numba.core.cpu import CPUTargetOptions
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dmx.data.pathfinder_geometry import Bits, Board, Geometry

DEGREES = 360
FREE_LEVEL = 76
"""A pixel is free for a first paddle while its mask is at most 0.3, that is 76 of 255."""
TRIALS = 3
LEAST_TOTAL_WEIGHT = 1e-4
OVERLAP_LIMIT = 1.8
FIRST_PADDLE_TRIALS = 3
DISTRACTOR_TRIALS = 5
LEAST_FREE_SHARE = 0.01
TARGET, DISTRACTOR = 0, 1
WORDS_EXHAUSTED = -1

F = TypeVar("F", bound=Callable[..., Any])
Words = NDArray[np.uint32]
"""[power of two] consecutive 32-bit outputs of a Mersenne Twister."""
Cursor = NDArray[np.int64]
"""[1] how many words are used. Reading on past the end starts again at the front; the caller sees
that by the cursor and throws the result away."""

# The core allocates nothing, so numba's reference counts of arrays (`_nrt`) only cost: a quarter
# of the run time. The wrappers would let C and Python call what they never call: a third of the
# compile time. An option that a future numba drops is left out here, at that price.
_WISHES = {"_nrt": False, "no_cfunc_wrapper": True, "no_cpython_wrapper": True}
_HELPER: dict[str, Any] = {k: v for k, v in _WISHES.items() if hasattr(CPUTargetOptions, k)}
_ENTRY = {k: v for k, v in _HELPER.items() if k != "no_cpython_wrapper"}


def helper(function: F) -> F:
    """Compile a function that only other compiled functions call; it becomes part of them."""
    return cast(F, njit(**_HELPER)(function))


def entry(function: F, options: dict[str, Any] = _ENTRY) -> F:
    """Compile a function that Python calls, with the machine code kept on disk where possible."""
    try:
        return cast(F, njit(cache=True, **options)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return cast(F, njit(**options)(function))


@helper
def next_word(words: Words, cursor: Cursor) -> int:
    """The next raw word as a signed 64-bit integer."""
    word = np.int64(words[cursor[0] & (words.size - 1)])
    cursor[0] += 1
    return word  # type: ignore[return-value]


@helper
def below(words: Words, cursor: Cursor, bound: int) -> int:
    """As `RandomState.randint(0, bound)`: rejection under a bit mask; bound 1 takes no word."""
    top = bound - 1
    if top == 0:
        return 0
    mask = top
    for shift in (1, 2, 4, 8, 16):
        mask |= mask >> shift
    while True:
        value = next_word(words, cursor) & mask
        if value <= top:
            return value


@helper
def unit(words: Words, cursor: Cursor) -> float:
    """As `RandomState.rand()`: 53 bits from two words."""
    high = next_word(words, cursor) >> 5
    low = next_word(words, cursor) >> 6
    return (high * 67108864.0 + low) / 9007199254740992.0


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


@entry
def place_snakes(g: Geometry, b: Board, words: Words, cursor: Cursor) -> tuple[int, int]:
    """Place both targets, then the distractors; the paddles go to b.paddles, the ends to b.tips.

    The board must be cleared, the cursor 0. Returns the number of paddles and the target whose
    start gets the disc. Number WORDS_EXHAUSTED: drop the words before the cursor, add others
    behind, and call again; the attempts that failed on those need not be made again.
    """
    none = used = begin = int(cursor[0])  # a variable: a literal 0 would compile the calls twice
    while used < 2 * g.contour_length:
        if cursor[0] > words.size:
            cursor[0] = begin
            return WORDS_EXHAUSTED, 0
        begin = int(cursor[0])
        restore(g, b, none, used)
        used = _place_targets(g, b, words, cursor)
    keep(g, b, none, used)
    for _ in range(g.num_distractors):
        for _ in range(DISTRACTOR_TRIALS):
            end = used + _place_distractor(g, b, used, words, cursor)
            if end == used + g.distractor_length:
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
def _place_targets(g: Geometry, b: Board, words: Words, cursor: Cursor) -> int:
    """One attempt at two snakes that grow in turn. Returns how many paddles it got to."""
    first, second = b.snakes[0], b.snakes[1]
    if not _start(g, b, first, b.target_zone, 0.0, words, cursor):
        return 0
    if not _start_second(g, first, second, words, cursor):
        return 0
    for n in range(2 * g.contour_length):
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
    return 2 * g.contour_length


@helper
def _place_distractor(g: Geometry, b: Board, used: int, words: Words, cursor: Cursor) -> int:
    """One attempt at a distractor, after `used` paddles. Returns how many paddles it got to."""
    snake = b.snakes[0]
    if not _start(g, b, snake, b.distractor_zone, LEAST_FREE_SHARE, words, cursor):
        return 0
    _record(b, used, snake, DISTRACTOR)
    for n in range(1, g.distractor_length):
        y, x, picture = snake[3], snake[4], snake[5]
        if not extend(g, b, snake, words, cursor):
            return n
        take(g, b, y, x, picture)
        _record(b, used + n, snake, DISTRACTOR)
    take(g, b, snake[3], snake[4], snake[5])
    return g.distractor_length


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
