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

LEAST_TRIALS = 4
"""Fewer scored trials say nothing about any hyperparameter."""
STEADY_TRIALS = 20
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
    trials = [t for t, _ in scored]
    searched = {k: v for k, v in run.search.searched.items() if any(k in t.drawn for t in trials)}
    shared = [k for k in searched if all(k in t.drawn for t in trials)]
    left_out = {k: sum(k in t.drawn for t in trials) for k in searched if k not in shared}
    looks = sum(r[STEPS] <= steps for t in trials for r in t.reports)
    reason = _impossible(scored, shared, run.by_luck(looks), steps)
    if reason:
        return Importances(note=reason, num_trials=len(scored), left_out=left_out)
    try:
        method, values = _evaluate(scored, {k: searched[k] for k in shared})
    except (ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        reason = f"Optuna could not estimate them ({type(error).__name__}: {error})."
        return Importances(note=reason, num_trials=len(scored), left_out=left_out)
    notes = []
    if any(t.steps > steps for t in trials):
        notes.append(
            f"Trials are compared by their best accuracy within {steps:,} steps, which all of them "
            "took; what matters later may be another setting."
        )
    if len(scored) < STEADY_TRIALS:
        notes.append(
            f"Only {len(scored)} trials: take the order as a hint, it may change with more trials."
        )
    return Importances(
        values=values,
        method=method,
        meaning=_MEANING[method],
        num_trials=len(scored),
        note=" ".join(notes),
        left_out=left_out,
    )


def _impossible(
    scored: list[tuple[Trial, float]], shared: list[str], luck: float, steps: int
) -> str:
    """Why nothing can be estimated, or ""."""
    if len(scored) < LEAST_TRIALS:
        return f"{len(scored)} scored trials are too few; at least {LEAST_TRIALS} are needed."
    if not shared:
        return "No searched value is common to all trials."
    best = max(accuracy for _, accuracy in scored)
    if best <= luck:
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
    from optuna.importance import (
        BaseImportanceEvaluator,
        FanovaImportanceEvaluator,
        PedAnovaImportanceEvaluator,
    )

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for trial, accuracy in scored:
        study.add_trial(
            optuna.trial.create_trial(
                params={k: _on_scale(trial.drawn[k], spec) for k, spec in searched.items()},
                distributions={k: _distribution(spec) for k, spec in searched.items()},
                value=accuracy,
            )
        )
    evaluator: BaseImportanceEvaluator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("sklearn") is not None:
            method, evaluator = "fANOVA", FanovaImportanceEvaluator(seed=0)
        else:
            method, evaluator = "PED-ANOVA", PedAnovaImportanceEvaluator(target_quantile=_TOP)
        found = optuna.importance.get_param_importances(
            study, evaluator=evaluator, params=list(searched)
        )
    finite = {k: float(v) for k, v in found.items() if math.isfinite(v)}
    if not finite or math.fsum(finite.values()) <= 0:
        raise ValueError("every importance is zero")
    return method, dict(sorted(finite.items(), key=lambda item: -item[1]))


def _on_scale(value: Any, spec: tuple[Any, ...]) -> Any:
    """A value on the scale on which the search draws it.

    Optuna's fANOVA takes a logarithmic range as a linear one: of 1e-4 to 1e-1 it weighs 1e-2 to
    1e-1, a third of the draws, with nine tenths.
    """
    return math.log10(value) if str(spec[0]).startswith("log") else value


def _distribution(spec: tuple[Any, ...]) -> Any:
    """Optuna's form of a search space's (kind, *values), on the scale of `_on_scale`."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    kind, *values = spec
    if kind == "choice":
        return CategoricalDistribution(tuple(values))
    if kind == "int":
        return IntDistribution(int(values[0]), int(values[1]))
    low, high = (float(_on_scale(v, spec)) for v in values)
    return FloatDistribution(low, high)
