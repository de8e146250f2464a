"""Optuna's storage in a file of the study's folder, as durable as the study's own journal."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from dmx.errors import DmxError, StageError
from dmx.storage.files import persist


class _PatientFile(JournalFileBackend):
    """Optuna's file, whose failed writes leave nothing behind and are tried again."""

    def __init__(self, path: Path, storage_timeout: float) -> None:
        self.path, self._patience_seconds = path, storage_timeout
        super().__init__(str(path), JournalFileOpenLock(str(path)))
        self._size = path.stat().st_size

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append whole lines, or raise StorageError and append nothing."""
        persist(lambda: self._append(logs), self.path, seconds=self._patience_seconds)

    def _append(self, logs: list[dict[str, Any]]) -> None:
        if self.path.stat().st_size < self._size:  # an empty mount point, say
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        try:
            super().append_logs(logs)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)
            raise
        self._size = self.path.stat().st_size


class _Storage(JournalStorage):
    """Remembers that no trial waits: Optuna looks through all of them before each proposal.

    Nobody else adds trials to the study, so what is found once stays true.
    """

    _none_waits = False

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """As Optuna's; a template is how a waiting trial comes into being."""
        self._none_waits = self._none_waits and template_trial is None
        return super().create_new_trial(study_id, template_trial)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """As Optuna's, but for the question which trials wait."""
        waiting = states == (TrialState.WAITING,)
        if waiting and self._none_waits:
            return []
        found = super().get_all_trials(study_id, deepcopy, states)
        self._none_waits = self._none_waits or (waiting and not found)
        return found


def open_optuna(
    path: Path,
    name: str,
    *,
    storage_timeout: float,
    directions: Sequence[Any] = ("maximize",),
) -> optuna.Study:
    """The study in a file, made when it is not there yet; what a crash tore is cut off.

    The caller keeps other processes out.

    Raises:
        StageError: the file is damaged.
    """
    # An open-file lock of a killed process must not block the next one for ever.
    Path(f"{path}.lock").unlink(missing_ok=True)
    try:
        _drop_torn_line(path)
        storage = _Storage(_PatientFile(path, storage_timeout))
        return optuna.create_study(
            study_name=name, storage=storage, directions=list(directions), load_if_exists=True
        )
    except (OSError, DmxError):
        raise
    except Exception as error:  # a damaged storage raises whatever its parser meets
        raise StageError(
            f"{path} is damaged ({type(error).__name__}); start the study under a new name."
        ) from None


def _drop_torn_line(path: Path) -> None:
    """Cut a last line that a crash left without its end; Optuna would append to it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
