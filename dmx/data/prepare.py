"""A task's data: what a reader is, how it prepares them, and a sample where there are none."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dmx.data.sources import Source, open_source
from dmx.data.store import Manifest, Store, open_store
from dmx.data.store_writer import StoreWriter, write_store
from dmx.errors import ConfigError, DataError, DmxError
from dmx.format import command_line, duration, scaled
from dmx.process import num_cores
from dmx.registry import Registry
from dmx.schema import expand, local_path
from dmx.storage.files import MANIFEST_FILE
from dmx.tasks import Task, task_for, task_names

log = logging.getLogger(__name__)
ROOT_VARIABLE = "DMX_DATA_ROOT"
DOWNLOADS_FOLDER = "downloads"
SAMPLES_FOLDER = "samples"

# -- readers ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to prepare one task."""

    task: Task
    folder: Path  # the store's final place
    given: Source | None = None  # at the place that the reader found; None to generate
    workers: int = 1  # local processes
    on_cluster: bool = False  # the connected Ray cluster generates instead
    options: Mapping[str, Any] = field(default_factory=dict)  # num_images, seed, render, ...

    @property
    def source(self) -> Source:
        """The source; readers with `find` have one."""
        assert self.given is not None
        return self.given

    def files(self, names: Mapping[str, str]) -> Iterator[tuple[str, IO[bytes], str]]:
        """(split, stream, name for messages) of one file per split: split -> file."""
        splits = {name: split for split, name in names.items()}
        for name, stream in self.source.open(splits):
            yield splits[name], stream, self.source.describe(name)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One way to get a task's data."""

    name: str  # of the data in the manifest, e.g. "lra-text"
    families: tuple[str, ...]  # task families it serves; empty for all
    find: Callable[[Task, Source], str | None] | None = None
    """The folder of the task's data in a source, or None; no function: it needs no source."""
    expects: str = ""  # what `find` looks for, in words, for the message when nothing fits
    describe: Mapping[str, Any] | Callable[[Request], dict[str, Any]]
    """Fields of the manifest beside the task's own; a function refuses what cannot be read."""
    fill: Callable[[Request, StoreWriter], Mapping[str, Any] | None]
    """Adds the examples; what it returns is added to the manifest's parameters."""
    options: tuple[str, ...] = ()  # the settings it understands; others are refused
    address: str = ""  # official download
    checksum: str = ""  # "md5:..." or "sha256:..." of the download
    sample: str = ""  # what it is, if the data only stand in for the published ones
    rank: int = 10  # readers with a lower rank are asked first

    def found(self, task: Task, source: Source | None) -> str | None:
        """The folder of the data in the source, "" where none is needed; None: it does not fit."""
        if source is None:
            return "" if self.find is None or self.address else None
        return self.find(task, source) if self.find else None


READERS: Registry[Reader] = Registry("reader", "dmx.data.readers")


def register(reader: Reader) -> Reader:
    """File a reader under its name."""
    return READERS.register(reader.name)(reader)


def readers_for(task: Task, *, sample: bool = False) -> list[Reader]:
    """The readers that serve a task's family, in the order in which they are asked."""
    readers = [READERS.get(name) for name in READERS.names()]
    serving = [r for r in readers if not r.families or task.family in r.families]
    return sorted((r for r in serving if bool(r.sample) is sample), key=lambda r: (r.rank, r.name))


# -- opening ------------------------------------------------------------------------------------


def default_data_root() -> Path:
    """$DMX_DATA_ROOT, else ./data."""
    root = os.environ.get(ROOT_VARIABLE) or "data"
    return local_path(ROOT_VARIABLE, expand(ROOT_VARIABLE, root)).absolute()


def is_prepared(task_name: str, data_root: Path) -> bool:
    """Whether `data_root` holds a store of the task (its files are checked when it is opened)."""
    return (data_root / task_name / MANIFEST_FILE).is_file()


def prepare_command(task_name: str, data_root: Path) -> str:
    """The command that prepares `task_name` under `data_root`, to put into messages."""
    source = [] if task_for(task_name).generated else ["--source", "PATH"]
    return command_line("dmx.data", [task_name, *source, "--data-root", str(data_root)])


def open_data(
    task_name: str,
    data_root: str | Path | None = None,
    *,
    generate: bool = False,
    allow_sample: bool = False,
    workers: int | None = None,
    on_cluster: bool = False,
    options: Mapping[str, Any] | None = None,
    temporary: Path | None = None,
) -> Store:
    """Open the task's data.

    With `data_root` only that root counts. Without it the default root is looked at; if the task
    is not prepared there and has a sample, that is prepared (once, in `<default root>/samples/`)
    and opened, and a banner is logged.

    Args:
        generate: generate a missing set that dmx can generate.
        allow_sample: whether a sample may stand in.
        workers, on_cluster, options: of `prepare_data`, for generating; without options any
            prepared set of that name will do.
        temporary: a folder for a sample that is not prepared yet.

    Raises:
        ConfigError: no such task.
        DataError: the data are not prepared (the sentence gives the command), damaged, or
            generated with other options.
    """
    task = task_for(task_name)
    root = default_data_root() if data_root is None else local_path("--data-root", str(data_root))
    root = root.absolute()
    prepared = is_prepared(task.name, root)
    if task.generated and generate and (options or not prepared):
        if not prepared:
            log.info("%s is not prepared in %s; generating it", task.name, root)
        return prepare_data(
            *(task.name, root), workers=workers, on_cluster=on_cluster, options=options
        )
    if not prepared:
        return _stand_in(task, root, allow_sample and data_root is None, temporary)
    store = open_store(root / task.name)
    if store.manifest.task != task.name:
        raise DataError(
            f"{store.folder} holds {store.manifest.task}, not {task.name}; delete it and run: "
            f"{prepare_command(task.name, root)}"
        )
    log.info("data: %s (%s)", store.manifest.label, store.folder)
    return store


def _stand_in(task: Task, root: Path, allowed: bool, temporary: Path | None) -> Store:
    """The task's sample, announced as one."""
    command = prepare_command(task.name, root)
    missing = f"Task {task.name} has no prepared data in {root / task.name}; run: {command}"
    sample = next(iter(readers_for(task, sample=True)), None)
    if not allowed or sample is None:
        raise DataError(missing)
    folder = root / SAMPLES_FOLDER / sample.name
    if temporary is not None and not (folder / MANIFEST_FILE).is_file():
        folder = temporary / sample.name
    try:
        if (folder / MANIFEST_FILE).is_file():
            store = open_store(folder)
        else:
            store = write(sample, Request(task=task, folder=folder))
    except DataError as error:
        raise DataError(f"{missing} (Its sample cannot stand in: {error})") from error
    log.warning(
        "data: %s. %s has no prepared LRA data in %s, so this runs on %s. For LRA: %s",
        *(store.manifest.label, task.name, root, sample.sample, command),
    )
    return store


# -- preparing ----------------------------------------------------------------------------------


def prepare_data(
    task_name: str,
    data_root: Path | None = None,
    *,
    source: Path | Source | None = None,
    workers: int | None = None,
    on_cluster: bool = False,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Store:
    """Prepare one task and open its store; quick when it is prepared already.

    Args:
        data_root: default: the default root.
        source: folder or archive; None generates the set, or downloads it where dmx cannot.
        workers: local processes for generated sets; default: all CPUs.
        on_cluster: the Ray cluster that is connected generates instead.
        options: settings of the reader (seed, num_images, render, num_train, ...).
        force: replace an existing store.

    """
    start = time.monotonic()
    task = task_for(task_name)
    root = (data_root or default_data_root()).absolute()
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} must be at least 1.")
    given = open_source(source) if isinstance(source, Path) else source
    reader, inner = _choose(task, given)
    if given is None and reader.address:
        if is_prepared(task.name, root) and not force:
            log.info("%s is prepared already", root / task.name)
            return open_store(root / task.name)
        from dmx.data.download import download  # requests takes a moment to import

        given = open_source(download(reader.address, root / DOWNLOADS_FOLDER, reader.checksum))
        reader, inner = _choose(task, given)
    for name in options or ():
        if name not in reader.options:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} has no effect on {task.name} from {reader.name}.")
    request = Request(
        task=task,
        folder=root / task.name,
        given=given and given.at(inner),
        workers=workers or num_cores(),
        on_cluster=on_cluster,
        options=dict(options or {}),
    )
    store = write(reader, request, force=force)
    manifest, took = store.manifest, duration(time.monotonic() - start)
    sizes = [f"{split} {count:,}" for split, count in manifest.splits.items()]
    sizes.append(f"{scaled(manifest.num_bytes, 'B')} ({took})")
    log.info("%s is ready in %s: %s", manifest.label, store.folder, ", ".join(sizes))
    return store


def write(reader: Reader, request: Request, *, force: bool = False) -> Store:
    """The store that the reader makes of what is requested, unless it is there already."""
    fields: dict[str, Any] = {"data_name": reader.name, "is_sample": bool(reader.sample)}
    fields |= reader.describe(request) if callable(reader.describe) else reader.describe
    if request.given:
        fields["origin"] += f", {request.given.path}"
    manifest = Manifest.for_task(request.task, **fields)

    def fill(writer: StoreWriter) -> Mapping[str, Any] | None:
        with request.given.explained() if request.given else nullcontext():
            return reader.fill(request, writer)

    return write_store(request.folder, manifest, fill, replace_existing=force)


def _choose(task: Task, source: Source | None) -> tuple[Reader, str]:
    """The reader for the task and source, and the folder of the data in the source."""
    readers = readers_for(task)
    for reader in readers:
        if (inner := reader.found(task, source)) is not None:
            return reader, inner
    if source is None:
        raise DataError(f"{task.name} cannot be generated or downloaded; pass --source PATH.")
    whole = source.path.parent
    remedy = ""
    with suppress(DataError):  # a part of the right folder was given
        if source.path.is_dir() and _holds(open_source(whole), task):
            remedy = f" {whole} does hold them; pass that."
    expected = "; or ".join(r.expects for r in readers if r.expects)
    raise DataError(f"{source.path} holds no data for {task.name}. Looked for: {expected}.{remedy}")


def _holds(source: Source, task: Task) -> bool:
    return any(reader.found(task, source) is not None for reader in readers_for(task))


def prepare_all(
    source: Path, data_root: Path | None = None, *, force: bool = False
) -> dict[str, str]:
    """Prepare every published task that `source` holds; the errors of those that failed."""
    opened = open_source(source)
    held = [name for name in task_names() if _holds(opened, task_for(name))]
    if not held:
        raise DataError(f"{opened.path} holds no data for any task of dmx.")
    log.info("%s holds %s", opened.path, ", ".join(held))
    failed: dict[str, str] = {}
    for name in held:
        try:
            prepare_data(name, data_root, source=opened, force=force)
        except DmxError as error:
            log.error("%s: %s", name, error)
            failed[name] = str(error)
    return failed
