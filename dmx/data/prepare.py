"""Prepare a task's data: choose the reader, download if need be, write and open the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dmx.data.download import download
from dmx.data.locate import default_data_root, is_prepared, prepare_command
from dmx.data.progress import bytes_text, seconds_text
from dmx.data.readers.base import Reader, Request, check_options, readers_for
from dmx.data.source import Source, open_source
from dmx.data.store import Store, open_store
from dmx.errors import ConfigError, DataError, DmxError
from dmx.tasks import Task, task_for, task_names
from dmx.training.job import num_cores

log = logging.getLogger(__name__)
DOWNLOADS_FOLDER = "downloads"


def prepare(
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
    if opened is None and reader.address and is_prepared(task.name, root) and not force:
        log.info("%s is prepared already", root / task.name)
        return open_store(root / task.name)
    if opened is None and reader.address:
        archive = download(reader.address, root / DOWNLOADS_FOLDER, reader.address_checksum)
        opened = open_source(archive)
        if not reader.fits(task, opened):
            raise DataError(f"{archive} does not hold {reader.expects}.")
    request = Request(
        task=task,
        folder=root / task.name,
        source=opened,
        workers=workers or num_cores(),
        address=address,
        options=dict(options or {}),
        force=force,
    )
    check_options(request, reader)
    reader.prepare(request)
    store = open_store(request.folder)
    log.info(
        "%s is ready in %s: %s, %s (%s)",
        store.manifest.label,
        store.folder,
        ", ".join(f"{split} {count:,}" for split, count in store.manifest.splits.items()),
        bytes_text(store.manifest.num_bytes),
        seconds_text(time.monotonic() - start),
    )
    return store


def choose(task: Task, source: Source | None) -> Reader:
    """The reader for the task and source.

    Raises:
        DataError: none fits; the sentence says what was looked for.
    """
    readers = readers_for(task)
    for reader in readers:
        if reader.fits(task, source):
            return reader
    if source is None:
        for reader in readers:
            if reader.address:
                return reader
        raise DataError(f"{task.name} cannot be generated or downloaded; pass --source PATH.")
    expected = "; or ".join(r.expects for r in readers if not r.fits(task, None))
    raise DataError(
        f"{source.path} holds no data for {task.name}. Looked for: {expected}."
        + _remedy(readers, task, source)
    )


def _remedy(readers: list[Reader], task: Task, source: Source) -> str:
    """Where a part of the right folder was given: the whole."""
    whole = source.path.parent
    with suppress(DataError):
        if source.path.is_dir() and any(r.fits(task, open_source(whole)) for r in readers):
            return f" {whole} does hold them; pass that."
    return ""


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
            stores.append(prepare(name, data_root, source=opened, force=force))
        except DmxError as error:
            log.error("%s: %s", name, error)
            failed[name] = str(error)
    return stores, failed


def prepare_missing(
    task_name: str,
    data_root: Path | None = None,
    *,
    workers: int | None = None,
    address: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Store:
    """Open the task's store; a missing set that dmx can generate is generated first.

    An estimate of time and disk is logged before it starts. A second process that asks for the
    same set waits for the first. Without `options` any prepared set of that name will do.

    Raises:
        DataError: the set is missing and cannot be generated (the sentence gives the command to
            prepare it), or it is prepared with other `options`.
    """
    task = task_for(task_name)
    root = (data_root or default_data_root()).absolute()
    if is_prepared(task.name, root) and not options:
        return open_store(root / task.name)
    if not task.generated:
        raise DataError(
            f"Task {task.name} has no prepared data in {root / task.name}; run: "
            f"{prepare_command(task.name, root)}"
        )
    if not is_prepared(task.name, root):
        log.info("%s is not prepared in %s; generating it", task.name, root)
    return prepare(task.name, root, workers=workers, address=address, options=options)
