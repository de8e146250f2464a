"""RGB to grey exactly as TensorFlow does it to uint8 images: truncated, not rounded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_WEIGHTS = (np.float32(0.2989), np.float32(0.5870), np.float32(0.1140))
"""tf.image.rgb_to_grayscale; ITU-R BT.601 luma, with its first weight cut to four digits."""


def tf_grey(
    red: npt.NDArray[np.uint8], green: npt.NDArray[np.uint8], blue: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """Grey values of the same shape: trunc(255.5 * (0.2989 R + 0.5870 G + 0.1140 B)) in float32.

    PIL's convert("L") rounds instead, which makes a quarter of the pixels one larger.
    """
    scale = np.float32(1 / 255)
    parts = [
        c.astype(np.float32) * scale * w for c, w in zip((red, green, blue), _WEIGHTS, strict=True)
    ]
    return np.asarray(((parts[0] + parts[1]) + parts[2]) * np.float32(255.5)).astype(np.uint8)
