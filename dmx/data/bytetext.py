"""Byte-level text ids, as LRA's text and retrieval have them: byte + 1, cut at 4,000."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MAX_TEXT_IDS = 4000
"""The reference cuts at 4,000 ids and pads to 4,096 (lra-data.md, 2.2)."""


def encode(text: bytes, limit: int = MAX_TEXT_IDS) -> npt.NDArray[np.uint16]:
    """The ids 1..256 [min(len, limit)] of UTF-8 bytes; 0 stays free for padding."""
    return np.frombuffer(text[:limit], np.uint8).astype(np.uint16) + np.uint16(1)


def decode(ids: npt.NDArray[np.integer]) -> str:
    """The text of ids 1..256; padding is dropped, bytes that are no UTF-8 become U+FFFD."""
    real = ids[ids > 0]
    return (real - 1).astype(np.uint8).tobytes().decode("utf-8", errors="replace")
