"""What a gate is: a pure decision whether a curriculum stage is good enough; and their registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dmx.errors import ConfigError
from dmx.registry import Registry
from dmx.runs.stages import Attempt
from dmx.schema import from_dict, to_dict

GATES: Registry[type[Gate]] = Registry("gate", "dmx.curriculum.gates")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a gate says, and which rule fired with which numbers."""

    passed: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Base of every gate: a frozen config whose `decide` depends on the attempt's record alone."""

    name: ClassVar[str] = ""

    def decide(self, attempt: Attempt) -> Decision:
        """Whether the attempt passes; it left a checkpoint, else no gate is asked.

        A metric that is missing or NaN never passes.
        """
        raise NotImplementedError

    @classmethod
    def parse(cls, value: object, path: str) -> Gate:
        """Gate from its name, or from a mapping with `name` and the gate's settings.

        Raises:
            ConfigError: unknown gate or setting, with the dotted path.
        """
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ConfigError(f"{path} must be a gate's name or a mapping with `name`.")
        settings = dict(value)
        try:
            gate = GATES.get(settings.pop("name"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        return from_dict(gate, settings, path)

    def to_plain(self) -> dict[str, Any]:
        """The YAML-ready mapping that `parse` reads back."""
        fields = {key: to_dict(value) for key, value in vars(self).items()}
        return {"name": self.name, **fields}
