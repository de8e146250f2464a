"""Transfer: weights from a checkpoint or the reference's file into a model of another size."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dmx.config import RunConfig
from dmx.errors import CheckpointError
from dmx.model import Classifier
from dmx.runs.layout import MODEL_FILE
from dmx.storage.files import is_there, sha256_file
from dmx.tasks import Task
from dmx.training.checkpoint import Checkpoint, open_checkpoint, some
from dmx.training.reference import read_output_model

POSITION_KEY = "encoder.embeddings.position.weight"

Shapes = Mapping[str, torch.Size]


class MisfitError(CheckpointError):
    """Names, shapes or positions of a sound source are not those of the model."""


@dataclass(frozen=True)
class Weights:
    """Weights to start from. `task` is what they were trained on, or None: a .model file is mute
    about it, and counts as of the target's kind.
    """

    state: Mapping[str, Tensor]
    task: Task | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Weights:
        return cls(checkpoint.model_state(), checkpoint.config.task_info)

    @property
    def shapes(self) -> Shapes:
        return {name: value.shape for name, value in self.state.items()}


@dataclass(frozen=True)
class TransferReport:
    """What a transfer does.

    Attributes:
        moved: names taken as they are. fresh: names that keep the new model's values.
        dropped: names that have no place in it. positions: how its positions differ, in words.
        whole: every value, each position's as well, comes from the source.
    """

    moved: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    positions: str = ""
    whole: bool = True

    def __str__(self) -> str:
        text = f"moved {len(self.moved)} tensors"
        text += f", {self.positions}" if self.positions else ""
        text += f", afresh: {some(self.fresh)}" if self.fresh else ""
        return text + (f", left out: {some(self.dropped)}" if self.dropped else "")


def read_weights(path: Path) -> Weights:
    """Weights from a checkpoint directory or a reference `*_output.model` file."""
    if path.is_file():
        return Weights(read_output_model(path), None)
    if not is_there(path):
        raise CheckpointError(
            f"{path} does not exist; expected a checkpoint folder or a .model file."
        )
    return Weights.of(open_checkpoint(path))


def shapes_of(config: RunConfig) -> Shapes:
    """Shapes of a resolved config's parameters and buffers, without memory for them."""
    with torch.device("meta"):
        model = Classifier(config.model, config.attention, paired=config.task_info.paired)
    return {name: value.shape for name, value in model.state_dict().items()}


def weights_checksum(path: Path) -> str:
    """SHA-256 of the file that holds the weights of a checkpoint folder, or of the file itself."""
    file = path / MODEL_FILE if is_there(path) else path
    try:
        return sha256_file(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from None


def identified(config: RunConfig) -> RunConfig:
    """The config with the whole path and the checksum of the weights that it starts from."""
    if config.init is None:
        return config
    path = Path(config.init.path).absolute()
    found = weights_checksum(path)
    if config.init.sha256 not in (None, found):
        raise CheckpointError(
            f"{path} holds other weights (SHA-256 {found[:12]}) than those the run starts from "
            f"({str(config.init.sha256)[:12]}); put those back, or start another run."
        )
    init = dataclasses.replace(config.init, path=str(path), sha256=found)
    return dataclasses.replace(config, init=init)


# -- what moves -----------------------------------------------------------------------------


def plan_transfer(
    source: Shapes,
    target: Shapes,
    reinit: Iterable[str] = (),
    *,
    tasks: tuple[Task | None, Task],
    whole: bool = False,
) -> TransferReport:
    """Decide from shapes alone what a transfer would do; used before any training, too.

    Args:
        source, target: shapes by parameter name. reinit: names, prefixes that end in a dot, or
            patterns with `*`, that keep the target's fresh values where shapes differ or the
            source has none.
        tasks: of the source, None where nothing says it, and of the target.
        whole: refuse where any value would stay fresh, as without training after it.

    Raises:
        MisfitError: names or shapes that differ and are not named in reinit; lists them.
    """
    moved, fresh, wrong = [], [], []
    words, covered, allowed = "", True, tuple(reinit)
    for name, shape in target.items():
        found = None
        if name == POSITION_KEY and name in source:
            found = _position_rows(source[name], shape, tasks)
        if found is not None and found[1]:
            _, words, covered = found
        elif name in source and source[name] == shape and (name != POSITION_KEY or found):
            moved.append(name)
        elif _named(name, allowed):
            fresh.append(name)
        elif name not in source:
            wrong.append(f"{name} {tuple(shape)} is not in the source")
        else:
            why = _why_not(tasks) if name == POSITION_KEY else ""
            wrong.append(f"{name} is {tuple(source[name])} in the source, {tuple(shape)} here{why}")
    left = [n for n in source if n not in target]
    wrong += [f"{n} {tuple(source[n])} has no place here" for n in left if not _named(n, allowed)]
    if wrong:
        remedy = "" if whole else "; name what may start afresh in `reinit` (--reinit)"
        raise MisfitError(f"weights cannot be transferred: {some(wrong, '; ')}{remedy}.")
    report = TransferReport(tuple(moved), tuple(fresh), tuple(left), words, covered and not fresh)
    if whole and not report.whole:
        raise MisfitError(f"weights cannot be taken over without training: {report}.")
    return report


def transfer(
    model: nn.Module,
    source: Weights,
    task: Task,
    reinit: Iterable[str] = (),
    *,
    whole: bool = False,
) -> TransferReport:
    """Start `model`, one for `task`, from other weights; see plan_transfer.

    Positions of a picture are enlarged with it: each source entry at (r, c) of an h x h image
    serves the k x k targets (k*r + a, k*c + b) of the k*h x k*h image, as the reference's
    get_resized_pos_emb does. Of any other sequence the first ones are kept, and further ones start
    afresh.
    """
    own = model.state_dict()
    shapes = {name: value.shape for name, value in own.items()}
    tasks = source.task, task
    report = plan_transfer(source.shapes, shapes, reinit, tasks=tasks, whole=whole)
    state = {name: source.state[name] for name in report.moved}
    state.update({name: own[name] for name in report.fresh})
    if report.positions:
        found = _position_rows(source.shapes[POSITION_KEY], shapes[POSITION_KEY], tasks)
        assert found is not None
        state[POSITION_KEY] = own[POSITION_KEY].clone()
        state[POSITION_KEY][: len(found[0])] = source.state[POSITION_KEY][found[0]]
    model.load_state_dict(state)
    return report


def check_reinit(reinit: Iterable[str], names: Iterable[str]) -> None:
    """Refuse an entry that stands for no parameter at all: a slip would go unnoticed."""
    known = sorted(set(names))
    for entry in reinit:
        if any(_named(name, (entry,)) for name in known):
            continue
        parts = [name.split(".") for name in known]
        prefixes = {".".join(p[:n]) + "." for p in parts for n in range(1, len(p))}
        close = difflib.get_close_matches(entry, [*known, *prefixes], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"a name is {known[-1]!r}, for example"
        raise CheckpointError(
            f"reinit names {entry!r}, which is no parameter; {hint} "
            "(a name, a prefix that ends in a dot, or a pattern with *)."
        )


def _named(name: str, reinit: tuple[str, ...]) -> bool:
    return any(
        name == r or (r.endswith(".") and name.startswith(r)) or fnmatch.fnmatchcase(name, r)
        for r in reinit
    )


# -- positions ------------------------------------------------------------------------------


def _position_rows(
    source: torch.Size, target: torch.Size, tasks: tuple[Task | None, Task]
) -> tuple[Tensor, str, bool] | None:
    """Where the target's first positions come from; None: they cannot.

    Returns:
        The source's row of each; what is not row by row, in words; whether no position that the
        task has stays fresh.
    """
    if len(source) != 2 or len(target) != 2 or source[0] < 1 or source[1:] != target[1:]:
        return None
    count, length = source[0], target[0]
    side, target_side = _side(count, *tasks), tasks[1].image_side
    as_they_are = torch.arange(min(count, length)), "", True
    if side is None and target_side is None and length < count:
        return torch.arange(length), f"positions 0..{length - 1:,} of {count:,}", True
    if side is None and target_side is None and length > count:
        words = f"positions 0..{count - 1:,} kept, {count:,}..{length - 1:,} afresh"
        return torch.arange(count), words, False
    if side is None or target_side is None:  # where the one is a picture, the other is not
        return as_they_are if count == length else None
    if side * side > count or target_side * target_side > length or target_side % side:
        return None
    if count == length and side == target_side:
        return as_they_are
    grid = torch.arange(side * side)[:, None]
    words = f"positions {side} x {side} to {target_side} x {target_side}"
    return tile_positions(grid, target_side**2).flatten(), words, True


def _side(count: int, task: Task | None, target: Task) -> int | None:
    """The side of the source's picture: its task's; of a mute file the table's, for a picture."""
    if task is not None or target.image_side is None:
        return None if task is None else task.image_side
    side = math.isqrt(count)
    return side if side * side == count else None


def _why_not(tasks: tuple[Task | None, Task]) -> str:
    source, target = tasks
    if source is not None and (source.image_side is None) != (target.image_side is None):
        which = source if source.image_side is not None else target
        return f" (only {which.name} is a picture)"
    return "" if target.image_side is None else " (a picture grows by a whole factor)"


def tile_positions(position: Tensor, length: int) -> Tensor:
    """[h*h, D] position embedding, each entry a square tile of a larger image, -> [length, D]."""
    side, target_side = math.isqrt(position.shape[0]), math.isqrt(length)
    repeats = target_side // side
    grid = position.view(side, side, -1)
    return grid.repeat_interleave(repeats, 0).repeat_interleave(repeats, 1).reshape(length, -1)
