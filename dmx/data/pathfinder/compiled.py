"""Compiling the core with numba, so that machine code is kept on disk and never goes stale."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from dmx.errors import ConfigError

try:
    from numba import njit
    from numba.core.cpu import CPUTargetOptions
except ImportError as missing:
    raise ConfigError("dmx.data needs numba: pip install numba.") from missing

F = TypeVar("F", bound=Callable[..., Any])

# The core allocates nothing, so numba's reference counts of arrays (`_nrt`) only cost: a quarter
# of the run time. The wrappers would let C and Python call what they never call: a third of the
# compile time. An option that a future numba drops is left out here, at that price.
_WISHES = {"_nrt": False, "no_cfunc_wrapper": True}
_ENTRY: dict[str, Any] = {k: v for k, v in _WISHES.items() if hasattr(CPUTargetOptions, k)}
_HELPER = dict(_ENTRY)
if hasattr(CPUTargetOptions, "no_cpython_wrapper"):
    _HELPER["no_cpython_wrapper"] = True


def _sources_digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def helper(function: F) -> F:
    """Compile a function that only other compiled functions call; it becomes part of them."""
    return cast(F, njit(**_HELPER)(function))


def entry(function: F) -> F:
    """Compile a function that Python calls, with the machine code kept on disk where possible.

    numba notices a change of the function's own file only, but this one's helpers live in several
    files. Its name on disk therefore carries a digest of the whole package's sources.
    """
    function.__qualname__ = f"{function.__qualname__}_{_sources_digest()}"
    try:
        return cast(F, njit(cache=True, **_ENTRY)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return cast(F, njit(**_ENTRY)(function))
