"""Which hyperparameters mattered: Optuna's importances over the trials of a study."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dmx.reporting.records import RunReport, Trial

LEAST_TRIALS = 4
"""Fewer scored trials say nothing about any hyperparameter."""
STEADY_TRIALS = 20
"""Below this, importances change with every further trial; the report says so."""


@dataclass(frozen=True, kw_only=True)
class Importances:
    """Shares of the variation in accuracy, summing to 1, the greatest first.

    Attributes:
        method: the estimator's name. note: what to know before trusting the numbers; or, where
            `values` is empty, why there are none.
        left_out: values that only some trials had (conditional ones) -> how many had them.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    method: str = ""
    num_trials: int = 0
    note: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)


def importances(run: RunReport) -> Importances:
    """Estimate them from every trial that was scored, those that ASHA stopped included.

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
    scored = [t for t in run.trials if math.isfinite(t.best) and t.status != "RUNNING"]
    searched = {k: v for k, v in run.search.searched.items() if any(k in t.params for t in scored)}
    shared = [k for k in searched if all(k in t.params for t in scored)]
    left_out = {k: sum(k in t.params for t in scored) for k in searched if k not in shared}
    reason = _impossible(scored, shared)
    if reason:
        return Importances(note=reason, num_trials=len(scored), left_out=left_out)
    try:
        method, values = _evaluate(scored, {k: searched[k] for k in shared})
    except (ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        reason = f"Optuna could not estimate them ({type(error).__name__}: {error})."
        return Importances(note=reason, num_trials=len(scored), left_out=left_out)
    notes = []
    if len(scored) < STEADY_TRIALS:
        notes.append(
            f"Only {len(scored)} trials: take the order as a hint, it may change with more trials."
        )
    if any(t.status == "PRUNED" for t in scored):
        notes.append("Trials that were stopped early count with the accuracy they had reached.")
    return Importances(
        values=values,
        method=method,
        num_trials=len(scored),
        note=" ".join(notes),
        left_out=left_out,
    )


def _impossible(scored: list[Trial], shared: list[str]) -> str:
    """Why nothing can be estimated, or ""."""
    if len(scored) < LEAST_TRIALS:
        return f"{len(scored)} scored trials are too few; at least {LEAST_TRIALS} are needed."
    if not shared:
        return "No searched value is common to all trials."
    if len({t.best for t in scored}) == 1:
        return f"All {len(scored)} trials reached the same accuracy."
    if all(len({repr(t.params[k]) for t in scored}) == 1 for k in shared):
        return "All trials had the same values."
    return ""


def _evaluate(
    scored: list[Trial], searched: Mapping[str, tuple[Any, ...]]
) -> tuple[str, dict[str, float]]:
    import optuna
    from optuna.importance import (
        BaseImportanceEvaluator,
        FanovaImportanceEvaluator,
        PedAnovaImportanceEvaluator,
    )

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for trial in scored:
        study.add_trial(
            optuna.trial.create_trial(
                params={k: trial.params[k] for k in searched},
                distributions={k: _distribution(v) for k, v in searched.items()},
                value=trial.best,
            )
        )
    evaluator: BaseImportanceEvaluator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("sklearn") is not None:
            method, evaluator = "fANOVA", FanovaImportanceEvaluator(seed=0)
        else:
            method, evaluator = "PED-ANOVA", PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(
            study, evaluator=evaluator, params=list(searched)
        )
    finite = {k: float(v) for k, v in found.items() if math.isfinite(v)}
    if not finite or math.fsum(finite.values()) <= 0:
        raise ValueError("every importance is zero")
    return method, dict(sorted(finite.items(), key=lambda item: -item[1]))


def _distribution(spec: tuple[Any, ...]) -> Any:
    """Optuna's form of a search space's (kind, *values)."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    kind, *values = spec
    if kind == "choice":
        return CategoricalDistribution(tuple(values))
    low, high = values
    log = str(kind).startswith("log")
    if str(kind).endswith("int"):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(float(low), float(high), log=log)
