"""An estimate of a study or a run, and what follows from it: hours and money."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmx.costing.count import StepCost
from dmx.costing.probe import Probe
from dmx.errors import ConfigError
from dmx.search.simulate import ExpectedSteps


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An estimate, of a study or of a single run.

    Attributes:
        kinds: the counted models, by rising FLOPs; weights: how many corners of the space each
            stands for. num_kinds: models of different size that the space can propose.
        probes: measured on the cheapest and the dearest model; empty where this machine cannot
            stand for the one that will train (`note` says why).
        steps: optimizer steps in all. evaluations: of the dev split, in all.
        gpus_per_trial, cpus_per_trial, slots: trials at once.
        final_steps: optimizer steps of retraining the best with other seeds.
    """

    what: str
    kinds: tuple[StepCost, ...]
    weights: tuple[int, ...]
    num_kinds: int
    probes: tuple[Probe, ...]
    steps: ExpectedSteps
    num_trials: int
    evaluations: float
    gpus_per_trial: float
    cpus_per_trial: float
    slots: int
    final_steps: int = 0
    price_per_gpu_hour: float | None = None
    note: str = ""

    @property
    def share_of_steps(self) -> float:
        """Steps that are expected, of those without early stopping."""
        return self.steps.expected / self.steps.full if self.steps.full else 1.0

    @property
    def step_seconds(self) -> float:
        """Of a step, averaged over the models; NaN where nothing was measured."""
        return self._averaged([p.step_seconds for p in self.probes])

    @property
    def eval_seconds(self) -> float:
        """Of an evaluation, averaged over the models; NaN where nothing was measured."""
        return self._averaged([p.eval_seconds for p in self.probes])

    def _averaged(self, measured: list[float]) -> float:
        """A time that grows linearly with FLOPs between the two probes, over all models."""
        if not measured:
            return math.nan
        low, high = self.kinds[0].flops, self.kinds[-1].flops
        slope = (measured[-1] - measured[0]) / (high - low) if high > low else 0.0
        seconds = [measured[0] + max(slope, 0.0) * (k.flops - low) for k in self.kinds]
        return sum(s * w for s, w in zip(seconds, self.weights, strict=True)) / sum(self.weights)

    @property
    def trial_seconds(self) -> float:
        """Training and evaluating of all trials one after another, final seeds included."""
        evaluations = self.evaluations
        if self.final_steps and self.steps.expected:
            evaluations *= 1 + self.final_steps / self.steps.expected
        steps = self.steps.expected + self.final_steps
        return self.step_seconds * steps + self.eval_seconds * evaluations

    @property
    def wall_seconds(self) -> float:
        """With `slots` trials at once."""
        return self.trial_seconds / max(min(self.slots, max(self.num_trials, 1)), 1)

    @property
    def gpu_hours(self) -> float:
        """0 where no GPU is used."""
        return self.trial_seconds * self.gpus_per_trial / 3600 if self.gpus_per_trial else 0.0

    @property
    def cpu_hours(self) -> float:
        """Core-hours."""
        return self.trial_seconds * self.cpus_per_trial / 3600

    @property
    def money(self) -> float | None:
        """GPU-hours times their price; None without a price."""
        return None if self.price_per_gpu_hour is None else self.gpu_hours * self.price_per_gpu_hour


def check_price(price: float | None, *, dry_run: bool = True) -> None:
    """Refuse a price that is none, or that no estimate would use.

    Raises:
        ConfigError: it is negative or not a number, or given without --dry-run.
    """
    if price is not None and not dry_run:
        raise ConfigError(
            "--price-per-gpu-hour is for --dry-run, which starts nothing; add --dry-run, or leave "
            "it out."
        )
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price-per-gpu-hour is {price}; it must not be negative.")
