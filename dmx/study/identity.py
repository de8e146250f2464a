"""What makes two sessions one study, and the columns that TensorBoard shows of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx.data.store import Store
from dmx.search.space import Distribution, setting_of
from dmx.study.config import StudyConfig
from dmx.study.view import TensorBoardView
from dmx.tensorboard import Column, announce_study


def settings(
    config: StudyConfig, store: Store, warm_start: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What must be equal for a later session to continue the study: all that decides a trial.

    `num_trials` alone may change (see files.MAY_CHANGE): more trials may be asked for.
    """
    overrides = dict(config.overrides)
    more: dict[str, Any] = {}
    if len(config.objectives) > 1:
        more["objectives"] = list(config.objectives)
    if warm_start is not None:
        more["warm_start"] = dict(warm_start)
    return {
        "task": config.task,
        "attention": config.space.attention,
        "overrides": overrides,
        **config.space.plain(overrides),
        "num_trials": config.num_trials,
        "max_steps": config.max_steps,
        "grace_steps": config.grace_steps,
        "reduction_factor": config.reduction_factor,
        "scheduler": config.scheduler,
        "sampler": config.sampler,
        "seed": config.seed,
        "data": store.manifest.label,
        "data_checksum": store.manifest.checksum,
        **more,
    }


def announce(folder: Path, config: StudyConfig, store: Store) -> TensorBoardView:
    """Write the HParams columns, and return the view that writes the rows."""
    constants = {
        "attention": config.space.attention,
        "task": config.task,
        "data": store.manifest.label,
    }
    columns: dict[str, Column] = {}
    for label, dist in config.space.distributions().items():
        name, column = setting_of(label), _column(dist)
        columns[name] = columns[name].united(column) if name in columns else column
    announce_study(folder, {**columns, **{k: Column((v,)) for k, v in constants.items()}})
    return TensorBoardView(folder, constants, tuple(columns))


def _column(dist: Distribution) -> Column:
    if dist.kind == "choice":
        return Column(dist.values)
    return Column((), float(dist.values[0]), float(dist.values[1]))
