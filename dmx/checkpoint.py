"""Checkpoints: a self-describing directory, written atomically; transfer to another size."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from dmx.config import RunConfig, parse_run_config
from dmx.data.files import fsync_path, is_there, put_back, replace_folder
from dmx.errors import CheckpointError, ConfigError
from dmx.records import CONFIG_FILE, METRICS_FILE, MODEL_FILE, TRAINING_STATE_FILE
from dmx.reference import adopt, read_output_model
from dmx.schema import read_yaml

POSITION_KEY = "encoder.embeddings.position.weight"


def save_checkpoint(
    folder: Path,
    *,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    config: RunConfig,
    metrics: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
    before_replacing: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint directory; at every moment the old one or the new one is whole on disk.

    Args:
        notes: further text files of it, by name; no reader of a checkpoint needs them.
        before_replacing: may raise, which leaves the old one; writing can have taken long.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Containers and hosts have process ids of their own: those of two writers may be equal.
    new = folder.parent / f".{folder.name}.new-{os.getpid()}-{secrets.token_hex(4)}"
    for stale in folder.parent.glob(f".{folder.name}.new-*"):  # of a killed process
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir()
    try:
        for name, text in (notes or {}).items():
            (new / name).write_text(text, encoding="utf-8")
            fsync_path(new / name)
        write_files(new, model_state, training_state, config, metrics)
        before_replacing()
        replace_folder(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_files(
    folder: Path,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    config: RunConfig,
    metrics: Mapping[str, Any],
) -> None:
    """The files of a checkpoint, flushed to disk; metrics.json comes last and marks a whole one."""
    for name, value in ((MODEL_FILE, model_state), (TRAINING_STATE_FILE, training_state)):
        _torch_save(dict(value), folder / name)
    (folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    (folder / METRICS_FILE).write_text(json.dumps(dict(metrics), indent=2) + "\n", encoding="utf-8")
    for name in (MODEL_FILE, TRAINING_STATE_FILE, CONFIG_FILE, METRICS_FILE):
        fsync_path(folder / name)
    fsync_path(folder)


class _Sink:
    """A file whose first failure is kept: torch's writer answers it with a riddle of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Pass it on."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Nothing is held back here."""


def _torch_save(value: Mapping[str, Any], path: Path) -> None:
    """torch.save whose failure on a full disk is the OSError that it is."""
    with path.open("wb", buffering=0) as file:
        sink = _Sink(file)
        try:
            torch.save(value, cast(IO[bytes], sink))
        except Exception:
            if sink.error is not None:
                raise sink.error from None
            raise


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that was read: its config and metrics; weights on demand."""

    folder: Path
    config: RunConfig
    metrics: Mapping[str, Any]

    def model_state(self) -> dict[str, Tensor]:
        """The weights, on the CPU."""
        state = _load(self.folder / MODEL_FILE)
        if not all(isinstance(v, Tensor) for v in state.values()):
            raise CheckpointError(f"{self.folder / MODEL_FILE} is damaged: it holds no weights.")
        return state

    def training_state(self) -> dict[str, Any]:
        """Optimizer, schedule, random generators and data cursor."""
        return _load(self.folder / TRAINING_STATE_FILE)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint directory; one whose replacement was cut short by a crash is put back.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one; names the file.
    """
    put_back(folder)
    for name in (MODEL_FILE, TRAINING_STATE_FILE, CONFIG_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a whole checkpoint: {name} is missing.")
    try:
        config = parse_run_config(read_yaml(folder / CONFIG_FILE))
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        if not isinstance(metrics, dict):
            raise ValueError(f"{METRICS_FILE} holds no mapping.")
    except (ConfigError, ValueError, OSError, RecursionError) as error:
        reason = first_line(error).rstrip(".")
        raise CheckpointError(f"{folder} is damaged: {reason}.") from None
    return Checkpoint(folder, config, metrics)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _load(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on damaged files
        reason = first_line(error).rstrip(".")
        raise CheckpointError(f"{path} is damaged: {reason}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no mapping.")
    return content


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
