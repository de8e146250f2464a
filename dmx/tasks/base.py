"""What a task is: length, vocabulary, classes, and the reference's training preset for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from dmx.errors import ConfigError
from dmx.registry import Registry, choices_message

SPLITS = ("train", "dev", "test")


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
        preset: dotted RunConfig keys to the reference's values for this task (lra_config.py of
            Solving-LRA-PathX), laid under whatever the user sets.
    """

    name: str
    family: str
    max_length: int
    vocab_size: int
    num_classes: int
    paired: bool = False
    image_side: int | None = None
    generated: bool = False
    preset: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


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
    for key in TASKS.names():
        value = TASKS.get(key)
        if not isinstance(value, Task):
            task = value(name)
            if task is not None:
                return task
    raise ConfigError(f"task {choices_message(name, task_names())}.")


def task_names() -> list[str]:
    """The names of the published tasks, sorted; families (pathfinder) list their usual members."""
    names = [n for n in TASKS.names() if isinstance(TASKS.get(n), Task)]
    for key in TASKS.names():
        value = TASKS.get(key)
        if not isinstance(value, Task):
            names.extend(getattr(value, "members", ()))
    return sorted(names)
