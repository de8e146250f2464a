"""Warm start: finished trials of earlier studies, which a new study's sampler knows from the start.

They are no trials of the new study: they are neither counted, nor numbered, nor shown. What was
taken is kept in the study's folder, so that a restart needs no other folder and sees no change.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from optuna.distributions import BaseDistribution
from optuna.trial import FixedTrial

from dmx.errors import ConfigError, StageError
from dmx.runs import layout
from dmx.runs.events import settings_of
from dmx.runs.study import Study
from dmx.runs.trial import missing
from dmx.schema import flatten, local_path, to_dict
from dmx.search.space import SearchSpace

if TYPE_CHECKING:
    from dmx.study.study import StudyConfig


class PriorTrial(NamedTuple):
    """A finished trial of an earlier study, as a sampler sees it.

    Attributes:
        params, distributions: by Optuna's names in the new space. values: one per objective.
        group: "" where values compare with the new study's; else the study they belong to.
    """

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    values: tuple[float, ...]
    group: str = ""


def rescaled(prior: Sequence[PriorTrial], own: Sequence[Sequence[float]]) -> list[PriorTrial]:
    """Earlier trials with values that compare with this study's `own`.

    Another task or budget has another range of accuracies: its best trial may be worse than our
    worst. So a trial at the q-th quantile of its own study gets the q-th quantile of this study's
    values (after Salinas et al. 2020, arXiv 1909.13595), as soon as there are three of these.
    """
    if len(own) < 3:
        return list(prior)
    columns = [sorted(column) for column in zip(*own, strict=True)]
    return [
        past._replace(values=tuple(map(_quantile, columns, ranked.values))) if past.group else past
        for past, ranked in zip(prior, as_quantiles(prior), strict=True)
    ]


def as_quantiles(prior: Sequence[PriorTrial]) -> list[PriorTrial]:
    """With each value the share of the other trials of its study that lie below it."""
    groups: dict[str, list[tuple[float, ...]]] = {}
    for past in prior:
        groups.setdefault(past.group, []).append(past.values)
    columns = {g: [sorted(c) for c in zip(*v, strict=True)] for g, v in groups.items()}
    return [p._replace(values=tuple(map(_share, columns[p.group], p.values))) for p in prior]


def _share(column: list[float], value: float) -> float:
    both = bisect.bisect_left(column, value) + bisect.bisect_right(column, value)
    return (both - 1) / 2 / max(len(column) - 1, 1)


def _quantile(column: list[float], share: float) -> float:
    """Linear between order statistics."""
    place = share * (len(column) - 1)
    low = int(place)
    high = min(low + 1, len(column) - 1)
    return column[low] + (place - low) * (column[high] - column[low])


# -- before a study begins ----------------------------------------------------------------------


def prepare(
    runs: Sequence[str],
    storage: Path,
    config: StudyConfig,
    data_checksum: str,
    folder: Path,
    *,
    known: Mapping[str, Any] | None,
    resume: bool,
) -> tuple[dict[str, Any] | None, dict[str, str], tuple[str, ...]]:
    """What `--warm-start` takes: its identity or None, the files to keep of it, and notes.

    Args:
        runs: as they were given: paths, or names below `storage`.
        folder: of the study. known: the identity of what it took, when it is continued.

    Raises:
        ConfigError, StageError: see collect; or what was kept is missing, or was edited.
    """
    names = [local_path("--warm-start", run).absolute().name for run in runs]
    if resume:  # the earlier studies may be gone, or have grown
        if known is None or known.get("runs") != names:
            return ({"runs": names} if names else None), {}, ()
        text = _kept(folder / layout.WARM_START_FILE, known)
    elif runs:
        paths = [Path(run) if Path(run).is_dir() else storage / run for run in runs]
        text = collect([p.absolute() for p in paths], config, data_checksum)
    else:
        return None, {}, ()
    identity = {"runs": names, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    files = {} if resume else {layout.WARM_START_FILE: text}
    return identity, files, tuple(json.loads(text)["notes"])


def _kept(path: Path, identity: Mapping[str, Any]) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StageError(f"{path} cannot be read ({error.strerror}); start a new study.") from None
    if hashlib.sha256(text.encode()).hexdigest() != identity.get("sha256"):
        raise StageError(f"{path} was changed; put it back, or start a new study.")
    return text


def collect(runs: Sequence[Path], config: StudyConfig, data_checksum: str) -> str:
    """Of earlier studies the points that the new study could propose, as WARM_START_FILE has them.

    Raises:
        ConfigError: a folder holds no study, or one of another attention; the sampler cannot use
            them; or no point fits.
        StageError: one of them is damaged.
    """
    if config.sampler == "random":
        raise ConfigError("--warm-start is of no use to --sampler random; use tpe, gp or cmaes.")
    trials: list[dict[str, Any]] = []
    notes = []
    for run in runs:
        study = _read(run, config.space.attention)
        others = _differences(study.settings, config, data_checksum)
        if others and config.sampler == "nsga2":
            raise ConfigError(
                f"--warm-start {run.name} has another task, data or budget, and nsga2 compares "
                "values as they are; use --sampler tpe or gp."
            )
        found = list(_points(study, config))
        kept = [{**point, "group": run.name if others else ""} for point in found if point]
        trials.extend(kept)
        what = f" ({'; '.join(others)}: compared by rank)" if others else ""
        outside = len(found) - len(kept)
        left = f"; {outside} lie outside this search space" if outside else ""
        notes.append(f"warm start from {len(kept)} trials of {run.name}{what}{left}")
    names = [run.name for run in runs]
    if not trials:
        raise ConfigError(
            f"--warm-start: no finished trial of {', '.join(names)} lies in this search space; "
            "leave it out."
        )
    return json.dumps({"runs": names, "notes": notes, "trials": trials}, indent=1) + "\n"


def _read(run: Path, attention: str) -> Study:
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
    found = study.settings.get("attention")
    if found != attention:
        raise ConfigError(
            f"--warm-start {run} searched {found!r}; only a study of {attention!r} has points for "
            "this one."
        )
    return study


def _differences(settings: Mapping[str, Any], config: StudyConfig, data_checksum: str) -> list[str]:
    """Why values of the earlier study do not compare with the new one's."""
    found = []
    if settings.get("task") != config.task:
        found.append(f"another task, {settings.get('task')}")
    elif settings.get("data_checksum") != data_checksum:
        found.append(f"other data, {settings.get('data')}")
    if settings.get("max_steps") != config.max_steps:
        found.append(f"another budget, {settings.get('max_steps')} steps")
    return found


def _points(study: Study, config: StudyConfig) -> Iterator[dict[str, Any] | None]:
    """Each finished trial with its values; None for one that lies outside the new space."""
    fixed = flatten(study.settings.get("overrides") or {})
    for trial in study.trials:
        if trial.status not in ("COMPLETE", "PRUNED"):
            continue
        values = trial.values_of(config.objectives)
        point = _point(config, {**fixed, **trial.params}, searched=trial.params.keys())
        if point is None or missing(values):
            yield None
        else:
            yield {"number": trial.number, "params": point, "values": list(values.values())}


def _point(
    config: StudyConfig, values: Mapping[str, Any], searched: Collection[str]
) -> dict[str, Any] | None:
    """The point of the new space with these values; None where there is none."""
    labelled = config.space.point_from(config.space.for_optuna(values))
    if labelled is None:
        return None
    point = settings_of(labelled)
    try:
        run = config.space.run_config(config.task, config.overrides, point)
    except ConfigError:
        return None
    resolved = flatten(to_dict(run))
    elsewhere = set(searched) - point.keys()
    return point if all(resolved.get(name) == values[name] for name in elsewhere) else None


# -- while it runs ------------------------------------------------------------------------------


def read_prior(folder: Path, space: SearchSpace) -> tuple[PriorTrial, ...]:
    """The trials that a study took, for its sampler; none where it has no warm start."""
    path = folder / layout.WARM_START_FILE
    if not path.is_file():
        return ()
    found = []
    for trial in json.loads(path.read_text(encoding="utf-8"))["trials"]:
        fixed = FixedTrial(space.for_optuna(trial["params"]))
        space.suggest(fixed)
        values, group = tuple(trial["values"]), trial["group"]
        found.append(PriorTrial(fixed.params, fixed.distributions, values, group))
    return tuple(found)
