"""Hostile inputs: valid ones with some parts exchanged, torn bytes, and plain rubbish."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

WORDS = [
    "", "a", "../x", "/etc/passwd", "a.b", "name", "butterfly", "softmax", "nystrom", "train",
    "attention.name", "-1", "1e999", "nan", "\x00", "é", "\n", "x" * 300, "__class__", "<<", "*a",
    "&a", "!!python/object/apply:os.system [true]", "{", "}", "[", "%TAG", "---", "yes", "0x10",
]  # fmt: skip
NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 16, 17, 255, 2**31, 2**63, 10**30, -(10**30)),
    *(0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)), inner, max_size=3),
    ),
    max_leaves=6,
)


def places(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all parts of a tree."""
    found = [above]
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += places(value, (*above, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            found += places(value, (*above, index))
    return found


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one to four parts exchanged, dropped, renamed, doubled or added."""
    made = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 4))):
        spots = [p for p in places(made) if p]
        if not spots:
            return draw(VALUES)
        spot = draw(st.sampled_from(spots))
        parent = made
        for key in spot[:-1]:
            parent = parent[key]
        act = draw(st.sampled_from(["value", "value", "drop", "rename", "add", "double"]))
        if act == "value":
            parent[spot[-1]] = draw(VALUES)
        elif act == "drop":
            del parent[spot[-1]]
        elif isinstance(parent, list):
            parent.append(draw(VALUES) if act == "add" else copy.deepcopy(parent[spot[-1]]))
        elif act == "rename":
            parent[draw(st.sampled_from(WORDS))] = parent.pop(spot[-1])
        else:
            parent[draw(st.sampled_from(WORDS))] = draw(VALUES)
    return made


@st.composite
def torn(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with one to three cuts, flips, holes, insertions or repeats."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(made) - 1, 0)))
        size = draw(st.integers(1, 40))
        act = draw(st.sampled_from(["cut", "flip", "hole", "insert", "repeat"]))
        if act == "cut":
            del made[at:]
        elif act == "flip" and made:
            made[at] ^= 1 << draw(st.integers(0, 7))
        elif act == "hole":
            del made[at : at + size]
        elif act == "insert":
            made[at:at] = draw(st.binary(min_size=1, max_size=size))
        else:
            made[at:at] = made[at : at + size]
    return bytes(made)
