"""Attention maps: the probabilities by which each layer weighs its keys, and their pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dmx.attention import ATTENTIONS, AttentionConfig, TokenMixer
from dmx.config import RunConfig
from dmx.data.batches import Batch, make_batch
from dmx.data.prepare import open_data
from dmx.data.show import pictures, snippet
from dmx.errors import ConfigError
from dmx.model import Classifier
from dmx.nn.packing import to_groups
from dmx.runs.layout import STEPS
from dmx.schema import check_number, local_path
from dmx.storage.files import explained
from dmx.tensorboard import RunWriter
from dmx.training.checkpoint import meant_checkpoint, open_checkpoint
from dmx.training.samples import choose_samples
from dmx.training.trainer import Trainer

MAX_SIZE = 1024
"""Positions of a group up to which maps, of n * n entries a head, are drawn without being asked."""
_EXAMPLES = 2
_TILE = 192
"""Maps are enlarged by a whole factor to about so many pixels."""
_GAP = 6
_CAPTION = 14
_MASKED = 255
_GRID = 225


def draw_attention_maps(
    checkpoint: str | Path,
    examples: Sequence[int] | None = None,
    *,
    split: str = "dev",
    layers: Sequence[int] | None = None,
    groups: int = 4,
    max_size: int | None = None,
    data_root: str | None = None,
    out: str | Path | None = None,
) -> list[Path]:
    """Draw where a checkpoint's layers look, into PNG files and TensorBoard; the files.

    Args:
        checkpoint: or a run's folder, whose best one is meant.
        examples: of the split, by number; None is two fixed ones. layers: from 0; None is all.
        groups: of a layer, those with most tokens. max_size: refuse maps of more positions.
        data_root: None is where the run found its data. out: None is attention_maps/ beside it.

    Raises:
        ConfigError: a number is out of range, or there are no such maps. DataError: no data.
    """
    folder = meant_checkpoint(local_path("CHECKPOINT", str(checkpoint)))
    opened = open_checkpoint(folder)
    config = dense(opened.config)
    check_number("--groups", groups, least=1)
    check_number("--max-size", max_size, least=1)
    length = config.model.max_length or config.task_info.max_length
    check_has_maps(config.attention, length, max_size or MAX_SIZE)
    all_layers = range(config.model.num_layers)
    chosen = _within(layers or all_layers, all_layers, "--layers", "layers of the model")
    store = open_data(config.task, data_root or config.data.root, allow_sample=True)
    data = store.split(split)
    numbers = examples or choose_samples(data)[:_EXAMPLES].tolist()
    _within(numbers, range(len(data)), "--examples", f"{split} examples")
    target = Path(out) if out else folder.absolute().parent / "attention_maps"
    trainer, files = Trainer(config, store), []
    step = int(opened.metrics.get(STEPS, 0))
    try:
        trainer.load_weights(opened)
        with _writer(target) as writer:
            for index in numbers:
                text, drawn = _example(trainer, split, index, chosen, groups)
                writer.text(f"example_{index}", text, step)
                for name, picture in drawn:
                    files.append(target / f"example-{index}-{name}.png")
                    with explained(target, "write"):
                        picture.save(files[-1], format="PNG")
                    writer.image(f"example_{index}/{name}", picture, step)
    finally:
        trainer.close()
    return files


def _within(given: Sequence[int], allowed: range, option: str, what: str) -> Sequence[int]:
    for number in given:
        if number not in allowed:
            raise ConfigError(f"{option} {number} must lie in 0..{len(allowed) - 1}, the {what}.")
    return given


@contextlib.contextmanager
def _writer(out: Path) -> Iterator[RunWriter]:
    """TensorBoard's writer in the folder, which is made."""
    try:
        writer = RunWriter(out)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror}); give another --out."
        ) from None
    with contextlib.closing(writer):
        yield writer


def _example(
    trainer: Trainer, split_name: str, index: int, layers: Collection[int], num_groups: int
) -> tuple[str, list[tuple[str, Image.Image]]]:
    """(what the model says of it, named pictures) of one example."""
    store, side = trainer.store, trainer.config.task_info.image_side
    manifest, split = store.manifest, store.split(split_name)
    batch = make_batch(split, np.array([index]), trainer.length).to(trainer.device)
    probabilities = trainer.probabilities(batch)[0]
    said, label = int(probabilities.argmax()), int(batch.labels[0])
    text = (
        f"{split_name} example {index} of {manifest.label}: label {manifest.class_name(label)}, "
        f"prediction {manifest.class_name(said)} ({float(probabilities[said]):.3f})"
    )
    if side is None:
        text += "\n\n    " + snippet(manifest, split, index)
    drawn = []
    for found in layer_maps(trainer.model, batch):
        if found.layer in layers:
            name = f"layer-{found.layer}" + ("-second" if found.sequence else "")
            drawn.append((name, draw_maps(found, busiest_groups(found, num_groups))))
            if side is not None:
                drawn.append((f"received-{name}", draw_received(found, side)))
    if side is not None:
        caption = (f"label {label}, prediction {said}", "black")
        drawn.append(("input", pictures(store, split_name, [index], [caption])))
    return text, drawn


# -- the maps -------------------------------------------------------------------------------


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
    """Refuse what has no maps, or too large ones."""
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

    def look(layer: int, mixer: TokenMixer, args: tuple[Tensor, ...]) -> None:
        q, k, _, mask = args
        grouping = mixer.grouping(mask.shape[1])
        place = torch.arange(mask.shape[1], device=mask.device)[None]
        found.append(
            LayerMap(
                layer=layer,
                sequence=sum(earlier.layer == layer for earlier in found),
                probabilities=mixer.attention_map(q, k, mask).cpu(),
                position=to_groups(place, grouping).cpu(),
                real=to_groups(mask.bool(), grouping).cpu(),
            )
        )

    handles = [
        block.attention.mixer.register_forward_pre_hook(functools.partial(look, layer))
        for layer, block in enumerate(model.encoder.blocks())
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


# -- their pictures -------------------------------------------------------------------------


def busiest_groups(found: LayerMap, count: int) -> list[int]:
    """The groups with the most real positions, the first of equals; by rising number."""
    real = found.real.sum(dim=1).tolist()
    order = sorted(range(len(real)), key=lambda group: (-real[group], group))
    return sorted(order[:count])


def draw_maps(found: LayerMap, groups: list[int]) -> Image.Image:
    """One row per head, one column per group; a map's rows are queries, its columns keys.

    The darker, the closer to the map's largest probability. Rows of masked queries and columns of
    masked keys are white.
    """
    heads, size = found.probabilities.shape[1:3]
    side = size * max(_TILE // size, 1)
    width, height = side + _GAP, side + _GAP + _CAPTION
    picture = Image.new("L", (len(groups) * width + _GAP, heads * height + _GAP), _GRID)
    draw = ImageDraw.Draw(picture)
    for head, (column, group) in itertools.product(range(heads), enumerate(groups)):
        values, real = found.probabilities[group, head].numpy(), found.real[group].numpy()
        shade = _grey(values, values[real].max(initial=0))
        shade[~real] = _MASKED
        shade[:, ~real] = _MASKED
        left, top = _GAP + column * width, _GAP + head * height
        picture.paste(_enlarged(shade), (left, top))
        draw.text((left, top + side + 1), f"head {head}, group {group}", fill=0)
    return picture


def draw_received(found: LayerMap, image_side: int) -> Image.Image:
    """The attention that each pixel of an image gets, relative to the most attended one."""
    total = found.received()[: image_side * image_side].numpy()
    return _enlarged(_grey(total, total.max()).reshape(image_side, image_side))


def _grey(values: npt.NDArray[np.floating], most: float) -> npt.NDArray[np.uint8]:
    """0..most -> 255..0, by the square root, which keeps small values visible."""
    relative = np.clip(values / most if most > 0 else values, 0, 1)
    return np.asarray(255 * (1 - np.sqrt(relative))).round().astype(np.uint8)


def _enlarged(shade: npt.NDArray[np.uint8]) -> Image.Image:
    scale = max(_TILE // len(shade), 1)
    return Image.fromarray(shade.repeat(scale, 0).repeat(scale, 1))
