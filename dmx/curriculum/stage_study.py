"""A stage that is a search, as a study whose trials start from the parent's best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmx.curriculum.planner import Launch
from dmx.study.config import StudyConfig

_GRACE_SHARE = 8


def stage_study(
    launch: Launch, *, cpus: float, gpus: float, workers: int, init: Mapping[str, Any] | None
) -> StudyConfig:
    """The study of one attempt; a retry draws other points, a longer one trains them longer.

    Args:
        init: the weights that every trial starts from (InitConfig as a plain dict).
    """
    stage, config = launch.stage, launch.config
    assert stage.search is not None and stage.space is not None
    steps = config.train.num_steps
    evaluation = config.train.eval_every_steps
    grace = stage.search.grace_steps or max(evaluation, steps // _GRACE_SHARE)
    changed = {
        "train.num_steps": steps,
        "train.seed": config.train.seed,
        "data.seed": config.data.seed,
        **({f"init.{key}": value for key, value in init.items()} if init else {}),
    }
    return StudyConfig(
        name=stage.name,
        task=stage.task,
        space=stage.space,
        overrides={**stage.overrides, **changed},
        num_trials=stage.search.num_trials,
        max_steps=steps,
        grace_steps=min(grace, steps),
        reduction_factor=stage.search.reduction_factor,
        scheduler=stage.search.scheduler,
        sampler=stage.search.sampler,
        seed=stage.search.seed + launch.retry,
        cpus_per_trial=cpus,
        gpus_per_trial=gpus,
        workers_per_trial=workers,
    )
