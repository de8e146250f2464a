"""What a reader is: for which tasks, whether a source fits it, and how it writes the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmx.data.sources import Source
from dmx.errors import ConfigError
from dmx.process import num_cores
from dmx.registry import Registry
from dmx.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to prepare one task.

    Attributes:
        task: what to prepare. folder: the store's final place.
        source: the data to read, or None to generate (or, if the reader can, to download).
        workers: local processes. address: of a Ray cluster for generated sets, or None.
        options: reader-specific settings that the user gave (num_images, seed, render, ...).
        force: replace a store that exists.
    """

    task: Task
    folder: Path
    source: Source | None = None
    workers: int = field(default_factory=num_cores)
    address: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One way to get a task's data.

    Attributes:
        name: the data's name in the manifest, e.g. "lra-text".
        families: task families it serves; empty for all.
        fits: whether it can read the task from the source (None: no source was given).
        expects: what `fits` looks for, in words, for the message when nothing fits.
        prepare: writes the store.
        options: the settings it understands; others are refused.
        address: official download, or "".
        address_checksum: "md5:..." or "sha256:..." of the download, or "".
        rank: readers with a lower rank are asked first.
    """

    name: str
    families: tuple[str, ...]
    fits: Callable[[Task, Source | None], bool]
    expects: str
    prepare: Callable[[Request], None]
    options: tuple[str, ...] = ()
    address: str = ""
    address_checksum: str = ""
    rank: int = 10


READERS: Registry[Reader] = Registry("reader", "dmx.data.readers")


def readers_for(task: Task) -> list[Reader]:
    """The readers that serve a task's family, in the order in which they are asked."""
    readers = [READERS.get(name) for name in READERS.names()]
    serving = [r for r in readers if not r.families or task.family in r.families]
    return sorted(serving, key=lambda reader: (reader.rank, reader.name))


def check_options(request: Request, reader: Reader) -> None:
    """Refuse settings that the reader would silently ignore.

    Raises:
        ConfigError: names the option and the reader.
    """
    for name in request.options:
        if name not in reader.options:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} has no effect on {request.task.name} from {reader.name}.")
