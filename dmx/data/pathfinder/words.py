"""numpy's legacy random numbers inside compiled code: they are read off a list of raw words.

`words` [power of two] are consecutive 32-bit outputs of a Mersenne Twister, `cursor` [1] counts the
ones used. Reading on past the end starts again at the front; the caller sees that by the cursor
and throws the result away.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dmx.data.pathfinder.compiled import helper

Words = NDArray[np.uint32]
Cursor = NDArray[np.int64]


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
