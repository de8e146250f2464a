"""What a trainer's next step depends on beside the weights: taken out, and put back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dmx.errors import CheckpointError
from dmx.training.interval import Interval

if TYPE_CHECKING:
    from dmx.training.trainer import Trainer


def capture(trainer: Trainer) -> dict[str, Any]:
    """All of it, as tensors and plain values, so that it is read without unpickling objects."""
    on_cuda = trainer.device.type == "cuda"
    schedule = trainer.schedule.state_dict()
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": {k: v for k, v in schedule.items() if not k.startswith("_anneal")},
        "step": trainer.step,
        "best_accuracy": trainer.best_accuracy,
        "best_step": trainer.best_step,
        "stale_evaluations": trainer.stale_evaluations,
        "train_seconds": trainer.train_seconds,
        "rng_cpu": torch.get_rng_state(),
        "rng_cuda": [torch.cuda.get_rng_state(trainer.device)] if on_cuda else [],
        "micro_batch_limit": trainer.passes.micro.limit,
        "eval_batch_limit": trainer.passes.evaluation.limit,
        "learning_rate": trainer.learning_rate,
        "interval": None if trainer.interval is None else trainer.interval.state(),
    }


def restore(trainer: Trainer, state: Mapping[str, Any], source: str) -> None:
    """Put back what `capture` gave.

    Raises:
        CheckpointError: it belongs to another experiment; names `source`.
    """
    try:
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.schedule.load_state_dict(state["schedule"])
        trainer.step = state["step"]
        trainer.best_accuracy, trainer.best_step = state["best_accuracy"], state["best_step"]
        trainer.stale_evaluations = state["stale_evaluations"]
        trainer.train_seconds = state["train_seconds"]
        trainer.passes.micro.limit = state.get("micro_batch_limit")
        trainer.passes.evaluation.limit = state.get("eval_batch_limit")
        trainer.learning_rate = state.get("learning_rate", trainer.learning_rate)
        interval = state.get("interval")
        trainer.interval = (
            None if interval is None else Interval.restored(interval, trainer.device, trainer.ranks)
        )
        torch.set_rng_state(state["rng_cpu"])
        if trainer.device.type == "cuda" and state["rng_cuda"]:
            torch.cuda.set_rng_state(state["rng_cuda"][0], trainer.device)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{source} does not continue this run: {type(error).__name__} {error}."
        ) from None


def follow_leader(trainer: Trainer) -> None:
    """Bring every process of the run to the leader's weights and state.

    They travel from process to process: a shared file system may show an old checkpoint to
    another node.
    """
    ranks = trainer.ranks
    if ranks.size == 1:
        return
    content = io.BytesIO()
    if ranks.leads:
        torch.save({**capture(trainer), "metrics": trainer.metrics}, content)
    ranks.copy_leader(trainer.model.state_dict().values())
    content = io.BytesIO(ranks.from_leader(content.getvalue()))
    state = torch.load(content, map_location="cpu", weights_only=True)
    trainer.metrics = state.pop("metrics")
    if not ranks.leads:
        restore(trainer, state, "the leader's state")
