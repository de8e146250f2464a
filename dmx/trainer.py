"""The training loop, plain PyTorch: train to the next evaluation, evaluate, resume exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dmx import records as keys
from dmx.checkpoint import Checkpoint, save_checkpoint, write_files
from dmx.config import RunConfig
from dmx.data.batches import Batch, TrainBatches, TrainOrder, eval_batches
from dmx.data.store import Store
from dmx.device import autocast, peak_memory_mb, pick_device
from dmx.errors import CheckpointError
from dmx.model import Classifier
from dmx.optim import build_optimizer

_FINITE_CHECK_STEPS = 50
"""Looking at the loss makes a GPU wait; once in so many steps is enough to catch NaN."""


class Diverged(Exception):
    """The loss is no longer a number; training on would only waste the machine."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is not finite at step {step}")
        self.step = step


_CPU_EVAL_BATCH = 32
"""Small training batches need not make the evaluation slow: without gradients memory is cheap."""


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy (0..1) over every example of a split."""

    loss: float
    accuracy: float
    num_examples: int


def build_model(config: RunConfig) -> Classifier:
    """The model of a resolved config, freshly initialised from train.seed."""
    torch.manual_seed(config.train.seed)
    return Classifier(config.model, config.attention, paired=config.task_info.paired)


class Trainer:
    """One run: model, optimizer, data order, and counters.

    Args:
        config: the experiment; open model sizes are filled in from the data.
        store: the prepared data.
        on_step: called after every optimizer step with (step, num_steps); for progress bars.
        before_training: called once with the fresh model, to start it from other weights.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        *,
        on_step: Callable[[int, int], None] | None = None,
        before_training: Callable[[Classifier], None] | None = None,
    ) -> None:
        manifest = store.manifest
        self.config = config = config.resolved(
            vocab_size=max(config.task_info.vocab_size, manifest.vocab_size),
            num_classes=manifest.num_classes,
        )
        self.store = store
        self.device = pick_device(config.train.device)
        self.model = build_model(config).to(self.device)
        if before_training is not None:
            before_training(self.model)
        self._run = torch.compile(self.model) if config.train.compile else self.model
        self.optimizer, self.schedule = build_optimizer(
            self.model.parameters(), config.optim, config.train.num_steps
        )
        assert config.model.max_length
        self.length = config.model.max_length
        train = store.split("train")
        order = TrainOrder(
            train.lengths, config.train.batch_size, config.data.seed, config.data.order
        )
        self.batches = TrainBatches(train, order, self.length, self.device)
        self.on_step = on_step
        self.step = 0
        self.best_accuracy = -math.inf
        self.best_step = 0
        self.stale_evaluations = 0
        self.train_seconds = 0.0
        self.learning_rate = 0.0
        self.metrics: dict[str, Any] = {}

    # -- training ---------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """True when the schedule has ended or patience has run out."""
        patience = self.config.train.patience
        worn_out = patience is not None and self.stale_evaluations >= patience
        return self.step >= self.config.train.num_steps or worn_out

    def advance(self) -> dict[str, Any]:
        """Train to the next evaluation, evaluate the whole dev split, and return flat metrics.

        Raises:
            Diverged: the loss became NaN or infinite; the model is of no use any more.
        """
        assert not self.finished
        every = self.config.train.eval_every_steps
        target = min((self.step // every + 1) * every, self.config.train.num_steps)
        first, started = self.step, time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        loss, accuracy, norm, tokens = self._train_to(target)
        seconds = time.perf_counter() - started
        self.train_seconds += seconds
        dev = self.evaluate("dev")
        if not math.isfinite(dev.loss):  # the last step of all can still break the weights
            raise Diverged(self.step)
        improved = dev.accuracy > self.best_accuracy
        if improved:
            self.best_accuracy, self.best_step = dev.accuracy, self.step
        self.stale_evaluations = 0 if improved else self.stale_evaluations + 1
        batch_size = self.config.train.batch_size
        self.metrics = {
            keys.STEPS: self.step,
            keys.SAMPLES: self.step * batch_size,
            keys.TRAIN_LOSS: loss,
            keys.TRAIN_ACCURACY: accuracy,
            keys.DEV_LOSS: dev.loss,
            keys.DEV_ACCURACY: dev.accuracy,
            keys.BEST_DEV_ACCURACY: self.best_accuracy,
            keys.BEST_STEP: self.best_step,
            keys.LEARNING_RATE: self.learning_rate,
            keys.GRADIENT_NORM: norm,
            keys.TRAIN_SECONDS: self.train_seconds,
            keys.STEP_SECONDS: seconds / (self.step - first),
            keys.SAMPLES_PER_SECOND: (self.step - first) * batch_size / seconds,
            keys.TOKENS_PER_SECOND: tokens / seconds,
            keys.PEAK_MEMORY_MB: peak_memory_mb(self.device),
            keys.PARAMETERS: sum(p.numel() for p in self.model.parameters()),
        }
        return dict(self.metrics)

    def _train_to(self, target: int) -> tuple[float, float, float, int]:
        """Steps up to `target`; (mean loss, accuracy, last gradient norm, real tokens)."""
        self.model.train()
        first = self.step
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        correct = torch.zeros((), device=self.device, dtype=torch.int64)
        tokens = torch.zeros((), device=self.device, dtype=torch.int64)
        norm = torch.zeros((), device=self.device)
        while self.step < target:
            batch = self.batches(self.step)
            loss, hits, norm = self._optimizer_step(batch)
            loss_sum += loss
            correct += hits
            tokens += torch.count_nonzero(batch.input_ids)
            self.step += 1
            if self.on_step is not None:
                self.on_step(self.step, self.config.train.num_steps)
            look = self.step % _FINITE_CHECK_STEPS == 0 or self.step == target
            if look and not math.isfinite(loss_sum.item()):
                raise Diverged(self.step)
        count = target - first
        accuracy = correct.item() / (count * self.config.train.batch_size)
        return loss_sum.item() / count, accuracy, norm.item(), int(tokens.item())

    def _optimizer_step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        size = self.config.train.micro_batch_size or self.config.train.batch_size
        parts = self.config.train.batch_size // size
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        correct = torch.zeros((), device=self.device, dtype=torch.int64)
        for chunk in batch.chunks(size):
            logits = self._logits(chunk)
            loss = F.cross_entropy(logits, chunk.labels) / parts
            loss.backward()
            loss_sum += loss.detach().double()
            correct += (logits.argmax(-1) == chunk.labels).sum()
        limit = self.config.train.clip_gradient_norm
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), math.inf if limit is None else limit
        )
        self.learning_rate = float(self.schedule.get_last_lr()[0])  # of this step
        self.optimizer.step()
        self.schedule.step()
        return loss_sum, correct, norm.detach()

    def train_step(self, batch: Batch) -> None:
        """One optimizer step on a given batch, outside of the run's own order; for measuring."""
        self.model.train()
        self._optimizer_step(batch)

    def _logits(self, batch: Batch) -> torch.Tensor:
        with autocast(self.device, self.config.train.precision):
            logits = self._run(batch.input_ids, batch.input_ids_1)
        return logits.float()

    # -- evaluation -------------------------------------------------------------------------

    @property
    def eval_batch_size(self) -> int:
        """Sequences per pass of an evaluation."""
        train = self.config.train
        if train.eval_batch_size is not None:
            return train.eval_batch_size
        size = train.micro_batch_size or train.batch_size
        return max(size, _CPU_EVAL_BATCH) if self.device.type == "cpu" else size

    @torch.no_grad()
    def evaluate(self, split: str) -> Evaluation:
        """Loss and accuracy over the whole split, the ragged last batch included."""
        self.model.eval()
        data = self.store.split(split)
        size = self.eval_batch_size
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        correct = torch.zeros((), device=self.device, dtype=torch.int64)
        for batch in eval_batches(data, size, self.length, self.device):
            logits = self._logits(batch)
            loss += F.cross_entropy(logits, batch.labels, reduction="sum").double()
            correct += (logits.argmax(-1) == batch.labels).sum()
        count = len(data)
        return Evaluation(loss.item() / count, correct.item() / count, count)

    @torch.no_grad()
    def probabilities(self, batch: Batch) -> torch.Tensor:
        """Class probabilities [B, C] of a batch on the device; leaves the model in eval mode."""
        self.model.eval()
        with autocast(self.device, self.config.train.precision):  # uncompiled: an odd batch size
            logits = self.model(batch.input_ids, batch.input_ids_1)
        return torch.softmax(logits.float(), dim=-1)

    # -- state ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything beside the weights that the next step depends on; tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": {
                k: v for k, v in self.schedule.state_dict().items() if not k.startswith("_anneal")
            },
            "step": self.step,
            "best_accuracy": self.best_accuracy,
            "best_step": self.best_step,
            "stale_evaluations": self.stale_evaluations,
            "train_seconds": self.train_seconds,
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def provenance(self) -> dict[str, Any]:
        """What the metrics were measured on; stands beside them in metrics.json."""
        manifest = self.store.manifest
        return {"data": manifest.label, "is_sample": manifest.is_sample, "task": self.config.task}

    def save(self, folder: Path, notes: Mapping[str, str] | None = None) -> None:
        """Write a checkpoint directory, atomically; `notes` are further text files in it."""
        save_checkpoint(folder, **self._checkpoint_parts(), notes=notes)

    def save_into(self, folder: Path) -> None:
        """Write the checkpoint's files into an existing folder whose atomicity is another's job."""
        parts = self._checkpoint_parts()
        write_files(
            folder, parts["model_state"], parts["training_state"], parts["config"], parts["metrics"]
        )

    def _checkpoint_parts(self) -> dict[str, Any]:
        return {
            "model_state": self.model.state_dict(),
            "training_state": self.state(),
            "config": self.config,
            "metrics": {**self.provenance(), **self.metrics},
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue where the checkpoint stopped, bit for bit on a CPU.

        Raises:
            CheckpointError: it belongs to another experiment, or is damaged.
        """
        self.load_weights(checkpoint)
        state = checkpoint.training_state()
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.step = state["step"]
            self.best_accuracy, self.best_step = state["best_accuracy"], state["best_step"]
            self.stale_evaluations = state["stale_evaluations"]
            self.train_seconds = state["train_seconds"]
            torch.set_rng_state(state["rng_cpu"])
            if self.device.type == "cuda" and state["rng_cuda"]:
                torch.cuda.set_rng_state_all(state["rng_cuda"])
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{checkpoint.folder} does not continue this run: {type(error).__name__} {error}."
            ) from None
        self.metrics = _metrics_only(checkpoint.metrics)

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Take the weights only (for evaluation)."""
        from dmx.reference import adopt

        adopt(self.model, checkpoint.model_state(), str(checkpoint.folder))

    def close(self) -> None:
        """Release the reading thread."""
        self.batches.close()


def _metrics_only(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in ("data", "is_sample", "task")}
