"""The stretch of a run between two evaluations, which a stop may cut anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dmx.nn.device import sum_dtype
from dmx.training.passes import Scored
from dmx.training.ranks import Ranks


class Interval:
    """What one process counts from an evaluation to the next.

    Attributes:
        first: the step it began at. sums: [3] of sum_dtype: losses, hits, tokens here.
        scored: how far the evaluation at its end is. norm: of the latest gradient.
        seconds: spent on training.
    """

    def __init__(self, first: int, device: torch.device) -> None:
        self.first = first
        self.sums = torch.zeros(3, device=device, dtype=sum_dtype(device))
        self.scored = Scored(device)
        self.norm = 0.0
        self.seconds = 0.0
        self._gathered = torch.zeros(0)

    def gather(self, ranks: Ranks) -> None:
        """Note what every process has counted; all call it at the same moment."""
        table = self.sums.new_zeros(ranks.size, 5)
        table[ranks.rank] = torch.cat((self.sums, self.scored.sums))
        self._gathered = ranks.total(table).cpu()

    def state(self) -> dict[str, Any]:
        """Of all processes, as they last gathered it: plain values and a tensor."""
        return {
            "first": self.first,
            "counted": self._gathered,
            "rounds": self.scored.rounds,
            "norm": self.norm,
            "seconds": self.seconds,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device, ranks: Ranks) -> Interval:
        """What `state` gave; another number of processes keeps the sums, but scores anew."""
        made = cls(int(state["first"]), device)
        made._gathered = counted = state["counted"]
        made.norm, made.seconds = float(state["norm"]), float(state["seconds"])
        if len(counted) == ranks.size:
            own = counted[ranks.rank].to(made.sums)
            made.sums, made.scored.sums = own[:3].clone(), own[3:].clone()
            made.scored.rounds = int(state["rounds"])
        elif ranks.leads:
            made.sums = counted[:, :3].sum(0).to(made.sums)
        return made
