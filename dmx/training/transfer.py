"""Transfer: weights from a checkpoint or the reference's file into a model of another size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dmx.data.files import is_there
from dmx.errors import CheckpointError
from dmx.training.checkpoint import open_checkpoint
from dmx.training.reference import adopt, read_output_model

POSITION_KEY = "encoder.embeddings.position.weight"


@dataclass(frozen=True)
class TransferReport:
    """What a transfer moved: names taken as they are, tiled, and left at their new values."""

    moved: tuple[str, ...]
    tiled: tuple[str, ...]
    reinitialised: tuple[str, ...]

    def __str__(self) -> str:
        tiled = f", tiled {', '.join(self.tiled)}" if self.tiled else ""
        fresh = f", reinitialised {', '.join(self.reinitialised)}" if self.reinitialised else ""
        return f"moved {len(self.moved)} tensors{tiled}{fresh}"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights from a checkpoint directory or a reference `*_output.model` file.

    Raises:
        CheckpointError: neither, or damaged.
    """
    if path.is_file():
        return read_output_model(path)
    if not is_there(path):
        raise CheckpointError(
            f"{path} does not exist; expected a checkpoint folder or a .model file."
        )
    return open_checkpoint(path).model_state()


def plan_transfer(
    source: Mapping[str, torch.Size], target: Mapping[str, torch.Size], reinit: Iterable[str] = ()
) -> TransferReport:
    """Decide from shapes alone what a transfer would do; used before any training, too.

    Args:
        source, target: shapes by parameter name. reinit: names (or prefixes that end in a dot)
            that keep the target's fresh values where shapes differ or the source has none.

    Raises:
        CheckpointError: names or shapes that differ and are not named in reinit; lists them.
    """
    moved, tiled, fresh, wrong = [], [], [], []
    allowed = tuple(reinit)
    for name, shape in target.items():
        if name in source and source[name] == shape:
            moved.append(name)
        elif name == POSITION_KEY and name in source and _tiles(source[name], shape):
            tiled.append(name)
        elif _named(name, allowed):
            fresh.append(name)
        elif name not in source:
            wrong.append(f"{name} {tuple(shape)} is not in the source")
        else:
            wrong.append(f"{name} is {tuple(source[name])} in the source, {tuple(shape)} here")
    dropped = [n for n in source if n not in target and not _named(n, allowed)]
    wrong += [f"{n} {tuple(source[n])} has no place here" for n in dropped]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"weights cannot be transferred: {'; '.join(wrong[:4])}{more}; "
            "name what may start afresh in `reinit`."
        )
    return TransferReport(tuple(moved), tuple(tiled), tuple(fresh))


def transfer(
    model: nn.Module, source: Mapping[str, Tensor], reinit: Iterable[str] = ()
) -> TransferReport:
    """Start `model` from other weights; the position embedding of an image grows with its side.

    Each source entry at (r, c) of an h x h image serves the k x k targets (k*r + a, k*c + b) of the
    k*h x k*h image, as the reference's get_resized_pos_emb does: the picture, enlarged.

    Raises:
        CheckpointError: see plan_transfer.
    """
    own = model.state_dict()
    report = plan_transfer(
        {k: v.shape for k, v in source.items()}, {k: v.shape for k, v in own.items()}, reinit
    )
    state = {name: source[name] for name in report.moved}
    state.update({name: own[name] for name in report.reinitialised})
    for name in report.tiled:
        state[name] = tile_positions(source[name], own[name].shape[0])
    adopt(model, state, "the transferred state")
    return report


def _named(name: str, reinit: tuple[str, ...]) -> bool:
    return any(name == r or (r.endswith(".") and name.startswith(r)) for r in reinit)


def _tiles(source: torch.Size, target: torch.Size) -> bool:
    if len(source) != 2 or len(target) != 2 or source[0] < 1:
        return False
    side, target_side = math.isqrt(source[0]), math.isqrt(target[0])
    square = side * side == source[0] and target_side * target_side == target[0]
    return square and target_side % side == 0 and source[1:] == target[1:]


def tile_positions(position: Tensor, length: int) -> Tensor:
    """[h*h, D] position embedding, each entry a square tile of a larger image, -> [length, D]."""
    side, target_side = math.isqrt(position.shape[0]), math.isqrt(length)
    repeats = target_side // side
    grid = position.view(side, side, -1)
    return grid.repeat_interleave(repeats, 0).repeat_interleave(repeats, 1).reshape(length, -1)
