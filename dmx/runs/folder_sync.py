"""The driver's files of a run, kept in object storage while it runs, and brought back from there.

Checkpoints are pushed by the workers that write them (see dmx.storage.remote); here is all else:
the journal, which a run is rebuilt from, and what is shown of it.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from dmx.errors import DmxError, StageError
from dmx.runs.layout import BEST_DIR, JOURNAL_FILE, LAST_DIR
from dmx.storage.files import write_atomic
from dmx.storage.journal import CLAIM_FILE
from dmx.storage.remote import FOLDER_SUFFIX, ObjectStorage, StorageLayout

logger = logging.getLogger("dmx.storage")
STATE = "state"
"""The journal, which a run is continued from, as a folder in object storage."""
EVERY_SECONDS = 15.0
"""What the loss of the driver's own disk can cost; the loss of its process costs nothing."""


class FolderSync:
    """Keeps the driver's files of a run in object storage while it runs, and brings them back.

    Within its block a thread uploads what has changed, now and then, and at the end. A StorageError
    says that object storage does not answer.

    Args:
        layout: the run's folder and its counterpart; without one nothing is done.
    """

    def __init__(self, layout: StorageLayout) -> None:
        self.layout = layout
        self._folder = Path(layout.run or "")
        self._storage = ObjectStorage(layout.run_url) if layout.run_url else None
        self._sent: dict[str, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def restore(self, *, checkpoints: bool = False) -> None:
        """Bring the run's files here where this node has none, or older ones.

        Args:
            checkpoints: the best ones of all its parts as well.

        Raises:
            StageError: this node's journal and the stored one have gone different ways.
        """
        if self._storage is None:
            return
        with tempfile.TemporaryDirectory() as temporary:
            state = Path(temporary) / STATE
            if self._storage.pull(STATE, state) is None or not self._is_newer(state):
                return
            for name in self._storage.names(""):
                if name.endswith(FOLDER_SUFFIX):  # the run's own best/ is stored file by file
                    if checkpoints and name.endswith(f"/{BEST_DIR}{FOLDER_SUFFIX}"):
                        self.layout.pull(self._folder / name.removesuffix(FOLDER_SUFFIX))
                elif not name.endswith(f"/{CLAIM_FILE}"):
                    self._storage.download(name, self._folder / name)
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in state.iterdir():
                write_atomic(self._folder / path.name, path.read_bytes())
        logger.info("%s was brought here from %s", self._folder, self._storage.url)

    def _is_newer(self, state: Path) -> bool:
        """Whether the stored journal goes on where this node's ends."""
        here = self._folder / JOURNAL_FILE
        if not here.is_file():
            return True
        ours, theirs = _whole_lines(here), _whole_lines(state / JOURNAL_FILE)
        if ours.startswith(theirs) or theirs.startswith(ours):
            return len(theirs) > len(ours)
        raise StageError(
            f"{here} and the one in object storage have gone different ways: two drivers ran at "
            f"once. Move {self._folder} away to continue what is stored."
        )

    def _sync(self) -> None:
        """Upload what has changed since the last time."""
        if self._storage is None or not self._folder.is_dir():
            return
        journal = self._folder / JOURNAL_FILE
        for path in _drivers_files(self._folder):
            if path != journal and path.is_file():
                self._send(self._storage, path, path.relative_to(self._folder).as_posix())
        if journal.is_file():
            with tempfile.TemporaryDirectory() as temporary:
                shutil.copy(journal, temporary)
                self._storage.push(Path(temporary), STATE)

    def _send(self, storage: ObjectStorage, path: Path, name: str) -> None:
        try:
            stat = path.stat()
            mark = (stat.st_size, stat.st_mtime_ns)
            if self._sent.get(name) == mark:
                return
            content = path.read_bytes()
        except FileNotFoundError:  # replaced by a newer one right now
            return
        storage.write(name, content)
        self._sent[name] = mark

    def __enter__(self) -> Self:
        if self._storage is not None:
            self._sync()  # said now, not in an hour, when the storage cannot be written
            self._thread = threading.Thread(target=self._run, name="dmx-sync", daemon=True)
            self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            try:
                self._sync()
            except (DmxError, OSError) as error:
                logger.warning("%s; what is on this node's disk is complete", error)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self._sync()
        except (DmxError, OSError) as failed:
            if error is None:
                raise
            logger.warning("%s; what is on this node's disk is complete", failed)


def _drivers_files(folder: Path) -> Iterator[Path]:
    """All below a run's folder but what its workers push: checkpoints of trials and stages.

    The run's own best/ is the driver's. A claim is this node's: object storage has that of the node
    at work.
    """
    for place, folders, files in os.walk(folder):
        skipped = {LAST_DIR, "ray", *([] if Path(place) == folder else [BEST_DIR])}
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        shown = (f for f in sorted(files) if f != CLAIM_FILE and not f.startswith("."))
        yield from (Path(place) / name for name in shown)


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
