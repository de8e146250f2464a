"""Gates of a curriculum; each file here registers its own, so a new one is one file."""

from dmx.curriculum.gates.base import GATES, Decision, Gate

__all__ = ["GATES", "Decision", "Gate"]
