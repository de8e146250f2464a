"""What this installation holds: named things, shipped YAML and pages, its sources' version."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import os
import pkgutil
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from dmx import __version__
from dmx.errors import ConfigError
from dmx.schema import expand

T = TypeVar("T")


def choices_message(value: object, choices: Iterable[str]) -> str:
    """`'x' is unknown; did you mean 'y'? choices: ...`: the tail of every unknown-name error."""
    names = sorted(choices)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{value!r} is unknown{hint} choices: {', '.join(names)}"


class Registry(Generic[T]):
    """Maps names to values of one kind.

    Args:
        kind: what the values are, for messages ("attention").
        package: a package whose modules register themselves on import; it is scanned once, so a
            new file in it is enough to add a value. Plug-ins (see load_plugins) are loaded then,
            and register theirs.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._values: dict[str, T] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the decorated value under `name`."""

        def add(value: T) -> T:
            assert name not in self._values, f"{self.kind} {name!r} is registered twice"
            self._values[name] = value
            return value

        return add

    def get(self, name: str) -> T:
        """The value called `name`.

        Raises:
            ConfigError: no such name; the message lists the choices.
        """
        self._scan()
        if name not in self._values:
            raise ConfigError(f"{self.kind} {choices_message(name, self._values)}.")
        return self._values[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._scan()
        return sorted(self._values)

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._values

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        if self._package is not None:
            package = importlib.import_module(self._package)
            for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
                importlib.import_module(f"{self._package}.{module.name}")
        load_plugins()


@functools.cache
def load_plugins() -> None:
    """Import the modules that installed packages announce in the entry-point group `dmx.plugins`.

    Raises:
        ConfigError: one cannot be imported.
    """
    for entry in importlib.metadata.entry_points(group="dmx.plugins"):
        try:
            entry.load()
        except Exception as error:
            where = entry.dist.name if entry.dist else "an installed package"
            raise ConfigError(f"plug-in {entry.value} of {where}: {error!r}.") from error


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


_KINDS = ("search_spaces", "curricula")
_SOURCES = (".py", ".yaml", ".css", ".j2")


@functools.cache
def code_version() -> str:
    """The code that runs: see source_version."""
    return source_version(Path(__file__).resolve().parent)


def source_version(package: Path) -> str:
    """`9fa9d03`: the commit of the checkout that the package is in.

    `9fa9d03+1a2b3c4d`: with a digest of the sources, one of which was changed or is not tracked.
    `0.1.0 (1a2b3c4d)`: an installed package.
    """
    root = package.parent
    folders = [package, *(root / kind for kind in _KINDS)]
    blobs = {
        path.relative_to(root).as_posix(): _blob(path.read_bytes())
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in _SOURCES and path.is_file()
    }
    listed = "".join(f"{name} {blob}\n" for name, blob in sorted(blobs.items()))
    digest = hashlib.sha256(listed.encode()).hexdigest()[:8]
    try:
        if not (root / ".git").exists():
            raise OSError
        commit = _git(root, "rev-parse", "--short", "HEAD").strip()
        tree = _git(root, "ls-tree", "-r", "-z", "HEAD", package.name, *_KINDS)
    except (OSError, subprocess.SubprocessError):
        return f"{__version__} ({digest})"
    entries = (line.split("\t", 1) for line in tree.split("\0") if line)
    tracked = {name: facts.split()[2] for facts, name in entries if name.endswith(_SOURCES)}
    return commit if tracked == blobs else f"{commit}+{digest}"


def environment() -> dict[str, Any]:
    """What numbers are measured with, on this machine."""
    import torch

    return {
        "dmx": __version__,
        "code": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": importlib.metadata.version("ray"),
        "optuna": importlib.metadata.version("optuna"),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout


def _blob(content: bytes) -> str:
    """The name that git gives to a file's content."""
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
