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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from dmx import __version__
from dmx.errors import ConfigError
from dmx.schema import expand, from_dict, to_dict

T = TypeVar("T")


def choices_message(value: object, choices: Iterable[str]) -> str:
    """`'x' is unknown; did you mean 'y'? choices: ...`: the tail of every unknown-name error."""
    names = sorted(choices)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{value!r} is unknown{hint} choices: {', '.join(names)}"


class Registry(Generic[T]):
    """Maps names to values of one kind ("attention").

    The modules of `package` register themselves on import; it is scanned once, so a new file in it
    is enough to add a value. Plug-ins (see load_plugins) are loaded then, and register theirs.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._values: dict[str, T] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the decorated value under `name`; a NamedConfig is called so."""

        def add(value: T) -> T:
            if name in self._values:
                raise ConfigError(f"{self.kind} {name!r} is registered twice.")
            if isinstance(value, type) and issubclass(value, NamedConfig):
                value.name = name
            self._values[name] = value
            return value

        return add

    def get(self, name: str) -> T:
        """The value called `name`; a ConfigError lists the choices."""
        if name not in self:
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
        self._scanned = True  # at once: what is imported may ask
        try:
            if self._package is not None:
                for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
                    importlib.import_module(f"{self._package}.{module.name}")
            load_plugins()
        except BaseException:
            self._scanned = False
            raise


@dataclass(frozen=True, kw_only=True)
class NamedConfig:
    """Base of a kind of configs of which YAML chooses one by its name; the kind has a registry."""

    name: ClassVar[str] = ""
    registry: ClassVar[Registry[Any]]

    @classmethod
    def find(cls, name: str) -> tuple[type[Any], dict[str, Any]]:
        """The class that `name` means, and the settings that the name itself gives."""
        return cls.registry.get(name), {}

    @classmethod
    def parse(cls, value: object, path: str) -> Self:
        """From a name, or from a mapping with `name` and settings; the inverse of to_plain."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            kind = cls.registry.kind
            raise ConfigError(f"{path} must be the {kind}'s name or a mapping with `name`.")
        settings = dict(value)
        try:
            found, given = cls.find(settings.pop("name"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        return from_dict(found, {**given, **settings}, path)

    def to_plain(self) -> dict[str, Any]:
        return {"name": self.name, **{k: to_dict(v) for k, v in vars(self).items()}}


@functools.cache
def load_plugins() -> None:
    """Import the modules that installed packages announce in the entry-point group `dmx.plugins`.

    A ConfigError names the one that cannot be imported, and its package.
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
    """`name` as a path, or as the name of a shipped file (with or without folder and ending)."""
    what = {"search_spaces": "search space", "curricula": "curriculum"}.get(kind, kind)
    path, shipped = Path(expand(what, name)), shipped_names(kind)
    is_path = path.suffix in (".yaml", ".yml")
    if is_path and path.is_file():
        return path
    stem = path.stem if is_path and path.parent.name in ("", kind) else name
    if stem in shipped:
        return shipped_folder(kind) / f"{stem}.yaml"
    if is_path:
        raise ConfigError(f"{name} does not exist; shipped in {kind}: {', '.join(shipped)}.")
    raise ConfigError(f"{what} {choices_message(name, shipped)}.")


_FOLDERS = ("dmx", "search_spaces", "curricula")
_SOURCES = (".py", ".yaml", ".css", ".j2")


@functools.cache
def code_version() -> str:
    """The code that runs: see source_version."""
    return source_version(Path(__file__).resolve().parents[1])


def source_version(root: Path) -> str:
    """`9fa9d03`: the commit of the checkout in `root`.

    `9fa9d03+1a2b3c4d`: with a digest of the sources, one of which was changed or is not tracked.
    `0.1.0 (1a2b3c4d)`: an installed package.
    """
    digest = hashlib.sha256()
    for path in sorted(p for folder in _FOLDERS for p in (root / folder).rglob("*")):
        if path.suffix in _SOURCES and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)} {len(content)}\0".encode() + content)
    short = digest.hexdigest()[:8]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout

    try:
        if not (root / ".git").exists():
            raise OSError
        commit = git("rev-parse", "--short", "HEAD").strip()
        changed = git("diff", "-z", "--name-only", "HEAD", "--", *_FOLDERS)
        untracked = git("ls-files", "-z", "--others", "--", *_FOLDERS)  # ignored ones as well
    except (OSError, subprocess.SubprocessError):
        return f"{__version__} ({short})"
    named = not any(name.endswith(_SOURCES) for name in (changed + untracked).split("\0"))
    return commit if named else f"{commit}+{short}"


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
