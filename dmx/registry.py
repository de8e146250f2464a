"""A registry of named things (attentions, tasks, gates): register where defined, get by name."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from dmx.errors import ConfigError

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
