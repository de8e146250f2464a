"""What a task is: length, vocabulary, classes, and the reference's training preset for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from dmx.errors import ConfigError
from dmx.registry import Registry, choices_message

SPLITS = ("train", "dev", "test")
_SIGMAS = 5.0
"""A class's share in a random part of a set lies that far from its share in the set at most."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A data set as published: what a prepared one is held against.

    Attributes:
        counts: examples per split, as in SPLITS; several where the reference's files have others.
        shares: the least and the largest share of a class in a split.
    """

    counts: tuple[tuple[int, int, int], ...]
    shares: tuple[float, float]

    def lacking(self, found: Mapping[str, int]) -> str:
        """`20 of 200,000 examples` for a part of the set, "" for all of it."""
        counts = tuple(found[split] for split in SPLITS)
        if counts in self.counts:
            return ""
        ours, whole = sum(counts), sum(self.counts[0])
        if ours < whole:
            return f"{ours:,} of {whole:,} examples"
        return "/".join(f"{n:,}" for n in counts) + " examples"

    def unbalanced(self, classes: Mapping[str, Sequence[int]]) -> str:
        """`83 % of train are class 1` where no random part of the set has such labels, else "".

        Args:
            classes: split -> examples of each class.
        """
        for split, counts in classes.items():
            total = sum(counts)
            spread = [_SIGMAS * math.sqrt(p * (1 - p) / total) for p in self.shares]
            for number, count in enumerate(counts):
                share = count / total
                if not self.shares[0] - spread[0] <= share <= self.shares[1] + spread[1]:
                    return f"{100 * share:.0f} % of {split} are class {number}"
        return ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One classification task over token sequences.

    Attributes:
        name: as typed by users and as the folder under the data root is called.
        family: what search spaces and presets go by (`pathfinder` for all of its sets).
        max_length: tokens per sequence, padding included; a power of two, as the reference rounds.
        vocab_size: ids lie in 0..vocab_size-1; id 0 is padding (or black), vocab_size-1 is CLS.
        num_classes: classes of the published data set; sample data may have others, and then win.
        paired: the input is two sequences (retrieval).
        image_side: side of the square image whose pixels are the tokens, or None.
        generated: True when dmx can make the data itself, with no download.
        published: the data set of that name in the literature; None for any other task, whose
            results stand beside no published ones.
        preset: dotted RunConfig keys to the reference's values for this task (lra_config.py of
            Solving-LRA-PathX), laid under whatever the user sets.
        cpu_steps, cpu_batch_size: a trial of a search where there is no GPU, and no more than the
            preset's: minutes, not days.
    """

    name: str
    family: str
    max_length: int
    vocab_size: int
    num_classes: int
    paired: bool = False
    image_side: int | None = None
    generated: bool = False
    published: Published | None = None
    preset: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    cpu_steps: int = 200
    cpu_batch_size: int = 32


TaskFamily = Callable[[str], Task | None]
"""Takes a name; returns its task if the name belongs to the family, else None. It raises
ConfigError when the name plainly belongs to the family but asks for something impossible."""

TASKS: Registry[Task | TaskFamily] = Registry("task", "dmx.tasks")


def task_for(name: str) -> Task:
    """The task called `name`.

    Raises:
        ConfigError: no task has that name.
    """
    if name in TASKS:
        value = TASKS.get(name)
        if isinstance(value, Task):
            return value
    if (ours := _OTHER_NAMES.get(re.sub("[-_ ]", "", name.lower()))) is not None:
        raise ConfigError(f"task {name!r} is called {ours} here.")
    for key in TASKS.names():
        value = TASKS.get(key)
        if not isinstance(value, Task):
            task = value(name)
            if task is not None:
                return task
    raise ConfigError(f"task {choices_message(name, task_names())}.")


_OTHER_NAMES = {
    **dict.fromkeys(("imdb", "aclimdb", "imdbreviews"), "text"),
    **dict.fromkeys(("aan", "matching"), "retrieval"),
    **dict.fromkeys(("cifar", "cifar10", "scifar10"), "image"),
    **dict.fromkeys(("pathfinder", "pathfinder32"), "pathfinder32-curv_contour_length_14"),
    "pathx": "pathfinder128-curv_contour_length_14 (as released) or pathX-cl14_nogap (generated)",
}
"""What other papers and programs call the tasks, in small letters and without hyphens."""


def find_task(name: str) -> Task | None:
    """The task, or None for a name that this version of dmx does not know."""
    try:
        return task_for(name)
    except ConfigError:
        return None


def task_names() -> list[str]:
    """The names of the published tasks, sorted; families (pathfinder) list their usual members."""
    names = [n for n in TASKS.names() if isinstance(TASKS.get(n), Task)]
    for key in TASKS.names():
        value = TASKS.get(key)
        if not isinstance(value, Task):
            names.extend(getattr(value, "members", ()))
    return sorted(names)
