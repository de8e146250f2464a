"""Attention maps of a model: for every layer the probabilities by which it weighs its keys."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dmx.attention import ATTENTIONS, AttentionConfig, TokenMixer
from dmx.config import RunConfig
from dmx.data.batches import Batch
from dmx.errors import ConfigError
from dmx.model import Classifier
from dmx.nn.packing import to_groups

MAX_SIZE = 1024
"""Positions of a group up to which maps are drawn without being asked: a map of n positions has
n * n entries per head and group."""


@dataclass(frozen=True)
class LayerMap:
    """One layer's maps of one sequence; G groups of n positions, H heads.

    Attributes:
        layer: from 0. sequence: 0, or 1 for the second text of a pair.
        probabilities: [G, H, n, n] float32; rows are queries, columns keys.
        position: [G, n] where each position of a group lies in the sequence.
        real: [G, n] bool; rows of masked queries are of no meaning.
    """

    layer: int
    sequence: int
    probabilities: Tensor
    position: Tensor
    real: Tensor

    def received(self) -> Tensor:
        """[L] how much attention a position gets from the real queries, averaged over heads."""
        weight = self.real[:, None, :, None] * self.probabilities
        total = weight.sum(dim=2).mean(dim=1)  # [G, n]
        out = total.new_zeros(self.position.numel())
        out[self.position.flatten()] = total.flatten()
        return out


def check_has_maps(attention: AttentionConfig, length: int, max_size: int = MAX_SIZE) -> None:
    """Refuse what has no maps, or too large ones.

    Raises:
        ConfigError: says which attentions have maps, or how to draw large ones all the same.
    """
    if not attention.has_map:
        having = [name for name in ATTENTIONS.names() if ATTENTIONS.get(name)().has_map]
        inner = getattr(attention, "inner", None)
        around = "" if inner is None else f" with inner {inner.name!r}"
        raise ConfigError(
            f"attention {attention.name!r}{around} computes no attention probabilities, so there "
            f"is no map to draw; {', '.join(having)} do (butterfly with inner softmax)."
        )
    size = attention.size or length
    if size > max_size:
        raise ConfigError(
            f"attention {attention.name!r} has maps of {size:,} x {size:,}, "
            f"{size * size / 2**18:,.0f} MiB for each head and layer; only {max_size:,} positions "
            f"are drawn unasked. Give --max-size {size}, or a checkpoint with a smaller block."
        )


def dense(config: RunConfig) -> RunConfig:
    """The same experiment, computed at all positions, where q and k exist side by side."""
    model = dataclasses.replace(config.model, execution="dense")
    return dataclasses.replace(config, model=model)


@torch.no_grad()
def layer_maps(model: Classifier, batch: Batch) -> list[LayerMap]:
    """The maps of every layer for a batch of one example, in evaluation mode.

    Args:
        model: built from a config of `dense`, whose attention has maps.
        batch: one example on the model's device.
    """
    assert batch.labels.shape[0] == 1 and not model.encoder.packs
    found: list[LayerMap] = []
    passes: dict[int, int] = {}

    def look(layer: int, mixer: TokenMixer, args: tuple[Tensor, ...]) -> None:
        q, k, _, mask = args
        length = mask.shape[1]
        grouping = mixer.grouping(length)
        place = torch.arange(length, device=mask.device)[None]
        sequence = passes.get(layer, 0)
        passes[layer] = sequence + 1
        found.append(
            LayerMap(
                layer=layer,
                sequence=sequence,
                probabilities=mixer.attention_map(q, k, mask).cpu(),
                position=to_groups(place, grouping).cpu(),
                real=to_groups(mask.bool(), grouping).cpu(),
            )
        )

    mixers = [block.attention.mixer for block in model.encoder.blocks()]
    handles = [
        mixer.register_forward_pre_hook(functools.partial(look, layer))
        for layer, mixer in enumerate(mixers)
    ]
    was_training = model.training
    try:
        model.eval()
        model(batch.input_ids, batch.input_ids_1)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return found


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
