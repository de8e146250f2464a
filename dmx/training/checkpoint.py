"""Checkpoints: a self-describing directory, written atomically, read without unpickling."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import safetensors.torch
import torch
from torch import Tensor

from dmx.attention import ATTENTIONS
from dmx.config import RunConfig, parse_run_config
from dmx.errors import CheckpointError, ConfigError
from dmx.runs.layout import BEST_DIR, CONFIG_FILE, METRICS_FILE, MODEL_FILE, TRAINING_STATE_FILE
from dmx.schema import read_yaml
from dmx.storage.files import fsync_path, is_there, put_back, replace_folder
from dmx.tasks import find_task

logger = logging.getLogger("dmx.checkpoint")
_FILES = (MODEL_FILE, TRAINING_STATE_FILE, CONFIG_FILE, METRICS_FILE)


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
        notes: further text files of it, by name; no reader of a checkpoint needs them, so that they
            are not flushed.
        before_replacing: may raise, which leaves the old one; writing can have taken long.
    """
    with _replacing(folder, before_replacing) as new:
        for name, text in (notes or {}).items():
            (new / name).write_text(text, encoding="utf-8")
        with (new / MODEL_FILE).open("wb") as file:
            file.write(safetensors.torch.save({k: v.contiguous() for k, v in model_state.items()}))
        _torch_save(training_state, new / TRAINING_STATE_FILE)
        (new / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        (new / METRICS_FILE).write_text(
            json.dumps(dict(metrics), indent=2) + "\n", encoding="utf-8"
        )
        for name in _FILES:
            fsync_path(new / name)


def repeat_checkpoint(
    source: Path, folder: Path, *, before_replacing: Callable[[], None] = lambda: None
) -> None:
    """Put the checkpoint `source` in the place of `folder` as well, without its notes.

    The files are linked: they are never written again, only replaced, and their bytes are on the
    disk already, so that nothing but the folder has to be flushed.
    """
    with _replacing(folder, before_replacing) as new:
        for name in _FILES:
            try:
                os.link(source / name, new / name)
            except OSError:  # no hard links here
                shutil.copyfile(source / name, new / name)
                fsync_path(new / name)


@contextlib.contextmanager
def _replacing(folder: Path, before_replacing: Callable[[], None]) -> Iterator[Path]:
    """A new folder that takes the place of `folder` once it is filled."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Containers and hosts have process ids of their own: those of two writers may be equal.
    new = folder.parent / f".{folder.name}.new-{os.getpid()}-{secrets.token_hex(4)}"
    for stale in folder.parent.glob(f".{folder.name}.new-*"):  # of a killed process
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        fsync_path(new)
        before_replacing()
        replace_folder(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


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
        path = self.folder / MODEL_FILE
        try:
            return safetensors.torch.load(path.read_bytes())
        except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: {first_line(error).rstrip('.')}.") from None

    def training_state(self) -> dict[str, Any]:
        """Optimizer, schedule, random generators and data cursor."""
        return _load(self.folder / TRAINING_STATE_FILE)


def meant_checkpoint(path: Path) -> Path:
    """`path`, or the best checkpoint of the run whose folder it is, which is said then."""
    best = path / BEST_DIR
    if not is_there(best) or (path / MODEL_FILE).exists():
        return path
    logger.info("%s is a run; its best checkpoint is meant: %s", path, best)
    return best


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint directory; one whose replacement was cut short by a crash is put back.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one; names the file.
    """
    put_back(folder)
    for name in _FILES:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a whole checkpoint: {name} is missing.")
    plain: Mapping[str, Any] = {}
    try:
        plain = read_yaml(folder / CONFIG_FILE)
        config = parse_run_config(plain)
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        if not isinstance(metrics, dict):
            raise ValueError(f"{METRICS_FILE} holds no mapping.")
    except (ConfigError, ValueError, OSError, RecursionError) as error:
        if missing := _unregistered(plain):
            raise CheckpointError(
                f"{folder} is a checkpoint of {missing}, which is not registered here: add the "
                "file that registers it to this dmx, or take the one that made the checkpoint."
            ) from None
        reason = first_line(error).rstrip(".")
        raise CheckpointError(f"{folder} is damaged: {reason}.") from None
    return Checkpoint(folder, config, metrics)


def _unregistered(plain: Mapping[str, Any]) -> str:
    """`attention 'window'`, where a config names what this dmx does not have; else ""."""
    task, attention = plain.get("task"), plain.get("attention")
    if isinstance(task, str) and find_task(task) is None:
        return f"task {task!r}"
    while isinstance(attention, Mapping):
        name = attention.get("name")
        if isinstance(name, str) and name not in ATTENTIONS:
            return f"attention {name!r}"
        attention = attention.get("inner")
    return ""


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
