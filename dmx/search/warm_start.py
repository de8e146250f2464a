"""Warm start: finished trials of earlier studies, which a new study's sampler knows from the start.

They are no trials of the new study: they are neither counted, nor numbered, nor shown. What was
taken is kept in the study's folder, so that a restart needs no other folder and sees no change.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FixedTrial, TrialState

from dmx.errors import ConfigError, StageError
from dmx.runs import layout
from dmx.runs.study import Study
from dmx.runs.trial import missing
from dmx.schema import flatten, local_path, to_dict
from dmx.search.space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class ObservedTrial:
    """A trial as a sampler sees it.

    Attributes:
        params, distributions: by dotted path; of a trial that still runs, so far as known.
        state: as it ended, or RUNNING. values: one per objective of a COMPLETE or PRUNED trial.
        curve: step -> dev accuracy. asked_after: how many trials had ended when it was proposed.
        finish_order: its place among the ended ones, or None.
        group: "" where values compare with this study's; else the other study they belong to.
    """

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    state: TrialState
    values: tuple[float, ...] | None = None
    curve: Mapping[int, float] = field(default_factory=dict)
    asked_after: int = 0
    finish_order: int | None = None
    group: str = ""


def rescaled(prior: Sequence[ObservedTrial], own: Sequence[ObservedTrial]) -> list[ObservedTrial]:
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


def as_quantiles(prior: Sequence[ObservedTrial]) -> list[ObservedTrial]:
    """Earlier trials with their quantile in their own study as their value."""
    return [replace(p, values=s) for p, s in zip(prior, _shares(prior), strict=True)]


def _shares(prior: Sequence[ObservedTrial]) -> list[tuple[float, ...]]:
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


@dataclass(frozen=True, kw_only=True)
class TargetStudy:
    """The study that is to begin: what decides whether earlier points fit and compare."""

    task: str
    space: SearchSpace
    overrides: Mapping[str, Any]
    max_steps: int
    data_checksum: str
    objectives: tuple[str, ...]
    sampler: str


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What was taken.

    Attributes:
        names: of the studies, in order. notes: one sentence about each. text: the file's content.
    """

    names: tuple[str, ...]
    notes: tuple[str, ...]
    text: str

    def identity(self) -> dict[str, Any]:
        """What must be equal for a later session to continue the study."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        return {"runs": list(self.names), "sha256": digest}


def collect(runs: Sequence[Path], target: TargetStudy) -> WarmStart:
    """Read earlier studies, and keep of them the points that the new study could propose.

    Raises:
        ConfigError: a folder holds no study, or one of another attention; the sampler cannot use
            them; or no point fits.
        StageError: one of them is damaged.
    """
    if target.sampler == "random":
        raise ConfigError("--warm-start is of no use to --sampler random; use tpe, gp or cmaes.")
    trials: list[dict[str, Any]] = []
    notes = []
    for run in runs:
        study = _read(run, target)
        settings = study.settings
        same = (
            settings.get("task") == target.task
            and settings.get("data_checksum") == target.data_checksum
            and settings.get("max_steps") == target.max_steps
        )
        if not same and target.sampler == "nsga2":
            raise ConfigError(
                f"--warm-start {run.name} has another task, data or budget, and nsga2 compares "
                "values as they are; use --sampler tpe or gp."
            )
        found = list(_points(study, target))
        group = "" if same else run.name
        kept = [{**f, "group": group} for f in found if f]
        trials.extend(kept)
        notes.append(_note(run.name, settings, target, len(kept), len(found) - len(kept)))
    if not trials:
        raise ConfigError(
            f"--warm-start: no finished trial of {', '.join(r.name for r in runs)} lies in this "
            "search space; leave it out."
        )
    names = tuple(r.name for r in runs)
    text = json.dumps({"runs": list(names), "notes": notes, "trials": trials}, indent=1)
    return WarmStart(names=names, notes=tuple(notes), text=text + "\n")


def prepare(
    runs: Sequence[str],
    storage: Path,
    target: TargetStudy,
    folder: Path,
    *,
    known: Mapping[str, Any] | None,
    resume: bool,
) -> tuple[dict[str, Any] | None, dict[str, str], tuple[str, ...]]:
    """(identity for the settings, files for the new folder, notes) of `--warm-start`.

    Args:
        runs: as they were given: paths, or names below `storage`.
        known: the identity of the study that is continued.

    Raises: see collect and check_kept.
    """
    names = [local_path("--warm-start", run).name for run in runs]
    if resume:  # the earlier studies may be gone, or have grown
        if known is None or known.get("runs") != names:
            return ({"runs": names} if names else None), {}, ()
        return dict(known), {}, check_kept(folder, known)
    if not runs:
        return None, {}, ()
    paths = [Path(run) if Path(run).is_dir() else storage / run for run in runs]
    taken = collect([p.absolute() for p in paths], target)
    return taken.identity(), {layout.WARM_START_FILE: taken.text}, taken.notes


def _read(run: Path, target: TargetStudy) -> Study:
    """An earlier study, from its journal."""
    try:
        study = Study.read(run)
    except StageError as error:
        reason = str(error).partition(";")[0].removesuffix(".")
        raise StageError(f"{run}: {reason}; leave this --warm-start out.") from None
    if not study.settings:
        raise ConfigError(
            f"--warm-start {run}: there is no study in that folder; give a study's path, or its "
            "name below --storage."
        )
    attention = study.settings.get("attention")
    if attention != target.space.attention:
        raise ConfigError(
            f"--warm-start {run} searched {attention!r}; only a study of "
            f"{target.space.attention!r} has points for this one."
        )
    return study


def _points(study: Study, target: TargetStudy) -> Iterator[dict[str, Any] | None]:
    """Each finished trial with its values; None for one that lies outside the new space."""
    fixed = flatten(study.settings.get("overrides") or {})
    for trial in study.trials:
        if trial.status not in ("COMPLETE", "PRUNED"):
            continue
        values = trial.values_of(target.objectives)
        params = trial.params
        point = _map_into_space(target, {**fixed, **params}, set(params))
        if point is None or missing(values):
            yield None
        else:
            yield {"number": trial.number, "params": point, "values": list(values.values())}


def _map_into_space(
    target: TargetStudy, values: Mapping[str, Any], searched: set[str]
) -> dict[str, Any] | None:
    """The point of the new space with these values; None where there is none."""
    point = _point(target.space, values)
    if point is None:
        return None
    try:
        config = target.space.run_config(target.task, target.overrides, point)
    except ConfigError:
        return None
    resolved = flatten(to_dict(config))
    elsewhere = searched - point.keys()
    return point if all(resolved.get(name) == values[name] for name in elsewhere) else None


def _point(space: SearchSpace, values: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        point = space.suggest(FixedTrial(space.for_optuna(values)))
    except ValueError:  # a value is missing, or is none of the choices
        return None
    return point if all(space.holds(k, v) for k, v in point.items()) else None


def _note(
    name: str, settings: Mapping[str, Any], target: TargetStudy, kept: int, outside: int
) -> str:
    others = []
    if settings.get("task") != target.task:
        others.append(f"another task, {settings.get('task')}")
    elif settings.get("data_checksum") != target.data_checksum:
        others.append(f"other data, {settings.get('data')}")
    if settings.get("max_steps") != target.max_steps:
        others.append(f"another budget, {settings.get('max_steps')} steps")
    what = f" ({'; '.join(others)}: compared by rank)" if others else ""
    left = f"; {outside} lie outside this search space" if outside else ""
    return f"warm start from {kept} trials of {name}{what}{left}"


def check_kept(folder: Path, identity: Mapping[str, Any]) -> tuple[str, ...]:
    """Before a study is continued: what it took is there, unchanged. Returns its notes.

    Raises:
        StageError: it is missing or was edited.
    """
    path = folder / layout.WARM_START_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StageError(f"{path} cannot be read ({error.strerror}); start a new study.") from None
    if hashlib.sha256(text.encode()).hexdigest() != identity.get("sha256"):
        raise StageError(f"{path} was changed; put it back, or start a new study.")
    return tuple(json.loads(text)["notes"])


def read_prior(folder: Path, space: SearchSpace) -> tuple[ObservedTrial, ...]:
    """The trials that a study took, for its sampler; none where it has no warm start."""
    path = folder / layout.WARM_START_FILE
    if not path.is_file():
        return ()
    found = []
    for place, trial in enumerate(json.loads(path.read_text(encoding="utf-8"))["trials"]):
        fixed = FixedTrial(space.for_optuna(trial["params"]))
        space.suggest(fixed)
        found.append(
            ObservedTrial(
                params=fixed.params,
                distributions=fixed.distributions,
                state=TrialState.COMPLETE,
                values=tuple(trial["values"]),
                finish_order=place,
                group=trial["group"],
            )
        )
    return tuple(found)
