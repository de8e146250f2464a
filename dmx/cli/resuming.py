"""`--resume RUN`: a run's own options, from its journal, under what is given now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dmx.cli.options import PATHS
from dmx.errors import ConfigError
from dmx.runs.folder_sync import FolderSync
from dmx.runs.layout import Kind
from dmx.runs.run import Run
from dmx.schema import is_url
from dmx.study.folder import RunLocation

COMMANDS: dict[Kind, str] = {
    "study": "dmx.tune",
    "run": "dmx.train",
    "curriculum": "dmx.curriculum",
}
_OF_ONE_SESSION = frozenset(
    {
        *("resume", "dry_run", "show", "status", "evaluate", "split", "price_per_gpu_hour"),
        *("storage", "name", "output", "fresh", "from_stage", "time_budget"),
        *("config", "init_from", "reinit"),
    }
)
"""Options that a later session does not repeat: where the run lies, its folder says, and what it
was begun with, its settings.
"""


def resumed(
    given: Mapping[str, Any], kind: Kind, *, default_name: Callable[[Mapping[str, Any]], str | None]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The options that are given; with `--resume` over those of the run's last session.

    Args:
        given: see Parser.given. default_name: the run's folder by them; None where they do not say.

    Returns:
        The options, and the latest `settings` event of the run's journal.

    Raises:
        ConfigError: no run is named, or one of another kind. StageError: its journal is damaged.
    """
    word = given.get("resume")
    if isinstance(word, str) and "=" in word and not Path(word).exists():  # a.b=value after it
        given = {**given, "settings": [word, *given.get("settings", [])], "resume": True}
        word = True
    if not word:
        return dict(given), {}
    storage, name = _place(word, given, default_name)
    folder = _folder(storage, name, given)
    record = Run.read(folder).session
    found = record.get("kind", kind)
    if found != kind:
        raise ConfigError(
            f"{folder} holds a {found}; continue it with python -m {COMMANDS[found]} --resume "
            f"{folder}"
        )
    before = record.get("options", {})
    merged = {**before, **given, "storage": storage, "name": name, "resume": True}
    for several in ("set", "settings"):
        new = given.get(several, [])
        changed = {_key(text) for text in new}
        kept = [text for text in before.get(several, []) if _key(text) not in changed]
        if kept or new:
            merged[several] = [*kept, *new]
    return merged, record


def _key(assignment: str) -> str:
    return assignment.partition("=")[0].strip()


def _place(
    word: str | bool,
    given: Mapping[str, Any],
    default_name: Callable[[Mapping[str, Any]], str | None],
) -> tuple[str, str]:
    """(storage, name) of the run that is meant."""
    storage = str(given.get("storage", "runs"))
    if isinstance(word, str):
        if is_url(word):
            above, _, name = word.rstrip("/").rpartition("/")
            return above, name
        path = Path(word)
        if path.is_dir():
            return str(path.absolute().parent), path.absolute().name
        if path.name != word or given.get("name") not in (None, word):
            raise ConfigError(f"--resume {word}: there is no run in that folder.")
        return storage, word
    known: str | None = given.get("name") or default_name(given)
    if known is None:
        raise ConfigError("--resume needs the run: --resume runs/NAME, or --name NAME.")
    return storage, known


def _folder(storage: str, name: str, given: Mapping[str, Any]) -> Path:
    """The run's folder on this machine, brought here where object storage has it."""
    if not is_url(storage):
        return Path(storage).absolute() / name
    location = RunLocation(name=name, storage=storage, scratch=given.get("scratch"))
    folder, places = location.find(name)
    FolderSync(places).restore()
    return folder


def recorded(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the journal keeps of a command's options for the next session, with whole paths."""
    kept = {k: v for k, v in given.items() if k not in _OF_ONE_SESSION}
    for name, value in kept.items():
        if name in PATHS and isinstance(value, str) and not is_url(value):
            whole = Path(value).absolute()
            if name not in ("space", "curriculum") or whole.is_file():  # else a shipped one's name
                kept[name] = str(whole)
    return kept
