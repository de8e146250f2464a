"""Finds the files that dmx ships (search_spaces/, curricula/, docs/) and those of the user."""

from __future__ import annotations

from pathlib import Path

from dmx.errors import ConfigError
from dmx.paths import expand
from dmx.registry import choices_message


def shipped_folder(kind: str) -> Path:
    """The folder of shipped files: package data of a wheel, or the checkout's own folder."""
    here = Path(__file__).resolve().parent
    packaged = here / kind
    return packaged if any(packaged.glob("*.*")) else here.parent / kind


def page(name: str) -> str:
    """The path of a page of docs/, for a message."""
    return str(shipped_folder("docs") / f"{name}.md")


def shipped_names(kind: str) -> list[str]:
    """Names of the shipped files, sorted."""
    return sorted(path.stem for path in shipped_folder(kind).glob("*.yaml"))


def find_yaml(name: str, kind: str) -> Path:
    """`name` as a path, or as the name of a shipped file (with or without folder and ending).

    Raises:
        ConfigError: neither exists; lists the shipped names.
    """
    what = {"search_spaces": "search space", "curricula": "curriculum"}.get(kind, kind)
    path = Path(expand(what, name))
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        shipped = shipped_folder(kind) / path.name
        if path.parent.name in ("", kind) and shipped.is_file():
            return shipped
        raise ConfigError(
            f"{name} does not exist; shipped in {kind}: {', '.join(shipped_names(kind))}."
        )
    shipped = shipped_folder(kind) / f"{name}.yaml"
    if "/" in name or not shipped.is_file():
        raise ConfigError(f"{what} {choices_message(name, shipped_names(kind))}.")
    return shipped
