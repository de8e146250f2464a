"""A run's folder: where it and its data lie, who may have it, and what its journal begins with."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmx.attention.base import attention_label, sized
from dmx.data.prepare import default_data_root
from dmx.errors import ConfigError, StorageError
from dmx.process import command
from dmx.registry import environment
from dmx.runs import layout
from dmx.runs.layout import Kind
from dmx.runs.run import Run
from dmx.schema import flatten, is_url
from dmx.storage.files import fsync_path, write_atomic
from dmx.storage.journal import CLAIM_FILE, Claim, Journal, read_journal
from dmx.storage.remote import ObjectStorage, StorageLayout, copy_store, join

_LONGEST_NAME = 255

# -- where it lies ------------------------------------------------------------------------------


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
        raise _unwritable(folder, error) from None
    return folder


def _unwritable(folder: Path, error: OSError | StorageError) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) else error.__cause__ or error
    return ConfigError(f"{folder} cannot be written ({reason}); give another --storage.")


@dataclass(frozen=True, kw_only=True)
class RunLocation:
    """Where a run and its data lie; the options of these names.

    Attributes:
        name: its folder below `storage`, a path or a URL; None leaves it to the run.
        scratch: with a URL, each node's own folder for it. data_root: prepared data, a path or URL.
        node_data: where each node copies the data that it uses.
    """

    name: str | None = None
    storage: str = "runs"
    scratch: str | None = None
    data_root: str | None = None
    node_data: str | None = None

    def find(self, default: str) -> tuple[Path, StorageLayout]:
        """The run's folder on this node, and where its nodes meet; nothing is created.

        Raises:
            ConfigError: the name is no plain folder name, a folder cannot be written, a URL is
                none.
        """
        home = os.path.expanduser("~")  # noqa: PTH111  pathlib raises where there is none
        own = Path(home) / ".cache" / "dmx"
        if home == "~":
            own = Path(tempfile.gettempdir()) / f"dmx-{os.getuid()}"
        base = Path(self.scratch or own).absolute()
        run_url = None
        if is_url(self.storage):
            ObjectStorage(self.storage)  # a malformed one is said now
            own = base / "runs" / hashlib.sha256(self.storage.encode()).hexdigest()[:12]
            folder = run_folder(str(own), self.name, default)
            run_url = join(self.storage, folder.name)
        else:
            folder = run_folder(self.storage, self.name, default)
        for option, value in (("--scratch", self.scratch), ("--node-data", self.node_data)):
            _check_folder(option, value)
        source, node_data = None, self.node_data
        if self.data_root is not None and is_url(self.data_root):
            ObjectStorage(self.data_root)
            source, node_data = self.data_root, node_data or str(base / "data")
        elif node_data is not None:
            shared = Path(self.data_root).absolute() if self.data_root else default_data_root()
            if shared.is_relative_to(Path(node_data).absolute()):
                raise ConfigError(
                    f"--node-data {node_data} is or holds the data themselves, {shared}; give "
                    "another folder, on each node's own disk."
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
    if value is None:
        return
    path = Path(value).absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not value or not there.is_dir():
        raise ConfigError(f"{option} is {value!r}; it must be a folder, or one that can be made.")


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


# -- who may have it ----------------------------------------------------------------------------

_MAY_CHANGE = frozenset({"num_trials", "config.data.root", "config.init.path"})
"""Settings that a later session may have otherwise."""
_OF_A_START = (
    *(layout.JOURNAL_FILE, f".{layout.JOURNAL_FILE}.lock", layout.SETTINGS_FILE),
    *(layout.WARM_START_FILE, layout.ERROR_FILE, CLAIM_FILE, "events.out.tfevents.*"),
)
"""What a run leaves that failed before it had trained anything."""


def check_free(folder: Path) -> None:
    """See that a new run may have the folder; what a failed start left there is no hindrance.

    Raises:
        ConfigError: it holds a run, or something else. StageError: a run is being started in it.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    begun = any(not any(fnmatch.fnmatch(name, p) for p in _OF_A_START) for name in names)
    if layout.JOURNAL_FILE in names and not begun:
        events, _ = read_journal(folder / layout.JOURNAL_FILE)
        begun = any(e.get("event") != "settings" for e in events)
    if begun:
        raise ConfigError(f"{folder} already exists; add --resume to continue it, or give --name.")
    if layout.JOURNAL_FILE in names:
        check_unused(folder)
    if CLAIM_FILE in names:
        Claim(folder, wait_seconds=0).release()


def check_unused(folder: Path) -> None:
    """See that the study's journal is sound and that no other process works on it."""
    Journal(folder / layout.JOURNAL_FILE).close()


def check_same(folder: Path, settings: Mapping[str, Any], kind: Kind = "study") -> None:
    """See that the folder holds the study or run with these settings; nothing is written."""
    old = Run.read(folder).settings
    if not old:
        raise ConfigError(f"there is no {kind} to resume in {folder}; leave --resume out.")
    if changed := changes(old, settings, _MAY_CHANGE):
        why = ""
        if any(text.startswith("--max-steps") for text in changed):
            why = "the learning rate's schedule and the rungs span all steps of a trial; "
        if any(text.startswith("train.num_steps") for text in changed):
            why = (
                "the learning rate's schedule spans all steps, so train on in another run, with "
                f"--init-from {folder / layout.BEST_DIR}; "
            )
        raise ConfigError(
            f"{folder} holds another {kind} ({'; '.join(changed[:3])}); {why}repeat its settings "
            "or give --name."
        )


# -- what its journal begins with ---------------------------------------------------------------


def settings_event(
    kind: Kind, settings: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The first line of a journal, so that a run that was killed at once is known as well.

    Args:
        settings: what decides the results; equal for all sessions (see changes).
        options: of the command, as `--resume RUN` repeats them.
    """
    label = ""  # a curriculum's stages have their own
    if "attention" in settings:
        label = sized(settings["attention"], flatten(settings.get("overrides", {})))
    elif "config" in settings:
        label = attention_label(settings["config"])
    return {
        "event": "settings",
        "kind": kind,
        "settings": json.loads(json.dumps(dict(settings), sort_keys=True)),
        "options": dict(options or {}),
        "environment": environment(),
        "attention": label,
        "argv": command(),
        "time": time.time(),
    }


def open_folder(
    folder: Path,
    event: Mapping[str, Any],
    *,
    resume: bool,
    files: Mapping[str, str] | None = None,
) -> None:
    """Create a run's folder, or note what is new of a session that continues it.

    Args:
        event: see settings_event; until it is in the journal, nothing was begun.
        files: name -> content of what a new study keeps beside it.

    Raises:
        ConfigError: the folder exists without `resume`, or cannot be written.
        StageError: the journal is damaged, or another process works on the run.
    """
    try:
        if not resume:
            check_free(folder)
            for path in folder.iterdir() if folder.is_dir() else ():
                path.unlink()  # what a failed start left
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (files or {}).items():
            write_atomic(folder / name, content)
        with Journal(folder / layout.JOURNAL_FILE) as journal:
            append_settings(journal, event)
        fsync_path(folder.parent)
    except (OSError, StorageError) as error:
        raise _unwritable(folder, error) from None


def append_settings(journal: Journal, event: Mapping[str, Any]) -> None:
    """Write a session's settings down where they, its options or its environment are new."""
    known = [e for e in journal.events if e.get("event") == event["event"]]
    same = ("settings", "options", "environment")
    if not known or any(known[-1].get(key) != event[key] for key in same):
        journal.append(**event)


# -- what changed since the last session ----------------------------------------------------------

_WORDS = {
    **{k: "--" + k.replace("_", "-") for k in ("max_steps", "grace_steps", "reduction_factor")},
    **{k: "--" + k for k in ("task", "attention", "scheduler", "sampler", "seed")},
    **{k: f"`{k}` of the search space" for k in ("when", "initial_points")},
    **{"objectives": "--objective", "warm_start": "--warm-start", "num_trials": "--num-trials"},
    **{"data": "the data", "data_checksum": "the data's checksum"},
}
_WORDS_BELOW = {
    "overrides": "--set {}",
    "searched": "{} in the search space's `space`",
    "defaults": "{} in the search space's `defaults`",
    "config": "{}",
    "warm_start": "--warm-start ({})",
}
_FOLLOW = (
    *("overrides.train.num_steps", "overrides.train.eval_every_steps"),
    *("overrides.optim.warmup_steps", "grace_steps"),
)
"""Settings that --max-steps brings along."""


def changes(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str] = ()
) -> list[str]:
    """`--max-steps was 100, now 200`: what differs, in the words by which a user says it.

    Args:
        free: dotted settings that may differ.
    """
    before, after = flatten(old), flatten(json.loads(json.dumps(dict(new))))
    changed = [
        key
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key) and key not in free
    ]
    if "max_steps" in changed:
        changed = [key for key in changed if key not in _FOLLOW]
    said = []
    if "config.init.sha256" in changed:  # two paths are what the user knows them by
        changed = [key for key in changed if not key.startswith("config.init")]
        sources = [found.get("config.init.path", "none") for found in (before, after)]
        said.append(f"--init-from was {sources[0]}, now {sources[1]}")
    for key in changed:
        part, _, rest = key.partition(".")
        words = _WORDS_BELOW[part].format(rest) if rest and part in _WORDS_BELOW else key
        was, now = (repr(f[key]) if key in f else "not given" for f in (before, after))
        said.append(f"{_WORDS.get(key, words)} was {was}, now {now}")
    return said
