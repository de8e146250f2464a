"""ListOps, generated: the grammar and limits of LRA's generator, one random stream per example.

Formulas: Nangia & Bowman 2018, with LRA's settings (lra_benchmarks/data/listops.py): depth 10,
2 to 10 arguments, operators MIN MAX MED SM, more than 500 and fewer than 2,000 tokens. The
official split hangs on Python's string hashing and cannot be regenerated; this one is a function
of the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

VOCABULARY = (*"0123456789", "X", "[MAX", "[MED", "[MIN", "[SM")
"""Token of id 1, 2, ...; `X` is the closing bracket. Sorted: the reference's order is random."""
MAX_TOKENS = 2000
"""The reference cuts here and pads to 2,048; no example is longer than 1,999."""
MIN_LENGTH = 500
MAX_LENGTH = 2000
"""Both exclusive."""
MAX_DEPTH = 10
MAX_ARGUMENTS = 10
OPERATOR_SHARE = 0.25
_CLOSE = VOCABULARY.index("X") + 1
_FIRST_OPERATOR = VOCABULARY.index("[MAX") + 1
_LAST = len(VOCABULARY)
_OPERATORS: tuple[Callable[[list[int]], int], ...] = (
    max,
    lambda values: _median(values),
    min,
    lambda values: sum(values) % 10,
)
"""In the order of their tokens: MAX, MED, MIN, SM."""


def _median(values: list[int]) -> int:
    ordered = sorted(values)
    half = len(ordered) // 2
    # Truncated, as in LRA's int(np.median(values)).
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) // 2


def values(expressions: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.int64]:
    """int64 [N], the value 0..9 of each expression, given as ids [L]; -1 for what is none."""
    lengths = np.array([len(ids) for ids in expressions], np.int64)
    found = np.full(len(lengths), -1, np.int64)
    if lengths.sum():
        counts = np.zeros((int(lengths.max()), 10), np.int64)
        operators = np.zeros(len(counts), np.int64)
        _compiled()(np.concatenate(expressions), lengths, counts, operators, found)
    return found


@cache
def _compiled() -> Callable[..., None]:
    """98,000 expressions take a second so, and half a minute in Python."""
    from dmx.data.pathfinder.core import entry

    return entry(_evaluate)


def _evaluate(
    tokens: npt.NDArray[np.uint8],
    lengths: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    operators: npt.NDArray[np.int64],
    found: npt.NDArray[np.int64],
) -> None:
    """A stack of open operators: `counts[depth, v]` arguments so far are v."""
    start = 0
    for number in range(len(lengths)):
        depth, result, stop = 0, -1, start + lengths[number]
        for place in range(start, stop):
            token = int(tokens[place])
            if result >= 0 or not 1 <= token <= _LAST:
                depth = 1
                break
            if token >= _FIRST_OPERATOR:
                counts[depth, :] = 0
                operators[depth] = token
                depth += 1
                continue
            value = token - 1
            if token == _CLOSE:
                depth -= 1
                total = int(counts[depth].sum()) if depth >= 0 else 0
                if total == 0:
                    depth = 1
                    break
                low, high = 0, 0  # what stands left and right of the middle of the sorted arguments
                least, most, amount, before = -1, 0, 0, 0
                for v in range(10):
                    count = int(counts[depth, v])
                    if count:
                        least = v if least < 0 else least
                        most = v
                        amount += v * count
                        if before <= (total - 1) // 2 < before + count:
                            low = v
                        if before <= total // 2 < before + count:
                            high = v
                        before += count
                operator = operators[depth]
                if operator == _FIRST_OPERATOR:
                    value = most
                elif operator == _FIRST_OPERATOR + 1:
                    value = (low + high) // 2
                elif operator == _FIRST_OPERATOR + 2:
                    value = least
                else:
                    value = amount % 10
            if depth:
                counts[depth - 1, value] += 1
            else:
                result = value
        if depth == 0:
            found[number] = result
        start = stop


def decode(ids: npt.NDArray[Any]) -> str:
    """The expression as text, with `]` for the closing bracket; padding is dropped."""
    tokens = (VOCABULARY[number - 1] for number in ids.tolist() if number)
    return " ".join("]" if token == "X" else token for token in tokens)


def example(seed: int, index: int, attempt: int = 0) -> tuple[bytes, int]:
    """(ids as bytes, label 0..9) of example `index`: a function of its arguments alone.

    `attempt` counts up when an example turns out equal to an earlier one.
    """
    # Only random() is promised to be the same in every Python version; choice and randint are not.
    draw = random.Random(f"dmx-listops:{seed}:{index}:{attempt}").random
    tokens = bytearray()
    while True:
        label = _tree(draw, tokens)
        if label is not None:
            return bytes(tokens), label


def _tree(draw: Callable[[], float], tokens: bytearray) -> int | None:
    """Draw one tree into `tokens`; its value, or None when its length is outside the limits.

    The reference draws whole trees and throws most away; giving up as soon as the limit is certain
    to be broken keeps the same distribution.
    """
    tokens.clear()
    least = 1  # tokens that the tree has at least, given what is drawn
    stack: list[tuple[int, int, list[int]]] = []  # operator, number of arguments, their values
    while True:
        if len(stack) + 1 < MAX_DEPTH and draw() <= OPERATOR_SHARE:
            count = 2 + int(draw() * (MAX_ARGUMENTS - 1))
            least += count + 1
            if least >= MAX_LENGTH:
                return None
            operator = int(draw() * len(_OPERATORS))
            tokens.append(_FIRST_OPERATOR + operator)
            stack.append((operator, count, []))
            continue
        value = int(draw() * 10)
        tokens.append(value + 1)
        while stack:
            operator, count, values = stack[-1]
            values.append(value)
            if len(values) < count:
                break
            value = _OPERATORS[operator](values)
            tokens.append(_CLOSE)
            stack.pop()
        if not stack:
            return value if len(tokens) > MIN_LENGTH else None


def make_shard(start: int, stop: int, *, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Examples start..stop-1: "tokens" uint8 [sum of lengths], "lengths" int32, "labels" uint8."""
    examples = [example(seed, index) for index in range(start, stop)]
    return {
        "tokens": np.frombuffer(b"".join(ids for ids, _ in examples), np.uint8),
        "lengths": np.array([len(ids) for ids, _ in examples], np.int32),
        "labels": np.array([label for _, label in examples], np.uint8),
    }
