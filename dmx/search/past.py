"""A trial as a sampler sees it, and how values of other studies are made to compare."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState


@dataclass(frozen=True, kw_only=True)
class Past:
    """A trial as a sampler sees it.

    Attributes:
        params, distributions: by dotted path; of a trial that still runs, so far as known.
        state: as it ended, or RUNNING. values: one per objective of a COMPLETE or PRUNED trial.
        curve: step -> dev accuracy. asked_after: how many trials had ended when it was proposed.
        place: its own place among the ended ones, or None.
        group: "" where values compare with this study's; else the other study they belong to.
    """

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    state: TrialState
    values: tuple[float, ...] | None = None
    curve: Mapping[int, float] = field(default_factory=dict)
    asked_after: int = 0
    place: int | None = None
    group: str = ""


ASKED_AFTER = "asked_after"
"""A trial's attribute in Optuna: how many had ended when it was proposed; samplers with generations
need it."""


def past_trials(
    trials: Sequence[FrozenTrial], outcomes: Mapping[int, Mapping[str, Any]]
) -> list[Past]:
    """A study's own trials, from Optuna's record of their points and the journal's of their ends.

    Args:
        outcomes: trial -> its ending (see study_record), in the order in which they ended.
    """
    places = {n: place for place, n in enumerate(outcomes)}
    found = []
    for frozen in trials:
        outcome = outcomes.get(frozen.number)
        values = None
        if outcome is not None and outcome["status"] in ("COMPLETE", "PRUNED"):
            values = tuple(outcome.get("values") or (outcome["value"],))
        found.append(
            Past(
                params=frozen.params,
                distributions=frozen.distributions,
                state=frozen.state,
                values=values,
                curve=frozen.intermediate_values,
                asked_after=frozen.user_attrs.get(ASKED_AFTER, 0),
                place=places.get(frozen.number),
            )
        )
    return found


def comparable(prior: Sequence[Past], own: Sequence[Past]) -> list[Past]:
    """Earlier trials with values that compare with this study's own.

    Another task or budget has another range of accuracies: its best trial may be worse than our
    worst. So a trial at the q-th quantile of its own study gets the q-th quantile of this study's
    values (after Salinas et al. 2020, arXiv 1909.13595), as soon as there are three of these.
    """
    known = [p.values for p in own if p.values is not None and p.state != TrialState.FAIL]
    if len(known) < 3:
        return list(prior)
    columns = [sorted(column) for column in zip(*known, strict=True)]
    return [
        past
        if not past.group
        else replace(
            past, values=tuple(_quantile(c, q) for c, q in zip(columns, share, strict=True))
        )
        for past, share in zip(prior, _shares(prior), strict=True)
    ]


def ranked(prior: Sequence[Past]) -> list[Past]:
    """Earlier trials with their quantile in their own study as their value."""
    return [replace(p, values=s) for p, s in zip(prior, _shares(prior), strict=True)]


def _shares(prior: Sequence[Past]) -> list[tuple[float, ...]]:
    """For each trial and objective: the share of the other trials of its study that lie below."""
    groups: dict[str, list[tuple[float, ...]]] = {}
    for past in prior:
        groups.setdefault(past.group, []).append(past.values or ())
    columns = {g: [sorted(c) for c in zip(*v, strict=True)] for g, v in groups.items()}
    return [
        tuple(
            (bisect.bisect_left(c, v) + bisect.bisect_right(c, v) - 1) / 2 / max(len(c) - 1, 1)
            for c, v in zip(columns[past.group], past.values or (), strict=True)
        )
        for past in prior
    ]


def _quantile(values: Sequence[float], share: float) -> float:
    """Linear between order statistics; `values` are sorted."""
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])
