"""The driver's files of a run, kept in object storage while it runs, and brought back from there.

Checkpoints are pushed by the workers that write them (see dmx.storage.remote); here is all else:
the journal, which a run is rebuilt from, and what is shown of it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
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

    Within its block a thread uploads what has changed, now and then, and at the end.

    Args:
        layout: the run's folder and its counterpart; without one nothing is done.
    """

    def __init__(self, layout: StorageLayout, every_seconds: float = EVERY_SECONDS) -> None:
        self.layout = layout
        self._folder = Path(layout.run or "")
        self._storage = ObjectStorage(layout.run_url) if layout.run_url else None
        self._every, self._sent = every_seconds, dict[str, tuple[int, int]]()
        self._stop = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread: threading.Thread | None = None

    def restore(self, *, checkpoints: bool = False) -> None:
        """Bring the run's files here where this node has none, or older ones.

        Args:
            checkpoints: the best ones of all its parts as well.

        Raises:
            StageError: this node's journal and the stored one have gone different ways.
            StorageError: object storage does not answer.
        """
        if self._storage is None:
            return
        with tempfile.TemporaryDirectory() as temporary:
            state = Path(temporary) / STATE
            if self._storage.pull(STATE, state) is None or not self._is_newer(state):
                return
            for name in self._storage.names():
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

    def sync(self) -> None:
        """Upload what has changed since the last time.

        Raises:
            StorageError: object storage does not answer.
        """
        if self._storage is None or not self._folder.is_dir():
            return
        with self._one_at_a_time:
            for path in _files_below(self._folder):
                name = path.relative_to(self._folder)
                if str(name) != JOURNAL_FILE and not _is_workers(name):
                    self._send(self._storage, path, name.as_posix())
            if (self._folder / JOURNAL_FILE).is_file():
                with tempfile.TemporaryDirectory() as temporary:
                    shutil.copy(self._folder / JOURNAL_FILE, temporary)
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
            self.sync()  # said now, not in an hour, when the storage cannot be written
            self._thread = threading.Thread(target=self._run, name="dmx-sync", daemon=True)
            self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self.sync()
            except (DmxError, OSError) as error:
                logger.warning("%s; what is on this node's disk is complete", error)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.sync()
        except (DmxError, OSError) as failed:
            if error is None:
                raise
            logger.warning("%s; what is on this node's disk is complete", failed)


def _is_workers(name: Path) -> bool:
    """Checkpoints of trials and stages are pushed by their workers; the run's own best/ is not."""
    parts = name.parts
    if name.name == CLAIM_FILE:  # of this node; object storage has that of the node at work
        return True
    return bool({LAST_DIR, "ray"} & set(parts)) or (BEST_DIR in parts and len(parts) > 2)


def _files_below(folder: Path) -> Iterator[Path]:
    """All plain files below a folder that are not hidden, sorted."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files_below(path)
        elif path.is_file():
            yield path


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
