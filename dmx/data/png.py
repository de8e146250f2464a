"""Decode one grey PNG into pixels, or say why not."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from dmx.errors import DataError


def grey_pixels(content: bytes, side: int, where: str) -> npt.NDArray[np.uint8]:
    """Pixels [side * side], rows from the top, of an 8-bit one-channel PNG.

    Raises:
        DataError: it is no PNG, truncated, of another size, or has colours.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()  # checksums up to the end mark; decoding alone overlooks a torn tail
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (side, side) or image.mode != "L":
                width, height = image.size
                raise DataError(
                    f"{where} is {width} x {height} in mode {image.mode}, not {side} x {side} grey."
                )
            return np.asarray(image, np.uint8).reshape(-1)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where} is no readable PNG: {error}.") from error
