"""What a gate is: a pure decision whether a curriculum stage is good enough; and their registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmx.registry import NamedConfig, Registry
from dmx.runs.stages import Attempt

GATES: Registry[type[Gate]] = Registry("gate", "dmx.curriculum.gates")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a gate says, and which rule fired with which numbers."""

    passed: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Gate(NamedConfig):
    """Base of every gate: a frozen config whose `decide` depends on the attempt's record alone."""

    registry: ClassVar[Registry[type[Gate]]] = GATES

    def decide(self, attempt: Attempt) -> Decision:
        """Whether the attempt passes; it left a checkpoint, else no gate is asked.

        A metric that is missing or NaN never passes.
        """
        raise NotImplementedError
