"""The data a command runs on: prepared, generated on demand, or a plainly announced sample."""

from __future__ import annotations

from pathlib import Path

from dmx.data.locate import default_data_root, is_prepared, locate, prepare_command
from dmx.data.prepare import prepare_missing
from dmx.data.store import Store
from dmx.errors import DataError
from dmx.tasks import task_for


def obtain(
    task_name: str,
    data_root: Path | None,
    *,
    allow_sample: bool,
    generate: bool,
    address: str | None = None,
    temporary: Path | None = None,
) -> Store:
    """Open the task's data; what dmx can generate is generated when missing and `generate` is True.

    With `temporary`, a folder, a sample that is not prepared yet is put there and not below the
    data root.

    Raises:
        DataError: see locate and prepare_missing; each gives the command that prepares the data.
    """
    root = default_data_root() if data_root is None else data_root.absolute()
    task = task_for(task_name)
    if task.generated and not is_prepared(task.name, root):
        if not generate:
            raise DataError(
                f"task {task.name} is not prepared in {root}; run: "
                f"{prepare_command(task.name, root)}"
            )
        return prepare_missing(task.name, root, address=address)
    return locate(task.name, data_root, allow_sample=allow_sample, temporary=temporary)
