"""Transfer: weights from a checkpoint or the reference's file into a model of another size."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
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
from dmx.training.checkpoint import open_checkpoint
from dmx.training.reference import adopt, read_output_model

POSITION_KEY = "encoder.embeddings.position.weight"
REMEDY = "; name what may start afresh in `reinit`"

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

    @property
    def shapes(self) -> Shapes:
        """By name."""
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
        text += f", afresh: {_some(self.fresh)}" if self.fresh else ""
        return text + (f", left out: {_some(self.dropped)}" if self.dropped else "")


@dataclass(frozen=True)
class _Positions:
    """The source's row of each of the target's first positions; further ones stay fresh.

    `words` say what is not row by row; `whole`: no position that the task has stays fresh.
    """

    rows: Tensor
    words: str = ""
    whole: bool = True


def read_weights(path: Path) -> Weights:
    """Weights from a checkpoint directory or a reference `*_output.model` file.

    Raises:
        CheckpointError: neither, or damaged.
    """
    if path.is_file():
        return Weights(read_output_model(path), None)
    if not is_there(path):
        raise CheckpointError(
            f"{path} does not exist; expected a checkpoint folder or a .model file."
        )
    checkpoint = open_checkpoint(path)
    return Weights(checkpoint.model_state(), checkpoint.config.task_info)


def shapes_of(config: RunConfig) -> Shapes:
    """Shapes of a resolved config's parameters and buffers, without memory for them."""
    with torch.device("meta"):
        model = Classifier(config.model, config.attention, paired=config.task_info.paired)
    return {name: value.shape for name, value in model.state_dict().items()}


def weights_checksum(path: Path) -> str:
    """SHA-256 of the file that holds the weights of a checkpoint folder, or of the file itself.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = path / MODEL_FILE if is_there(path) else path
    try:
        return sha256_file(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from None


def identified(config: RunConfig) -> RunConfig:
    """The config with the whole path and the checksum of the weights that it starts from.

    Raises:
        CheckpointError: they cannot be read, or are not those that the config names.
    """
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


def plan_transfer(
    source: Shapes,
    target: Shapes,
    reinit: Iterable[str] = (),
    *,
    tasks: tuple[Task | None, Task],
    remedy: str = REMEDY,
) -> TransferReport:
    """Decide from shapes alone what a transfer would do; used before any training, too.

    Args:
        source, target: shapes by parameter name. reinit: names, prefixes that end in a dot, or
            patterns with `*`, that keep the target's fresh values where shapes differ or the
            source has none.
        tasks: of the source, None where nothing says it, and of the target.
        remedy: what the message ends with.

    Raises:
        MisfitError: names or shapes that differ and are not named in reinit; lists them.
    """
    moved, fresh, wrong = [], [], []
    positions, whole = "", True
    allowed = tuple(reinit)
    for name, shape in target.items():
        rows = None
        if name == POSITION_KEY and name in source:
            rows = _position_rows(source[name], shape, tasks)
        if rows is not None and rows.words:
            positions, whole = rows.words, rows.whole
        elif name in source and source[name] == shape and (name != POSITION_KEY or rows):
            moved.append(name)
        elif _named(name, allowed):
            fresh.append(name)
        elif name not in source:
            wrong.append(f"{name} {tuple(shape)} is not in the source")
        else:
            wrong.append(f"{name} is {tuple(source[name])} in the source, {tuple(shape)} here")
            if name == POSITION_KEY:
                wrong[-1] += _why_not(tasks)
    left = [n for n in source if n not in target]
    wrong += [f"{n} {tuple(source[n])} has no place here" for n in left if not _named(n, allowed)]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise MisfitError(f"weights cannot be transferred: {'; '.join(wrong[:4])}{more}{remedy}.")
    return TransferReport(tuple(moved), tuple(fresh), tuple(left), positions, whole and not fresh)


def transfer(
    model: nn.Module,
    source: Weights,
    task: Task,
    reinit: Iterable[str] = (),
    *,
    whole: bool = False,
) -> TransferReport:
    """Start `model`, one for `task`, from other weights.

    Positions of a picture are enlarged with it: each source entry at (r, c) of an h x h image
    serves the k x k targets (k*r + a, k*c + b) of the k*h x k*h image, as the reference's
    get_resized_pos_emb does. Of any other sequence the first ones are kept, and further ones start
    afresh.

    Args:
        whole: refuse where any value would stay fresh, as without training after it.

    Raises:
        MisfitError: see plan_transfer.
    """
    own = model.state_dict()
    tasks = (source.task, task)
    shapes = {k: v.shape for k, v in own.items()}
    remedy = "" if whole else REMEDY
    report = plan_transfer(source.shapes, shapes, reinit, tasks=tasks, remedy=remedy)
    if whole and not report.whole:
        raise MisfitError(f"weights cannot be taken over without training: {report}.")
    state = {name: source.state[name] for name in report.moved}
    state.update({name: own[name] for name in report.fresh})
    if report.positions:
        found = _position_rows(source.shapes[POSITION_KEY], shapes[POSITION_KEY], tasks)
        assert found is not None
        state[POSITION_KEY] = own[POSITION_KEY].clone()
        state[POSITION_KEY][: len(found.rows)] = source.state[POSITION_KEY][found.rows]
    adopt(model, state, "the transferred state")
    return report


def check_reinit(reinit: Iterable[str], names: Iterable[str], where: str = "`reinit`") -> None:
    """Refuse an entry that stands for no parameter at all: a slip would go unnoticed.

    Raises:
        CheckpointError: names it, and what it may have meant.
    """
    known = sorted(set(names))
    for entry in reinit:
        if any(_named(name, (entry,)) for name in known):
            continue
        parts = [name.split(".") for name in known]
        prefixes = {".".join(p[:n]) + "." for p in parts for n in range(1, len(p))}
        close = difflib.get_close_matches(entry, [*known, *prefixes], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"a name is {known[-1]!r}, for example"
        raise CheckpointError(
            f"{where} names {entry!r}, which is no parameter; {hint} "
            "(a name, a prefix that ends in a dot, or a pattern with *)."
        )


def _named(name: str, reinit: tuple[str, ...]) -> bool:
    return any(
        name == r or (r.endswith(".") and name.startswith(r)) or fnmatch.fnmatchcase(name, r)
        for r in reinit
    )


def _position_rows(
    source: torch.Size, target: torch.Size, tasks: tuple[Task | None, Task]
) -> _Positions | None:
    """Where the target's positions come from; no words: row by row. None: they cannot."""
    if len(source) != 2 or len(target) != 2 or source[0] < 1 or source[1:] != target[1:]:
        return None
    (count, length), (source_task, target_task) = (source[0], target[0]), tasks
    side, target_side = _side(count, source_task, target_task), target_task.image_side
    same = count == length
    if (side is None) != (target_side is None):  # the one is a picture, the other is not
        return _Positions(torch.arange(count)) if same else None
    if side is None or target_side is None:
        rows = torch.arange(min(count, length))
        if same:
            return _Positions(rows)
        if length < count:
            return _Positions(rows, f"positions 0..{length - 1:,} of {count:,}")
        words = f"positions 0..{count - 1:,} kept, {count:,}..{length - 1:,} afresh"
        return _Positions(rows, words, whole=False)
    if side * side > count or target_side * target_side > length or target_side % side:
        return None
    if same and side == target_side:
        return _Positions(torch.arange(count))
    grid = torch.arange(side * side)[:, None]
    words = f"positions {side} x {side} to {target_side} x {target_side}"
    return _Positions(tile_positions(grid, target_side**2).flatten(), words)


def _side(count: int, task: Task | None, target: Task) -> int | None:
    """The side of the source's picture: its task's; of a mute file the table's, for a picture."""
    if task is not None or target.image_side is None:
        return None if task is None else task.image_side
    side = math.isqrt(count)
    return side if side * side == count else None


def _some(texts: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return separator.join(texts[:4]) + more


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
