"""Going on from another member's checkpoint with settings of one's own (population training)."""

from __future__ import annotations

from dmx.training.checkpoint import Checkpoint
from dmx.training.trainer import Trainer

_OWN = ("initial_lr", "max_lr", "min_lr", "weight_decay")
"""What of the optimizer's state is a setting, not something learnt."""


def adopt(trainer: Trainer, source: Checkpoint, own: Checkpoint) -> None:
    """Take over weights, optimizer moments, step and random state of `source`.

    The settings are those of the trainer's config. A changed learning rate rescales the whole
    one-cycle schedule: start, peak and end are all multiples of it, so the rate at the step where
    the run goes on is multiplied by new / old, and follows the new curve from there.

    The best accuracy stays the run's own, so that it is that of the checkpoint in its folder.

    Args:
        trainer: fresh, built from the new config. own: the run's own last checkpoint.
    """
    fresh = [{k: group[k] for k in _OWN} for group in trainer.optimizer.param_groups]
    trainer.load(source)
    for group, settings in zip(trainer.optimizer.param_groups, fresh, strict=True):
        group["lr"] *= settings["max_lr"] / group["max_lr"]
        group.update(settings)
    trainer.schedule._last_lr = [group["lr"] for group in trainer.optimizer.param_groups]
    state = own.training_state()
    trainer.best_accuracy, trainer.best_step = state["best_accuracy"], state["best_step"]
    trainer.train_seconds = state["train_seconds"]
    trainer.stale_evaluations = 0
