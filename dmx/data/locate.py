"""Find a task's prepared data: the given root, the default root, or a plainly announced sample."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path

from dmx.data.samples import sample_for
from dmx.data.store import Store, open_store
from dmx.errors import DataError
from dmx.schema import expand, local_path
from dmx.storage.files import MANIFEST_FILE
from dmx.tasks import task_for

log = logging.getLogger(__name__)
ROOT_VARIABLE = "DMX_DATA_ROOT"
SAMPLES_FOLDER = "samples"


def default_data_root() -> Path:
    """$DMX_DATA_ROOT, else ./data."""
    root = os.environ.get(ROOT_VARIABLE) or "data"
    return local_path(ROOT_VARIABLE, expand(ROOT_VARIABLE, root)).absolute()


def prepare_command(task_name: str, data_root: Path) -> str:
    """The command that prepares `task_name` under `data_root`, to put into messages."""
    source = "" if task_for(task_name).generated else " --source PATH"
    return (
        f"python -m dmx.data {shlex.quote(task_name)}{source} "
        f"--data-root {shlex.quote(str(data_root))}"
    )


def is_prepared(task_name: str, data_root: Path) -> bool:
    """Whether `data_root` holds a store of the task (its files are checked when it is opened)."""
    return (data_root / task_name / MANIFEST_FILE).is_file()


def locate(
    task_name: str,
    data_root: Path | None,
    *,
    allow_sample: bool,
    temporary: Path | None = None,
) -> Store:
    """Open the task's data.

    With `data_root` only that root counts. Without it the default root is looked at; if the task
    is not prepared there, `allow_sample` is True and the task has a sample, the sample is prepared
    (once, in `<default root>/samples/`) and opened, and a banner is logged. With `temporary`, a
    folder, a sample that is not prepared yet is put there.

    Raises:
        ConfigError: no such task.
        DataError: the data are not prepared (the sentence gives the command), damaged, or the
            sample's package is not installed.
    """
    task = task_for(task_name)
    root = default_data_root() if data_root is None else Path(data_root).absolute()
    if is_prepared(task.name, root):
        store = open_store(root / task.name)
        if store.manifest.task != task.name:
            raise DataError(
                f"{store.folder} holds {store.manifest.task}, not {task.name}; delete it and run: "
                f"{prepare_command(task.name, root)}"
            )
        log.info("data: %s (%s)", store.manifest.label, store.folder)
        return store
    sample = sample_for(task.name)
    missing = (
        f"Task {task.name} has no prepared data in {root / task.name}; run: "
        f"{prepare_command(task.name, root)}"
    )
    if data_root is not None or not allow_sample or sample is None:
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
        store.manifest.label,
        task.name,
        root,
        sample.what,
        prepare_command(task.name, root),
    )
    return store
