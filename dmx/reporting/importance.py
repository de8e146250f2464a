"""Which hyperparameters mattered: Optuna's importances over the trials of a study."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dmx.runs.layout import DEV_ACCURACY, STEPS
from dmx.runs.run import Run
from dmx.runs.trial import Trial

_LEAST_TRIALS = 4
"""Fewer scored trials say nothing about any hyperparameter."""
_STEADY_TRIALS = 20
"""Below this, importances change with every further trial; the report says so."""
_TOP = 0.3
"""The trials whose settings PED-ANOVA compares with all others'; a tenth of few trials is noise."""
_MEANING = {
    "fANOVA": "How much of the accuracy's variation over the searched space each setting explains "
    "by itself, whatever the others are",
    "PED-ANOVA": f"How much each setting decides whether a trial is among the best {_TOP:.0%}",
}


@dataclass(frozen=True, kw_only=True)
class Importances:
    """Shares of the variation in accuracy, summing to 1, the greatest first.

    Attributes:
        method: the estimator's name. meaning: what a share is, in words.
        note: what to know before trusting the numbers; or, where `values` is empty, why there are
            none.
        left_out: values that only some trials had (conditional ones) -> how many had them.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    method: str = ""
    meaning: str = ""
    num_trials: int = 0
    note: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What they are, or why there are none."""
        if not self.values:
            return f"No importances: {self.note}"
        return f"{self.meaning}, by {self.method} over {self.num_trials} trials. {self.note}"


def importances(run: Run) -> Importances:
    """Estimate them from every trial that ended, those that were stopped early included.

    Trials are compared by what they reached within the steps that all of them took: without those
    that were stopped, the bad half of the space is missing, and with the accuracy at their end, a
    setting that stops trials seems to be one that makes them bad.

    fANOVA (Hutter et al. 2014) where scikit-learn is installed, else PED-ANOVA (Watanabe et al.
    2023), which needs nothing. Both by Optuna, seeded.
    """
    if run.search is None:
        return Importances(note="A single run searches nothing.")
    if run.is_population:
        return Importances(
            note="In a population a trial's values change, and its weights are others' before: "
            "no result belongs to one value."
        )
    ended = [t for t in run.trials if t.status in ("COMPLETE", "PRUNED") and t.reports]
    steps = min((t.steps for t in ended), default=0)
    scored = [(t, a) for t in ended if math.isfinite(a := t.highest(DEV_ACCURACY, within=steps))]
    counts = {k: sum(k in t.drawn for t, _ in scored) for k in run.search.searched}
    shared = {k: run.search.searched[k] for k, n in counts.items() if n == len(scored)}
    looks = sum(r[STEPS] <= steps for t, _ in scored for r in t.reports)
    method, values = "", dict[str, float]()
    note = _impossible(scored, list(shared), run.by_luck(looks), steps)
    if not note:
        try:
            method, values = _evaluate(scored, shared)
        except (ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
            note = f"Optuna could not estimate them ({type(error).__name__}: {error})."
    if values and any(t.steps > steps for t, _ in scored):
        note = (
            f"Trials are compared by their best accuracy within {steps:,} steps, which all of them "
            "took; what matters later may be another setting. "
        )
    if values and len(scored) < _STEADY_TRIALS:
        note += (
            f"Only {len(scored)} trials: take the order as a hint, it may change with more trials."
        )
    return Importances(
        values=values,
        method=method,
        meaning=_MEANING.get(method, ""),
        num_trials=len(scored),
        note=note.strip(),
        left_out={k: n for k, n in counts.items() if 0 < n < len(scored)},
    )


def _impossible(
    scored: list[tuple[Trial, float]], shared: list[str], luck: float, steps: int
) -> str:
    """Why nothing can be estimated, or ""."""
    if len(scored) < _LEAST_TRIALS:
        return f"{len(scored)} scored trials are too few; at least {_LEAST_TRIALS} are needed."
    if not shared:
        return "No searched value is common to all trials."
    if max(accuracy for _, accuracy in scored) <= luck:
        return (
            f"Within {steps:,} steps, which all trials took, none is above chance: what tells them "
            "apart is the noise of the dev split."
        )
    if len({accuracy for _, accuracy in scored}) == 1:
        return f"All {len(scored)} trials reached the same accuracy."
    if all(len({repr(t.drawn[k]) for t, _ in scored}) == 1 for k in shared):
        return "All trials had the same values."
    return ""


def _evaluate(
    scored: list[tuple[Trial, float]], searched: Mapping[str, tuple[Any, ...]]
) -> tuple[str, dict[str, float]]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    distributions = {k: _distribution(spec) for k, spec in searched.items()}
    for trial, accuracy in scored:
        params = {k: _on_scale(trial.drawn[k], spec) for k, spec in searched.items()}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=accuracy)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_forest = importlib.util.find_spec("sklearn") is not None
        found = optuna.importance.get_param_importances(
            study,
            evaluator=FanovaImportanceEvaluator(seed=0)
            if by_forest
            else PedAnovaImportanceEvaluator(target_quantile=_TOP),
            params=list(searched),
        )
    finite = {k: float(v) for k, v in found.items() if math.isfinite(v)}
    if not finite or math.fsum(finite.values()) <= 0:
        raise ValueError("every importance is zero")
    ordered = dict(sorted(finite.items(), key=lambda item: -item[1]))
    return "fANOVA" if by_forest else "PED-ANOVA", ordered


def _on_scale(value: Any, spec: tuple[Any, ...]) -> Any:
    """A value on the scale on which the search draws it.

    Optuna's fANOVA takes a logarithmic range as a linear one: of 1e-4 to 1e-1 it weighs 1e-2 to
    1e-1, a third of the draws, with nine tenths.
    """
    return math.log10(value) if str(spec[0]).startswith("log") else value


def _distribution(spec: tuple[Any, ...]) -> Any:
    """Optuna's form of a search space's (kind, *values), on the scale of `_on_scale`."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kind, *values = spec
    if kind == "choice":
        return CategoricalDistribution(tuple(values))
    if kind == "int":
        return IntDistribution(int(values[0]), int(values[1]))
    low, high = (float(_on_scale(v, spec)) for v in values)
    return FloatDistribution(low, high)
