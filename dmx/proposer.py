"""How points are proposed: Optuna's samplers, each draw with a seed of its own."""

from __future__ import annotations

import warnings
import zlib
from typing import Any

import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial

from dmx.errors import DmxError

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def make_sampler(kind: str, seed: int, num_trials: int) -> BaseSampler:
    """An Optuna sampler, seeded.

    `tpe` (Bergstra et al. 2011) starts with a quarter of the trials at random, three to ten.
    """
    if kind == "tpe":
        return TPESampler(
            seed=seed,
            n_startup_trials=max(3, min(10, num_trials // 4)),
            multivariate=True,
            group=True,
            constant_liar=True,
        )
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    raise DmxError(f"sampler {kind!r} is unknown; choices: random, tpe.")


class Proposer(BaseSampler):
    """A sampler whose every draw has a seed of its own: the study's, the trial's, the name's.

    So what is drawn for a trial does not depend on how many of its values a crash had already
    left in the storage, nor on the session that draws.
    """

    def __init__(self, kind: str, seed: int, number: int, num_trials: int) -> None:
        self._make = lambda name: make_sampler(
            kind, zlib.crc32(f"{seed}/{number}/{name}".encode()), num_trials
        )
        self._together = self._make("")

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
        """What is drawn together."""
        return self._together.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw it."""
        return self._together.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """Draw one value by itself."""
        sampler = self._make(param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)
