"""Attention maps as pictures: heads by groups, and how much attention each pixel gets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from torch import Tensor

from dmx.training.maps import LayerMap

_TILE = 192
"""Maps are enlarged by a whole factor to about so many pixels."""
_GAP = 6
_CAPTION = 14
_MASKED = 255
_GRID = 225


def busiest_groups(found: LayerMap, count: int) -> list[int]:
    """The groups with the most real positions, the first of equals; by rising number."""
    real = found.real.sum(dim=1).tolist()
    order = sorted(range(len(real)), key=lambda group: (-real[group], group))
    return sorted(order[:count])


def draw_maps(found: LayerMap, groups: list[int]) -> Image.Image:
    """One row per head, one column per group; a map's rows are queries, its columns keys.

    The darker, the closer to the map's largest probability, by the square root, which keeps small
    ones visible. Rows of masked queries and columns of masked keys are white.
    """
    heads, size = found.probabilities.shape[1], found.probabilities.shape[2]
    scale = max(_TILE // size, 1)
    side = size * scale
    width = len(groups) * (side + _GAP) + _GAP
    height = heads * (side + _GAP + _CAPTION) + _GAP
    picture = Image.new("L", (width, height), _GRID)
    draw = ImageDraw.Draw(picture)
    for row in range(heads):
        top = _GAP + row * (side + _GAP + _CAPTION)
        for column, group in enumerate(groups):
            left = _GAP + column * (side + _GAP)
            tile = _shade(found.probabilities[group, row], found.real[group])
            image = Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(image, (left, top))
            draw.text((left, top + side + 1), f"head {row}, group {group}", fill=0)
    return picture


def draw_received(found: LayerMap, image_side: int) -> Image.Image:
    """The attention that each pixel of an image gets, relative to the most attended one."""
    total = found.received()[: image_side * image_side].numpy()
    most = float(total.max())
    shade = _grey(total / most if most > 0 else total)
    scale = max(_TILE // image_side, 1)
    image = Image.fromarray(shade.reshape(image_side, image_side))
    return image.resize((image_side * scale, image_side * scale), Image.Resampling.NEAREST)


def _shade(probabilities: Tensor, real: Tensor) -> npt.NDArray[np.uint8]:
    """[n, n] probabilities and [n] real positions -> [n, n] grey values."""
    most = float(probabilities[real].max()) if bool(real.any()) else 0.0
    values = probabilities.numpy()
    shade = _grey(values / most if most > 0 else values)
    keep = real.numpy()
    shade[~keep] = _MASKED
    shade[:, ~keep] = _MASKED
    return shade


def _grey(relative: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """0..1 -> 255..0."""
    return np.asarray(255 * (1 - np.sqrt(np.clip(relative, 0, 1)))).round().astype(np.uint8)
