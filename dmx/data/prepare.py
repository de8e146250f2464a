"""A task's data: prepared from a source, a download or a generator; opened, or a sample instead."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dmx.data.manifest import Manifest
from dmx.data.readers.base import Reader, Request, readers_for
from dmx.data.samples import sample_for
from dmx.data.sources import Source, open_source
from dmx.data.store import Store, open_store
from dmx.data.store_writer import write_store
from dmx.errors import ConfigError, DataError, DmxError
from dmx.format import duration, scaled
from dmx.process import num_cores
from dmx.schema import expand, local_path
from dmx.storage.files import MANIFEST_FILE
from dmx.tasks import Task, task_for, task_names

log = logging.getLogger(__name__)
ROOT_VARIABLE = "DMX_DATA_ROOT"
DOWNLOADS_FOLDER = "downloads"
SAMPLES_FOLDER = "samples"


def default_data_root() -> Path:
    """$DMX_DATA_ROOT, else ./data."""
    root = os.environ.get(ROOT_VARIABLE) or "data"
    return local_path(ROOT_VARIABLE, expand(ROOT_VARIABLE, root)).absolute()


def is_prepared(task_name: str, data_root: Path) -> bool:
    """Whether `data_root` holds a store of the task (its files are checked when it is opened)."""
    return (data_root / task_name / MANIFEST_FILE).is_file()


def prepare_command(task_name: str, data_root: Path) -> str:
    """The command that prepares `task_name` under `data_root`, to put into messages."""
    source = "" if task_for(task_name).generated else " --source PATH"
    return (
        f"python -m dmx.data {shlex.quote(task_name)}{source} "
        f"--data-root {shlex.quote(str(data_root))}"
    )


def open_data(
    task_name: str,
    data_root: str | Path | None = None,
    *,
    generate: bool = False,
    allow_sample: bool = False,
    workers: int | None = None,
    address: str | None = None,
    options: Mapping[str, Any] | None = None,
    temporary: Path | None = None,
) -> Store:
    """Open the task's data.

    With `data_root` only that root counts. Without it the default root is looked at; if the task
    is not prepared there and has a sample, that is prepared (once, in `<default root>/samples/`)
    and opened, and a banner is logged.

    Args:
        generate: generate a missing set that dmx can generate. A second process that asks for the
            same set waits for the first.
        allow_sample: whether a sample may stand in.
        workers, address, options: of `prepare_data`, for generating; without options any prepared
            set of that name will do.
        temporary: a folder for a sample that is not prepared yet.

    Raises:
        ConfigError: no such task.
        DataError: the data are not prepared (the sentence gives the command), damaged, generated
            with other options, or the sample's package is not installed.
    """
    task = task_for(task_name)
    root = default_data_root() if data_root is None else local_path("--data-root", str(data_root))
    root = root.absolute()
    prepared = is_prepared(task.name, root)
    if task.generated and generate and (options or not prepared):
        if not prepared:
            log.info("%s is not prepared in %s; generating it", task.name, root)
        return prepare_data(task.name, root, workers=workers, address=address, options=options)
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
    sample = sample_for(task.name)
    if not allowed or sample is None:
        raise DataError(missing)
    folder = root / SAMPLES_FOLDER / sample.name
    if temporary is not None and not (folder / MANIFEST_FILE).is_file():
        folder = temporary / sample.name
    try:
        if not (folder / MANIFEST_FILE).is_file():
            sample.prepare(folder)
        store = open_store(folder)
    except DataError as error:
        raise DataError(f"{missing} (Its sample cannot stand in: {error})") from error
    log.warning(
        "data: %s. %s has no prepared LRA data in %s, so this runs on %s. For LRA: %s",
        *(store.manifest.label, task.name, root, sample.what, command),
    )
    return store


def prepare_data(
    task_name: str,
    data_root: Path | None = None,
    *,
    source: Path | Source | None = None,
    workers: int | None = None,
    address: str | None = None,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Store:
    """Prepare one task and open its store; quick when it is prepared already.

    Args:
        data_root: default: the default root.
        source: folder or archive; None generates the set, or downloads it where dmx cannot.
        workers: local processes for generated sets; default: all CPUs.
        address: of a Ray cluster that generates instead.
        options: settings of the reader (seed, num_images, render, num_train, ...).
        force: replace an existing store.

    Raises:
        ConfigError: unknown task or option. DataError: bad or missing data.
    """
    start = time.monotonic()
    task = task_for(task_name)
    root = (data_root or default_data_root()).absolute()
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} must be at least 1.")
    opened = open_source(source) if isinstance(source, Path) else source
    reader = choose(task, opened)
    if opened is None and reader.address:
        if is_prepared(task.name, root) and not force:
            log.info("%s is prepared already", root / task.name)
            return open_store(root / task.name)
        from dmx.data.download import download  # requests takes a moment to import

        archive = download(reader.address, root / DOWNLOADS_FOLDER, reader.address_checksum)
        opened = open_source(archive)
        if not reader.fits(task, opened):
            raise DataError(f"{archive} does not hold {reader.expects}.")
    request = Request(
        task=task,
        folder=root / task.name,
        source=opened,
        root=reader.find(task, opened) or "" if reader.find and opened else "",
        workers=workers or num_cores(),
        address=address,
        options=dict(options or {}),
    )
    reader.check(request)
    fields = {"data_name": reader.name, **reader.describe(request)}
    manifest = Manifest.for_task(task, **fields)
    write_store(
        *(request.folder, manifest),
        lambda writer: reader.fill(request, writer),
        replace_existing=force,
    )
    store = open_store(request.folder)
    log.info(
        "%s is ready in %s: %s, %s (%s)",
        store.manifest.label,
        store.folder,
        ", ".join(f"{split} {count:,}" for split, count in store.manifest.splits.items()),
        scaled(store.manifest.num_bytes, "B"),
        duration(time.monotonic() - start),
    )
    return store


def choose(task: Task, source: Source | None) -> Reader:
    """The reader for the task and source.

    Raises:
        DataError: none fits; the sentence says what was looked for.
    """
    readers = readers_for(task)
    for reader in readers:
        if reader.fits(task, source) or (source is None and reader.address):
            return reader
    if source is None:
        raise DataError(f"{task.name} cannot be generated or downloaded; pass --source PATH.")
    whole = source.path.parent
    remedy = ""
    with suppress(DataError):  # a part of the right folder was given
        if source.path.is_dir() and any(r.fits(task, open_source(whole)) for r in readers):
            remedy = f" {whole} does hold them; pass that."
    expected = "; or ".join(r.expects for r in readers if r.expects)
    raise DataError(f"{source.path} holds no data for {task.name}. Looked for: {expected}.{remedy}")


def prepare_all(
    source: Path, data_root: Path | None = None, *, force: bool = False
) -> tuple[list[Store], dict[str, str]]:
    """Prepare every published task that `source` holds; one failure does not stop the others.

    Returns:
        The stores, and for each task that failed, its error.

    Raises:
        DataError: the source does not exist or holds no known task.
    """
    opened = open_source(source)
    held = [
        name
        for name in task_names()
        if any(r.fits(task_for(name), opened) for r in readers_for(task_for(name)))
    ]
    if not held:
        raise DataError(f"{opened.path} holds no data for any task of dmx.")
    log.info("%s holds %s", opened.path, ", ".join(held))
    stores: list[Store] = []
    failed: dict[str, str] = {}
    for name in held:
        try:
            stores.append(prepare_data(name, data_root, source=opened, force=force))
        except DmxError as error:
            log.error("%s: %s", name, error)
            failed[name] = str(error)
    return stores, failed
