"""What a reader is: for which tasks, where in a source it finds its files, how it fills a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmx.data.sources import Source
from dmx.data.store_writer import StoreWriter
from dmx.errors import ConfigError
from dmx.registry import Registry
from dmx.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to prepare one task.

    Attributes:
        task: what to prepare. folder: the store's final place.
        source: the data to read, or None to generate.
        root: what the reader's `find` returned.
        workers: local processes. address: of a Ray cluster for generated sets, or None.
        options: reader-specific settings that the user gave (num_images, seed, render, ...).
    """

    task: Task
    folder: Path
    source: Source | None = None
    root: str = ""
    workers: int = 1
    address: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def found(self) -> tuple[Source, str]:
        """The source, and where the data are in it."""
        assert self.source is not None, "a reader with `find` has a source"
        return self.source, self.root


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One way to get a task's data.

    Attributes:
        name: the data's name in the manifest, e.g. "lra-text".
        families: task families it serves; empty for all.
        find: the place of the task's data in a source, or None; no function: it generates them.
        expects: what `find` looks for, in words, for the message when nothing fits.
        describe: fields of the manifest beside the task's own; it refuses what cannot be read.
        fill: adds the examples; what it returns is added to the manifest's parameters.
        options: the settings it understands; others are refused.
        address: official download, or "".
        address_checksum: "md5:..." or "sha256:..." of the download, or "".
        rank: readers with a lower rank are asked first.
    """

    name: str
    families: tuple[str, ...]
    find: Callable[[Task, Source], str | None] | None = None
    expects: str = ""
    describe: Callable[[Request], dict[str, Any]]
    fill: Callable[[Request, StoreWriter], Mapping[str, Any] | None]
    options: tuple[str, ...] = ()
    address: str = ""
    address_checksum: str = ""
    rank: int = 10

    def fits(self, task: Task, source: Source | None) -> bool:
        """Whether it can read the task from the source, or make it from none."""
        if self.find is None or source is None:
            return self.find is None and source is None
        return self.find(task, source) is not None

    def check(self, request: Request) -> None:
        """Refuse settings that would silently be ignored.

        Raises:
            ConfigError: names the option and the reader.
        """
        for name in request.options:
            if name not in self.options:
                option = f"--{name.replace('_', '-')}"
                at = f"{request.task.name} from {self.name}"
                raise ConfigError(f"{option} has no effect on {at}.")


READERS: Registry[Reader] = Registry("reader", "dmx.data.readers")


def readers_for(task: Task) -> list[Reader]:
    """The readers that serve a task's family, in the order in which they are asked."""
    readers = [READERS.get(name) for name in READERS.names()]
    serving = [r for r in readers if not r.families or task.family in r.families]
    return sorted(serving, key=lambda reader: (reader.rank, reader.name))
