"""Checkpoints: a self-describing directory, written atomically, read without unpickling."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

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
    state = io.BytesIO()  # a disk that is full is then an OSError, and not a riddle of torch's
    torch.save(training_state, state)
    files = {
        MODEL_FILE: safetensors.torch.save({k: v.contiguous() for k, v in model_state.items()}),
        TRAINING_STATE_FILE: state.getvalue(),
        CONFIG_FILE: config.to_yaml().encode(),
        METRICS_FILE: (json.dumps(dict(metrics), indent=2) + "\n").encode(),
    }
    with _replacing(folder, before_replacing) as new:
        for name, text in (notes or {}).items():
            (new / name).write_text(text, encoding="utf-8")
        for name, content in files.items():
            if name == CONFIG_FILE and _linked(folder / name, new / name, content):
                continue
            (new / name).write_bytes(content)
            fsync_path(new / name)


def repeat_checkpoint(
    source: Path, folder: Path, *, before_replacing: Callable[[], None] = lambda: None
) -> None:
    """Put the checkpoint `source` in the place of `folder` as well, without its notes."""
    with _replacing(folder, before_replacing) as new:
        for name in _FILES:
            if not _linked(source / name, new / name):
                shutil.copyfile(source / name, new / name)
                fsync_path(new / name)


def _linked(source: Path, target: Path, content: bytes | None = None) -> bool:
    """Make `target` the same file as `source`, where it holds `content`; whether it is.

    A checkpoint's files are never written again, only replaced, and their bytes are on the disk
    already: nothing but the folder has to be flushed.
    """
    try:
        if content is not None and source.read_bytes() != content:
            return False
        os.link(source, target)
    except OSError:  # it does not exist, or there are no hard links here
        return False
    return True


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
            raise _damaged(path, error) from None

    def training_state(self) -> dict[str, Any]:
        """Optimizer, schedule, random generators and data cursor."""
        path = self.folder / TRAINING_STATE_FILE
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict):
                raise ValueError("it holds no mapping")
        except Exception as error:  # torch raises many types on damaged files
            raise _damaged(path, error) from None
        return content


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
        raise _damaged(folder, error) from None
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


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {first_line(error).rstrip('.')}.")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def load_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict, all of it; a CheckpointError lists the names and shapes that differ."""
    own = {k: v.shape for k, v in model.state_dict().items()}
    wrong = [f"{n} is missing" for n in own if n not in state]
    wrong += [f"{n} is unknown" for n in state if n not in own]
    wrong += [
        f"{n} is {tuple(state[n].shape)}, not {tuple(own[n])}"
        for n in own
        if n in state and state[n].shape != own[n]
    ]
    if wrong:
        raise CheckpointError(f"{where} does not fit the model: {some(wrong, '; ')}.")
    model.load_state_dict(dict(state))


def some(texts: Sequence[str], separator: str = ", ") -> str:
    """The first four of them, and how many more there are."""
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return separator.join(texts[:4]) + more
