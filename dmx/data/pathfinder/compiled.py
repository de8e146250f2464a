"""Compiling the core with numba, so that machine code is kept on disk and never goes stale."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from dmx.errors import ConfigError

try:
    from numba import njit
except ImportError as missing:
    raise ConfigError("the Pathfinder generator needs numba: pip install numba.") from missing

F = TypeVar("F", bound=Callable[..., Any])


def _sources_digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def helper(function: F) -> F:
    """Compile a function that only other compiled functions call; it becomes part of them."""
    return cast(F, njit(function))


def entry(function: F) -> F:
    """Compile a function that Python calls, with the machine code kept on disk where possible.

    numba notices a change of the function's own file only, but this one's helpers live in several
    files. Its name on disk therefore carries a digest of the whole package's sources.
    """
    function.__qualname__ = f"{function.__qualname__}_{_sources_digest()}"
    try:
        return cast(F, njit(cache=True)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return cast(F, njit(function))
