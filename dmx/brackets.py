"""Hyperband's brackets: how many there are, and which one a trial belongs to."""

from __future__ import annotations

import math


def num_brackets(*, grace_steps: float, max_steps: float, reduction_factor: float) -> int:
    """Brackets of Hyperband (Li et al. 2018, arXiv 1603.06560).

    Bracket b lets no trial end before grace_steps * reduction_factor^b; in the last one, none ends
    before its full budget.
    """
    count = 0
    while grace_steps * reduction_factor**count < max_steps:
        count += 1
    return count + 1


def bracket_of(number: int, count: int, reduction_factor: float) -> int:
    """The bracket of a trial, a function of its number alone.

    Hyperband gives bracket b, of `count` = s_max + 1, ceil(count / (s + 1) * factor^s) trials with
    s = s_max - b, so that each costs about the same. A trial goes where most is lacking of that
    share (the lower bracket on a tie): ten trials are split as meant, too.
    """
    if count == 1:
        return 0
    sizes = [
        math.ceil(count / (s + 1) * reduction_factor**s - 1e-9) for s in range(count - 1, -1, -1)
    ]
    total = sum(sizes)
    taken = [0] * count
    chosen = 0
    for trial in range(number + 1):
        lacking = [size * (trial + 1) / total - t for size, t in zip(sizes, taken, strict=True)]
        chosen = max(range(count), key=lambda b: (lacking[b], -b))
        taken[chosen] += 1
    return chosen
