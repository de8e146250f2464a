"""The driver's files of a run, kept in object storage while it runs, and brought back from there.

Checkpoints are the workers' (dmx.storage.places). Here are the journals and all that is shown:
events, tables, configurations. The journals are what a run is rebuilt from; both go up as one
version, at a moment when they agree.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from dmx import records as keys
from dmx.errors import DmxError, StageError
from dmx.storage.claim import CLAIM_FILE
from dmx.storage.object_storage import POINTER_SUFFIX, ObjectStorage, files_below
from dmx.storage.places import Places

logger = logging.getLogger("dmx.storage")
JOURNALS = (keys.JOURNAL_FILE, keys.OPTUNA_FILE)
STATE = "state"
EVERY_SECONDS = 15.0
"""What the loss of the driver's own disk can cost; the loss of its process costs nothing."""

_SKIPPED = {keys.LAST_DIR, "ray"}


class FolderSync:
    """Uploads what has changed, now and then and at the end.

    Args:
        places: the run's folder and its counterpart; without one nothing is done.
    """

    def __init__(self, places: Places, every_seconds: float = EVERY_SECONDS) -> None:
        self.places = places
        self._folder = Path(places.run) if places.run and places.run_url else None
        self._storage = ObjectStorage(places.run_url) if places.run_url else None
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
        if self._folder is None or self._storage is None:
            return
        with tempfile.TemporaryDirectory() as temporary:
            state = Path(temporary) / STATE
            if self._storage.pull(STATE, state) is None or not self._older_here(state):
                return
            for name in self._storage.names():
                plain = name.removesuffix(POINTER_SUFFIX)
                if plain != name:
                    if checkpoints and plain.endswith(f"/{keys.BEST_DIR}"):
                        self.places.pull(self._folder / plain)
                elif "@" not in name and not name.endswith(f"/{CLAIM_FILE}"):
                    self._storage.download(name, self._folder / name)
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in state.iterdir():
                shutil.copyfile(path, self._folder / path.name)
        logger.info("%s was brought here from %s", self._folder, self._storage.url)

    def _older_here(self, state: Path) -> bool:
        assert self._folder is not None and self._storage is not None
        here, there = self._folder / keys.JOURNAL_FILE, state / keys.JOURNAL_FILE
        if not here.is_file():
            return True
        ours, theirs = _whole_lines(here), _whole_lines(there)
        if ours.startswith(theirs):
            return False
        if theirs.startswith(ours):
            return True
        raise StageError(
            f"{here} and {self._storage.url} have gone different ways: two drivers ran at once. "
            f"Move {self._folder} away to continue what is stored."
        )

    def sync(self) -> None:
        """Upload what has changed since the last time.

        Raises:
            StorageError: object storage does not answer.
        """
        if self._folder is None or self._storage is None or not self._folder.is_dir():
            return
        with self._one_at_a_time:
            for path in files_below(self._folder):
                name = path.relative_to(self._folder)
                if str(name) not in JOURNALS and not _is_workers(name):
                    self._send(path, name.as_posix())
            self._send_journals()

    def _send(self, path: Path, name: str) -> None:
        assert self._storage is not None
        try:
            stat = path.stat()
            mark = (stat.st_size, stat.st_mtime_ns)
            if self._sent.get(name) == mark:
                return
            content = path.read_bytes()
        except FileNotFoundError:  # replaced by a newer one right now
            return
        self._storage.write(name, content)
        self._sent[name] = mark

    def _send_journals(self) -> None:
        """Both at a moment when nothing was written in between; the journal is written first."""
        assert self._folder is not None and self._storage is not None
        journal = self._folder / keys.JOURNAL_FILE
        if not journal.is_file():
            return
        with tempfile.TemporaryDirectory() as temporary:
            for _ in range(20):
                size = journal.stat().st_size
                for name in JOURNALS:
                    if (self._folder / name).is_file():
                        shutil.copyfile(self._folder / name, Path(temporary) / name)
                if journal.stat().st_size == size:
                    break
            self._storage.push(Path(temporary), STATE)

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
    return bool(_SKIPPED & set(parts)) or (keys.BEST_DIR in parts and len(parts) > 2)


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
