"""Optuna's samplers: which there are, what each can do, and how each is set up here."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence

import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial

from dmx.errors import ConfigError, DmxError
from dmx.runs.objectives import DEFAULT
from dmx.runs.study import SAMPLERS
from dmx.search.space import SearchSpace

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

REMEMBERING = frozenset({"cmaes", "nsga2"})
"""Samplers whose proposals depend on what was known at each proposal before: generations."""
_PACKAGES = {"cmaes": ("cmaes",), "gp": ("scipy", "torch")}


def check_sampler(kind: str, space: SearchSpace, objectives: Sequence[str] = DEFAULT) -> None:
    """Refuse what a sampler cannot do, before anything is started.

    Raises:
        ConfigError: a package is missing, or the sampler does not suit space or objectives.
    """
    lacking = [p for p in _PACKAGES.get(kind, ()) if importlib.util.find_spec(p) is None]
    if lacking:
        raise ConfigError(
            f"sampler {kind} needs {' and '.join(lacking)}; run: pip install 'dmx-lra[samplers]'."
        )
    if kind == "cmaes" and len(objectives) > 1:
        raise ConfigError("sampler cmaes knows one objective only; use tpe, nsga2 or gp.")
    if kind == "cmaes" and len(independent(kind, space)) == len(space.distributions()):
        raise ConfigError(
            "sampler cmaes moves numbers, and this space has none that every trial has; use tpe."
        )


def independent(kind: str, space: SearchSpace) -> tuple[str, ...]:
    """What the sampler draws at random, each by itself; by Optuna's names."""
    conditional = [space.label(n, d) for c in space.conditions for n, d in c.then.items()]
    if kind == "cmaes":
        choices = [name for name, dist in space.space.items() if dist.kind == "choice"]
        return tuple(dict.fromkeys([*choices, *conditional]))
    if kind in ("gp", "nsga2"):
        return tuple(dict.fromkeys(conditional))
    return ()


def make_sampler(
    kind: str, seed: int, num_trials: int, prior: Sequence[FrozenTrial] = ()
) -> BaseSampler:
    """An Optuna sampler, seeded.

    `tpe` (Bergstra et al. 2011; Ozaki et al. 2022 for several objectives) and `gp` start with a
    quarter of the trials at random, three to ten. `nsga2` (Deb et al. 2002) has generations of a
    quarter of the trials, four to fifty. `cmaes` (Hansen 2016) has its margin for whole numbers
    (Hamano et al. 2022) and begins where earlier trials were good (Nomura et al. 2021).

    Args:
        prior: finished trials of earlier studies, with those values only that CMA-ES moves.
    """
    if kind == "tpe":
        return TPESampler(
            seed=seed,
            n_startup_trials=_startup(num_trials),
            multivariate=True,
            group=True,
            constant_liar=True,
        )
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if kind == "cmaes":
        return optuna.samplers.CmaEsSampler(
            seed=seed,
            with_margin=True,
            warn_independent_sampling=False,
            source_trials=list(prior) or None,
        )
    if kind == "gp":
        return optuna.samplers.GPSampler(
            seed=seed, n_startup_trials=_startup(num_trials), warn_independent_sampling=False
        )
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(
            seed=seed, population_size=max(4, min(50, num_trials // 4))
        )
    raise DmxError(f"sampler {kind!r} is unknown; choices: {', '.join(SAMPLERS)}.")


def _startup(num_trials: int) -> int:
    return max(3, min(10, num_trials // 4))
