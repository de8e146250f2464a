"""How points are proposed: Optuna's samplers, as functions of the seed and of what is recorded.

A proposal is made in a study of its own that exists in memory only and is built from the record
each time. So the sampler may hold what it likes there (CMA-ES keeps its state as a pickle in the
storage it samples from): nothing of it is ever written to, or read from, the study's folder, and
a restart has nothing to restore.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from dmx.errors import ConfigError, DmxError
from dmx.runs.layout import DEV_ACCURACY
from dmx.runs.study import SAMPLERS, Study
from dmx.runs.trial import DEFAULT, Trial, directions
from dmx.search.space import SearchSpace
from dmx.search.warm_start import PriorTrial, as_quantiles, rescaled

if TYPE_CHECKING:
    from dmx.study.study import StudyConfig

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

STATES = {
    "COMPLETE": TrialState.COMPLETE,
    "PRUNED": TrialState.PRUNED,
    "FAILED": TrialState.FAIL,
    "RUNNING": TrialState.RUNNING,
}
_PACKAGES = {"cmaes": ("cmaes",), "gp": ("scipy", "torch")}


def check_sampler(kind: str, space: SearchSpace, objectives: Sequence[str] = DEFAULT) -> None:
    """Refuse a sampler whose package is missing, or which does not suit space or objectives."""
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
    if kind in ("tpe", "random"):
        return ()
    alone = (
        item.label
        for item in space.searched
        if item.when is not None or (kind == "cmaes" and item.dist.kind == "choice")
    )
    return tuple(dict.fromkeys(alone))


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
    startup = max(3, min(10, num_trials // 4))
    match kind:
        case "tpe":
            return TPESampler(
                seed=seed,
                n_startup_trials=startup,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
        case "random":
            return RandomSampler(seed=seed)
        case "cmaes":
            return CmaEsSampler(
                seed=seed,
                with_margin=True,
                warn_independent_sampling=False,
                source_trials=list(prior) or None,
            )
        case "gp":
            return GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        case "nsga2":
            return NSGAIISampler(seed=seed, population_size=max(4, min(50, num_trials // 4)))
    raise DmxError(f"sampler {kind!r} is unknown; choices: {', '.join(SAMPLERS)}.")


class _Seeded(BaseSampler):
    """A sampler whose every draw has a seed of its own: the study's, the trial's, the name's.

    So what is drawn for a trial does not depend on how many of its values a crash had already
    left in the storage, nor on the session that draws.
    """

    def __init__(self, config: StudyConfig, number: int, prior: Sequence[FrozenTrial] = ()) -> None:
        self._make = lambda name: make_sampler(
            config.sampler,
            zlib.crc32(f"{config.seed}/{number}/{name}".encode()),
            config.num_trials,
            prior,
        )
        self._together = self._make("")
        self._alone = independent(config.sampler, config.space)

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
        # Optuna finds the values that all trials had so far; one that exists under a condition may
        # be among them at first, and CMA-ES breaks when it goes. So those are left out at once.
        found = self._together.infer_relative_search_space(study, trial)
        return {name: dist for name, dist in found.items() if name not in self._alone}

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        return self._together.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        sampler = self._make(param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


# -- trials as Optuna has them ------------------------------------------------------------------


def frozen_trial(space: SearchSpace, trial: Trial, *, stopped_count: bool = False) -> FrozenTrial:
    """All that is known of a trial.

    Args:
        stopped_count: a stopped trial is shown as COMPLETE, with its best values.
    """
    fixed = FixedTrial(dict(trial.drawn))
    space.suggest(fixed)
    state = STATES[trial.status]
    if stopped_count and state == TrialState.PRUNED:
        state = TrialState.COMPLETE
    return create_trial(
        state=state,
        params=fixed.params,
        distributions=fixed.distributions,
        values=values_in(state, trial),
        intermediate_values=accuracies(trial),
        user_attrs={"error": trial.error} if trial.error else None,
    )


def values_in(state: TrialState, trial: Trial) -> list[float] | None:
    """Of a COMPLETE trial its best ones; of a PRUNED one the last, as Optuna has it itself."""
    if state == TrialState.COMPLETE:
        return list(trial.values.values())
    curve = accuracies(trial) if state == TrialState.PRUNED else {}
    return [curve[max(curve)]] if curve else None


def accuracies(trial: Trial) -> dict[int, float]:
    """Step -> dev accuracy, where Optuna can take it."""
    found = ((step, accuracy_at(trial, step)) for step in sorted(trial.curve))
    return {step: value for step, value in found if value is not None}


def accuracy_at(trial: Trial, step: int) -> float | None:
    """The dev accuracy of a report; None where Optuna takes none: NaN, or several objectives."""
    value = trial.curve[step].get(DEV_ACCURACY)
    fits = isinstance(value, float) and math.isfinite(value) and len(trial.objectives) == 1
    return value if fits else None


class _Shared(FrozenTrial):
    """A trial that a study takes as it is: a deep copy of each was nearly all of a proposal's time.

    Optuna's storages replace what belongs to a trial and never change it in place.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return copy.copy(self)


# -- proposals ----------------------------------------------------------------------------------


class Proposer:
    """Proposes the points of a study.

    Args:
        prior: finished trials of earlier studies (see warm_start).
    """

    def __init__(self, config: StudyConfig, prior: Sequence[PriorTrial] = ()) -> None:
        self._config, self._prior = config, prior
        self._ended: dict[int, FrozenTrial] = {}
        self._replay: _GenerationReplay | None = None

    def propose(self, record: Study, number: int) -> dict[str, Any]:
        """The values of trial `number`, the next one, by Optuna's names.

        They are a function of the record alone. The first trials are the space's initial points;
        what these leave open is drawn.
        """
        space, kind = self._config.space, self._config.sampler
        points = space.initial_points
        known = space.for_optuna(points[number]) if number < len(points) else {}
        if (point := space.point_from(known)) is not None:
            return point
        if kind in ("cmaes", "nsga2"):  # they have generations
            self._replay = self._replay or _GenerationReplay(self)
            return self._replay.ask(record, known)
        study = self.new_study(filter(None, map(_values, record.outcomes.values())))
        for trial in record.trials if kind != "random" else ():
            study.add_trial(self._known(trial))
        return self.ask(study, number, known).params

    def new_study(self, own: Iterable[Sequence[float]] = ()) -> optuna.Study:
        """A study in memory that knows the earlier studies; `own`: the new one's values so far."""
        config = self._config
        study = optuna.create_study(directions=directions(config.objectives))
        nsga2 = {NSGAIISampler._get_generation_key(): 0} if config.sampler == "nsga2" else None
        for trial in _frozen(rescaled(self._prior, list(own)), system_attrs=nsga2):
            trial.__class__ = _Shared
            study.add_trial(trial)
        return study

    def ask(self, study: optuna.Study, number: int, known: Mapping[str, Any]) -> optuna.Trial:
        """Draw a trial in such a study; the `known` values are fixed."""
        study.sampler = _Seeded(self._config, number, self._source())
        if known:
            study.enqueue_trial(dict(known))
        trial = study.ask()
        _ = trial.relative_params  # drawn now, even where every value is known already
        self._config.space.suggest(trial)
        return trial

    def _known(self, trial: Trial) -> FrozenTrial:
        """The trial for Optuna, made once when it has ended.

        TPE ranks stopped trials by itself; the others would forget them, and propose the same
        again.
        """
        if trial.number in self._ended:
            return self._ended[trial.number]
        tpe = self._config.sampler == "tpe"
        found = frozen_trial(self._config.space, trial, stopped_count=not tpe)
        found.__class__ = _Shared
        if trial.status != "RUNNING":
            self._ended[trial.number] = found
        return found

    def _source(self) -> list[FrozenTrial]:
        """What CMA-ES begins from: the prior's values that it moves itself."""
        if self._config.sampler != "cmaes" or not self._prior:
            return []
        # It looks at the best tenth; of fewer than ten trials that is the best one.
        times = -(-10 // len(self._prior))
        left_out = independent("cmaes", self._config.space)
        return times * _frozen(as_quantiles(self._prior), left_out)


def _frozen(
    prior: Sequence[PriorTrial], left_out: Collection[str] = (), **more: Any
) -> list[FrozenTrial]:
    return [
        create_trial(
            params={k: v for k, v in past.params.items() if k not in left_out},
            distributions={k: d for k, d in past.distributions.items() if k not in left_out},
            values=list(past.values),
            **more,
        )
        for past in prior
    ]


def _values(outcome: Mapping[str, Any]) -> list[float] | None:
    """Of a trial that ended; None where it failed."""
    if outcome["status"] == "FAILED":
        return None
    return list(outcome.get("values") or (outcome["value"],))


class _GenerationReplay:
    """A study in which every trial is asked for in its turn, knowing what was known then.

    Of trials that are recorded the sampler's answers are not used (their values are fixed), but it
    keeps its generations by being asked. Live, each trial is asked for once; after a restart all
    that are recorded are asked for again, and the sampler is where it was.
    """

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self._study = proposer.new_study()
        self._asked: list[optuna.Trial] = []
        self._told = 0

    def ask(self, record: Study, known: Mapping[str, Any]) -> dict[str, Any]:
        """See Proposer.propose."""
        ended = list(record.outcomes.items())
        for trial in record.trials[len(self._asked) :]:
            self._ask(ended[: trial.started_after], trial.drawn)
        return self._ask(ended, known).params

    def _ask(
        self, ended: Sequence[tuple[int, Mapping[str, Any]]], known: Mapping[str, Any]
    ) -> optuna.Trial:
        for number, outcome in ended[self._told :]:
            values = _values(outcome)
            state = TrialState.FAIL if values is None else TrialState.COMPLETE
            self._study.tell(self._asked[number], values, state=state)
        self._told = len(ended)
        trial = self._proposer.ask(self._study, len(self._asked), known)
        self._asked.append(trial)
        return trial
