"""Where a run and its data lie: a folder, object storage, data on each node's own disk."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from dmx.data import prepare
from dmx.data.prepare import default_data_root
from dmx.data.store import Store, open_store
from dmx.errors import ConfigError
from dmx.schema import is_url
from dmx.storage.remote import ObjectStorage, StorageLayout, copy_store, join

_LONGEST_NAME = 255


def run_folder(storage: str, name: str | None, default: str) -> Path:
    """The absolute folder of a run or study, below its storage; nothing is created.

    Raises:
        ConfigError: `name` is not a plain folder name, or the storage cannot be written.
    """
    name = default if name is None else name
    if not name or "/" in name or "\\" in name or name.startswith(".") or not name.isprintable():
        raise ConfigError(f"--name is {name!r}; it must be a plain folder name.")
    folder = Path(storage).absolute() / name
    try:
        if len(os.fsencode(name)) > _LONGEST_NAME:  # where the storage is new, nobody would say so
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        place = next(p for p in (folder, *folder.parents) if p.exists())
        with tempfile.TemporaryFile(dir=place):  # a file with no name
            pass
        if place == folder:
            next(folder.iterdir(), None)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); give another --storage."
        ) from None
    return folder


def find_places(
    *,
    storage: str,
    name: str | None,
    default: str,
    scratch: str | None,
    data_root: str | None,
    node_data: str | None,
) -> tuple[Path, StorageLayout]:
    """The run's folder on this node, and where its nodes meet; nothing is created.

    Raises:
        ConfigError: the name is no plain folder name, a folder cannot be written, a URL is none.
    """
    home = os.path.expanduser("~")  # noqa: PTH111  pathlib raises where there is none
    own = Path(home) / ".cache" / "dmx"
    if home == "~":
        own = Path(tempfile.gettempdir()) / f"dmx-{os.getuid()}"
    base = Path(scratch or own).absolute()
    run_url = None
    if is_url(storage):
        ObjectStorage(storage)  # a malformed one is said now
        own = base / "runs" / hashlib.sha256(storage.encode()).hexdigest()[:12]
        folder = run_folder(str(own), name, default)
        run_url = join(storage, folder.name)
    else:
        folder = run_folder(storage, name, default)
    for option, value in (("--scratch", scratch), ("--node-data", node_data)):
        _check_folder(option, value)
    source = None
    if data_root is not None and is_url(data_root):
        ObjectStorage(data_root)
        source, node_data = data_root, node_data or str(base / "data")
    elif node_data is not None:
        shared = Path(data_root).absolute() if data_root else default_data_root()
        if shared.is_relative_to(Path(node_data).absolute()):
            raise ConfigError(
                f"--node-data {node_data} is or holds the data themselves, {shared}; give another "
                "folder, on each node's own disk."
            )
        source = str(shared)
    places = StorageLayout(
        run=str(folder) if run_url else None,
        run_url=run_url,
        data_source=source,
        node_data=str(Path(node_data).absolute()) if node_data is not None else None,
    )
    return folder, places


def _check_folder(option: str, value: str | None) -> None:
    """Refuse what can be no folder; nothing is created."""
    if value is None:
        return
    path = Path(value).absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not value or not there.is_dir():
        raise ConfigError(f"{option} is {value!r}; it must be a folder, or one that can be made.")


def open_data(
    places: StorageLayout,
    task: str,
    data_root: str | None,
    *,
    allow_sample: bool,
    generate: bool,
    on_cluster: bool = False,
    temporary: Path | None = None,
) -> Store:
    """The task's data, as prepare.open_data has them; copied to this node where `places` says so.

    With `temporary`, a folder, they are read where they are, or copied there and not to where the
    node keeps them.

    Raises:
        DataError: see prepare.open_data and copy_store().
    """
    if places.data_source is not None and is_url(places.data_source):
        assert places.node_data is not None
        node_data = temporary or Path(places.node_data)
        return open_store(copy_store(places.data_source, task, node_data))
    root = None if data_root is None else Path(data_root)
    store = prepare.open_data(
        *(task, root),
        allow_sample=allow_sample,
        generate=generate,
        on_cluster=on_cluster,
        temporary=temporary,
    )
    here = store.folder if temporary is not None else places.data(str(store.folder))
    return store if here == store.folder else open_store(here)


def stage_data_root(places: StorageLayout, data_root: str | None, tasks: Collection[str]) -> Path:
    """The data root of a curriculum on this node; from a URL all its tasks are copied here.

    Raises:
        DataError: the URL lacks one of them; nothing can be generated there.
    """
    if places.data_source is not None and is_url(places.data_source):
        assert places.node_data is not None
        for task in sorted(tasks):
            copy_store(places.data_source, task, Path(places.node_data))
        return Path(places.node_data)
    return Path(data_root).absolute() if data_root else default_data_root()
