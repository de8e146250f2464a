"""Hyperband's brackets: how many there are, and which one a trial belongs to."""

from __future__ import annotations

import functools
import math

LEAST_FACTOR = 1.1
"""Of reduction factors: nearer to 1 there are thousands of rungs, and none of them decides much."""


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
    return 0 if count == 1 else _split(count, reduction_factor).bracket(number)


class _Split:
    """Trials dealt out to brackets, one after the other; as far as anybody has asked."""

    def __init__(self, count: int, factor: float) -> None:
        self._sizes = [
            math.ceil(count / (s + 1) * factor**s - 1e-9) for s in range(count - 1, -1, -1)
        ]
        self._taken = [0] * count
        self._chosen: list[int] = []

    def bracket(self, number: int) -> int:
        """Of trial `number`."""
        total = sum(self._sizes)
        for trial in range(len(self._chosen), number + 1):
            lacking = [
                size * (trial + 1) / total - taken
                for size, taken in zip(self._sizes, self._taken, strict=True)
            ]
            chosen = max(range(len(lacking)), key=lambda b: (lacking[b], -b))
            self._taken[chosen] += 1
            self._chosen.append(chosen)
        return self._chosen[number]


@functools.cache
def _split(count: int, factor: float) -> _Split:
    """One for all who ask: every report of a study does, and thousands of trials add up."""
    return _Split(count, factor)


def describe_rungs(
    scheduler: str, *, grace_steps: int, max_steps: int, reduction_factor: float
) -> str:
    """Where trials may end or change, in words."""
    if scheduler == "pbt":
        return f"pbt, a comparison every {grace_steps:,} steps"
    if scheduler == "none":
        return "none, every trial runs its full budget"
    if scheduler == "hyperband":
        brackets = num_brackets(
            grace_steps=grace_steps, max_steps=max_steps, reduction_factor=reduction_factor
        )
        return (
            f"hyperband, {brackets} brackets with rungs from {grace_steps:,} steps, "
            f"factor {reduction_factor:g}"
        )
    steps, at = [], float(grace_steps)
    while at < max_steps:
        steps.append(f"{at:,.0f}")
        at *= reduction_factor
    where = f"rungs at {', '.join(steps)} steps" if steps else "no rung before the end"
    return f"{scheduler}, {where}, the best 1/{reduction_factor:g} go on"
