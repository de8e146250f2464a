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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState, create_trial

from dmx.errors import ConfigError, DmxError
from dmx.runs.layout import DEV_ACCURACY
from dmx.runs.study import SAMPLERS, Study
from dmx.runs.trial import DEFAULT, directions
from dmx.runs.trial import Trial as RecordedTrial
from dmx.search.space import SearchSpace
from dmx.search.warm_start import ObservedTrial, as_quantiles, rescaled

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

GENERATIONAL_SAMPLERS = frozenset({"cmaes", "nsga2"})
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


class _Shared(FrozenTrial):
    """A trial that a study takes as it is: a deep copy of each was nearly all of a proposal's time.

    Optuna's storages replace what belongs to a trial and never change it in place.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return copy.copy(self)


class _Seeded(BaseSampler):
    """A sampler whose every draw has a seed of its own: the study's, the trial's, the name's.

    So what is drawn for a trial does not depend on how many of its values a crash had already
    left in the storage, nor on the session that draws.
    """

    def __init__(self, proposer: Proposer, number: int, prior: Sequence[FrozenTrial]) -> None:
        self._make = lambda name: make_sampler(
            proposer.kind,
            zlib.crc32(f"{proposer.seed}/{number}/{name}".encode()),
            proposer.num_trials,
            prior,
        )
        self._together = self._make("")
        self._alone = frozenset(independent(proposer.kind, proposer.space))

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
        """What is drawn together.

        Optuna finds the values that all trials had so far; one that exists under a condition may
        be among them at first, and CMA-ES breaks when it goes. So those are left out at once.
        """
        found = self._together.infer_relative_search_space(study, trial)
        return {name: dist for name, dist in found.items() if name not in self._alone}

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


@dataclass(kw_only=True)
class Proposer:
    """Proposes points.

    Attributes:
        kind: one of SAMPLERS. seed: of the study. num_trials: of the whole study.
        objectives: names. prior: finished trials of earlier studies (see warm_start).
    """

    kind: str
    space: SearchSpace
    seed: int
    num_trials: int
    objectives: tuple[str, ...] = DEFAULT
    prior: tuple[ObservedTrial, ...] = ()
    _ended: dict[int, tuple[ObservedTrial, FrozenTrial]] = field(default_factory=dict)
    _replay: _GenerationReplay | None = None

    @property
    def uses_history(self) -> bool:
        """Whether a proposal depends on the trials before it."""
        return self.kind != "random"

    def propose(self, record: Study, number: int) -> dict[str, Any]:
        """The values of trial `number` by SearchSpace's labels, a function of the record alone.

        The first trials are the space's initial points; what these leave open is drawn.
        """
        points = self.space.initial_points
        known = self.space.for_optuna(points[number]) if number < len(points) else {}
        try:
            fixed = FixedTrial(known)
            self.space.suggest(fixed)
            return fixed.params
        except ValueError:  # something is still open
            pass
        earlier = self._observe(record, number) if self.uses_history else []
        if self.kind in GENERATIONAL_SAMPLERS:
            self._replay = self._replay or _GenerationReplay(self)
            return self._replay.ask(earlier, number, known, len(record.outcomes))
        study = self._fresh(earlier)
        for index, past in enumerate(earlier):
            study.add_trial(self._ended[index][1] if index in self._ended else self._frozen(past))
        return self._ask(study, number, known).params

    def _observe(self, record: Study, number: int) -> list[ObservedTrial]:
        """The trials before one; those that have ended are made once."""
        order = {trial: place for place, trial in enumerate(record.outcomes)}
        found = []
        for trial in record.trials[:number]:
            if trial.number in self._ended:
                found.append(self._ended[trial.number][0])
                continue
            fixed = FixedTrial(dict(trial.drawn))
            self.space.suggest(fixed)
            outcome = record.outcomes.get(trial.number, {})
            values = None
            if trial.status in ("COMPLETE", "PRUNED"):
                values = tuple(outcome.get("values") or (outcome["value"],))
            past = ObservedTrial(
                params=fixed.params,
                distributions=fixed.distributions,
                state=STATES[trial.status],
                values=values,
                curve=accuracies(trial),
                asked_after=trial.started_after,
                finish_order=order.get(trial.number),
            )
            found.append(past)
            if past.finish_order is not None:  # else it will change
                self._ended[trial.number] = (past, self._frozen(past))
        return found

    def _fresh(self, own: Sequence[ObservedTrial]) -> optuna.Study:
        """A study in memory that knows the earlier studies."""
        study = optuna.create_study(directions=directions(self.objectives))
        for past in rescaled(self.prior, own):
            study.add_trial(self._frozen(past, first_generation=self.kind == "nsga2"))
        return study

    def _ask(self, study: optuna.Study, number: int, known: Mapping[str, Any]) -> Trial:
        study.sampler = _Seeded(self, number, self._source())
        if known:
            study.enqueue_trial(dict(known))
        trial = study.ask()
        _ = trial.relative_params  # drawn now, even where every value is known already
        self.space.suggest(trial)
        return trial

    def _frozen(self, past: ObservedTrial, *, first_generation: bool = False) -> FrozenTrial:
        """The trial for Optuna. TPE ranks stopped trials by itself; the others take their best.

        They would forget them otherwise, and propose the same again.
        """
        state = past.state
        if self.kind != "tpe" and _counts(past):
            state = TrialState.COMPLETE
        single = len(self.objectives) == 1
        attributes = {}
        if first_generation:
            attributes[NSGAIISampler._get_generation_key()] = 0
        trial = create_trial(
            state=state,
            params=dict(past.params),
            distributions=dict(past.distributions),
            values=list(past.values or ()) if state == TrialState.COMPLETE else None,
            intermediate_values=dict(past.curve) if single else None,
            system_attrs=attributes,
        )
        trial.__class__ = _Shared
        return trial

    def _source(self) -> list[FrozenTrial]:
        """What CMA-ES begins from: the prior's values that it moves itself."""
        if self.kind != "cmaes" or not self.prior:
            return []
        left_out = set(independent(self.kind, self.space))
        # It looks at the best tenth; of fewer than ten trials that is the best one.
        times = -(-10 // len(self.prior))
        return times * [
            create_trial(
                params={k: v for k, v in past.params.items() if k not in left_out},
                distributions={k: d for k, d in past.distributions.items() if k not in left_out},
                values=list(past.values or ()),
            )
            for past in as_quantiles(self.prior)
        ]


STATES = {
    "COMPLETE": TrialState.COMPLETE,
    "PRUNED": TrialState.PRUNED,
    "FAILED": TrialState.FAIL,
    "RUNNING": TrialState.RUNNING,
}


def accuracies(trial: RecordedTrial) -> dict[int, float]:
    """Step -> dev accuracy, as far as Optuna can take it: it refuses NaN."""
    found = ((step, accuracy_of(metrics)) for step, metrics in sorted(trial.curve.items()))
    return {step: value for step, value in found if value is not None}


def accuracy_of(metrics: Mapping[str, Any]) -> float | None:
    """One report's dev accuracy, or None where Optuna cannot take it."""
    value = metrics.get(DEV_ACCURACY)
    return value if isinstance(value, float) and math.isfinite(value) else None


def _counts(past: ObservedTrial) -> bool:
    return past.state in (TrialState.COMPLETE, TrialState.PRUNED) and past.values is not None


class _GenerationReplay:
    """A study in which every trial is asked for in its turn, knowing what was known then.

    Of trials that are recorded the sampler's answers are not used (their values are fixed), but it
    keeps its generations by being asked. Live, each trial is asked for once; after a restart all
    that are recorded are asked for again, and the sampler is where it was.
    """

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self._study = proposer._fresh(())
        self._asked: list[Trial] = []
        self._told = 0

    def ask(
        self, earlier: Sequence[ObservedTrial], number: int, known: Mapping[str, Any], after: int
    ) -> dict[str, Any]:
        """See Proposer.propose."""
        ended = sorted(
            (p.finish_order, n) for n, p in enumerate(earlier) if p.finish_order is not None
        )
        order = [n for _, n in ended]
        for past in earlier[len(self._asked) :]:
            self._tell(earlier, order[: past.asked_after])
            self._asked.append(self._proposer._ask(self._study, len(self._asked), past.params))
        self._tell(earlier, order[:after])
        trial = self._proposer._ask(self._study, number, known)
        self._asked.append(trial)
        return trial.params

    def _tell(self, earlier: Sequence[ObservedTrial], order: Sequence[int]) -> None:
        for number in order[self._told :]:
            past, trial = earlier[number], self._asked[number]
            if _counts(past):
                assert past.values is not None
                self._study.tell(trial, list(past.values))
            else:
                self._study.tell(trial, state=TrialState.FAIL)
            self._told += 1
