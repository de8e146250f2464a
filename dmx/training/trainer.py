"""The training loop, plain PyTorch: train to the next evaluation, evaluate, resume exactly."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmx import __version__
from dmx.config import RunConfig
from dmx.data.batches import Batch, TrainBatches, TrainOrder
from dmx.data.store import Manifest, Store
from dmx.errors import CheckpointError, DataError, RunFailedError
from dmx.model import Classifier
from dmx.nn.device import (
    autocast,
    keep_freed_memory,
    peak_memory_mb,
    pick_device,
    precision_of,
    reset_peak_memory,
)
from dmx.nn.optim import build_optimizer
from dmx.registry import code_version
from dmx.runs import layout
from dmx.training.checkpoint import Checkpoint, load_weights, save_checkpoint
from dmx.training.passes import Evaluation, Interval, Passes
from dmx.training.process_group import SINGLE_PROCESS, ProcessGroup
from dmx.training.transfer import Weights, transfer

_FINITE_CHECK_STEPS = 50
"""Looking at the loss makes a GPU wait; once in so many steps is enough to catch NaN."""


class Diverged(RunFailedError):
    """The loss is no longer a number; training on would only waste the machine."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is not finite at step {step}")


def build_model(config: RunConfig) -> Classifier:
    """The model of a resolved config, freshly initialised from train.seed."""
    torch.manual_seed(config.train.seed)
    return Classifier(config.model, config.attention, paired=config.task_info.paired)


def resolve(config: RunConfig, manifest: Manifest) -> RunConfig:
    """The config with the sizes that the data decide.

    Raises:
        ConfigError: a size of the model is too small for them. DataError: they are of another
        length or kind than the task: nothing is cut or padded.
    """
    task, found = config.task_info, manifest.max_length
    length = config.model.max_length or task.max_length
    remedy, wrong = f"give the data of {task.name}", ""
    if manifest.paired != task.paired:
        kinds = {True: "pairs of sequences", False: "single sequences"}
        wrong = f"are {kinds[manifest.paired]}, but task {task.name} reads {kinds[task.paired]}"
    elif task.image_side is not None and found != task.max_length:
        wrong = f"have {found:,} pixels, but those of task {task.name} have {task.max_length:,}"
    elif found > length:
        wrong = f"have up to {found:,} tokens, but the model reads {length:,}"
        remedy = f"set model.max_length={found}"
    if wrong:
        raise DataError(f"data {manifest.label} {wrong}; {remedy}.")
    return config.resolved(
        vocab_size=max(task.vocab_size, manifest.vocab_size), num_classes=manifest.num_classes
    )


_COUNTERS = (
    *("step", "best_accuracy", "best_step", "stale_evaluations", "train_seconds"),
    "learning_rate",
)
_SETTINGS_OF_A_GROUP = ("initial_lr", "max_lr", "min_lr", "weight_decay")
"""What of the optimizer's state is a setting, not something learnt."""


class Trainer:
    """One run: model, optimizer, data order, and counters.

    Args:
        config: the experiment; open model sizes are filled in from the data.
        store: the prepared data.
        on_step: called after every optimizer step with (step, num_steps); for progress bars.
        group: the processes that train the run together; each has a Trainer of its own.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        *,
        on_step: Callable[[int, int], None] | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.config = config = resolve(config, store.manifest)
        self.store = store
        self.group = group
        self.device = pick_device(config.train.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = build_model(config).to(self.device)
        self.transferred: dict[str, Any] | None = None
        run = torch.compile(self.model) if config.train.compile else self.model
        self.optimizer, self.schedule = build_optimizer(
            self.model.parameters(), config.optim, config.train.num_steps
        )
        assert config.model.max_length
        self.length = config.model.max_length
        train = store.split("train")
        order = TrainOrder(
            train.lengths, config.train.batch_size, config.data.seed, config.data.order
        )
        self.batches = TrainBatches(train, order, self.length, self.device, group.share)
        self.passes = Passes(self.model, run, config.train, self.device, group)
        self.on_step = on_step
        self.step = 0
        self.best_accuracy = -math.inf
        self.best_step = 0
        self.stale_evaluations = 0
        self.train_seconds = 0.0
        self.learning_rate = 0.0
        self.metrics: dict[str, Any] = {}
        self.interval: Interval | None = None
        """What was done since the last evaluation; None right after it."""

    # -- training ---------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """True when the schedule has ended or patience has run out."""
        if self.interval is not None:
            return False
        patience = self.config.train.patience
        worn_out = patience is not None and self.stale_evaluations >= patience
        return self.step >= self.config.train.num_steps or worn_out

    def advance(self, until: float = math.inf) -> dict[str, Any] | None:
        """Train to the next evaluation, evaluate the whole dev split, and return flat metrics.

        None at a pause: once `until`, a moment of time.monotonic(), has passed in any process of
        the run, after at least one more step or batch. The next call goes on there.

        Raises:
            Diverged: the loss became NaN or infinite; the model is of no use any more.
            RunFailedError: not even one sequence at a time fits the memory.
            PeerLost: another process of the run is gone.
        """
        assert not self.finished
        every = self.config.train.eval_every_steps
        if self.interval is None:
            self.interval = Interval(self.step, self.device)
            reset_peak_memory(self.device)
        interval = self.interval
        first = interval.first
        target = min((first // every + 1) * every, self.config.train.num_steps)
        dev = None
        if self.step == target or self._train_to(target, interval, until):
            split = self.store.split("dev")
            dev = self.passes.evaluate(split, self.length, interval, until)
        if dev is None:
            interval.gather(self.group)
            return None
        losses, hits, tokens = self.group.total(interval.sums[:3]).tolist()
        steps, seconds = self.step - first, interval.seconds
        self.train_seconds += seconds
        self.interval = None
        if not math.isfinite(dev.loss):  # the last step of all can still break the weights
            raise Diverged(self.step)
        improved = dev.accuracy > self.best_accuracy
        if improved:
            self.best_accuracy, self.best_step = dev.accuracy, self.step
        self.stale_evaluations = 0 if improved else self.stale_evaluations + 1
        self.passes.agree()
        batch_size = self.config.train.batch_size
        speed = steps * batch_size / seconds
        self.metrics = {
            layout.STEPS: self.step,
            layout.SAMPLES: self.step * batch_size,
            layout.TRAIN_LOSS: losses / steps,
            layout.TRAIN_ACCURACY: hits / (steps * batch_size),
            layout.DEV_LOSS: dev.loss,
            layout.DEV_ACCURACY: dev.accuracy,
            layout.BEST_DEV_ACCURACY: self.best_accuracy,
            layout.BEST_STEP: self.best_step,
            layout.LEARNING_RATE: self.learning_rate,
            layout.GRADIENT_NORM: interval.norm,
            layout.TRAIN_SECONDS: self.train_seconds,
            layout.STEP_SECONDS: seconds / steps,
            layout.SAMPLES_PER_SECOND: speed,
            layout.SAMPLES_PER_SECOND_PER_WORKER: speed / self.group.size,
            layout.TOKENS_PER_SECOND: int(tokens) / seconds,
            layout.PEAK_MEMORY_MB: self.group.largest(peak_memory_mb(self.device)),
            layout.MICRO_BATCH_SIZE: self.passes.micro.size,
            layout.NUM_WORKERS: self.group.size,
            layout.PARAMETERS: sum(p.numel() for p in self.model.parameters()),
        }
        return dict(self.metrics)

    def _train_to(self, target: int, interval: Interval, until: float) -> bool:
        """Steps up to `target`; False at a pause, when `until` has passed, even at the target."""
        self.model.train()
        sums, norm = interval.sums, torch.zeros((), device=self.device)
        started, late = time.perf_counter(), False
        while self.step < target and not late:
            late = time.monotonic() >= until
            batch = self.batches(self.step)
            loss, hits, norm, late = self._optimizer_step(batch, late)
            sums[0] += loss
            sums[1] += hits
            sums[2] += torch.count_nonzero(batch.input_ids)
            self.step += 1
            if self.on_step is not None:
                self.on_step(self.step, self.config.train.num_steps)
            look = self.step % _FINITE_CHECK_STEPS == 0 or self.step == target
            if look and not math.isfinite(self.group.total(sums[0]).item()):
                raise Diverged(self.step)
        interval.norm = norm.item()
        interval.seconds += time.perf_counter() - started
        return not late

    def _optimizer_step(
        self, batch: Batch, late: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        """One step on this process's share of a batch: its part of the mean loss, its hits, the
        norm of the whole gradient, and whether any process is late.
        """
        self.group.seed(self.config.train.seed, self.step)
        self.model.at_step(self.step, self.config.train.seed)
        loss_sum, correct = self.passes.backward(batch)
        late = self.group.add_gradients(self.model.parameters(), late)
        limit = self.config.train.clip_gradient_norm
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), math.inf if limit is None else limit
        )
        self.learning_rate = float(self.schedule.get_last_lr()[0])  # of this step
        self.optimizer.step()
        self.schedule.step()
        return loss_sum, correct, norm.detach(), late

    def train_step(self, batch: Batch) -> None:
        """For measuring: on a given batch, outside of the run's own order."""
        self.model.train()
        self._optimizer_step(batch)

    def evaluate(self, split: str) -> Evaluation:
        """Loss and accuracy over the whole split, the ragged last batch included."""
        found = self.passes.evaluate(self.store.split(split), self.length)
        assert found is not None  # it had all the time it wanted
        return found

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
        schedule = self.schedule.state_dict()
        on_cuda = self.device.type == "cuda"
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in schedule.items() if not k.startswith("_anneal")},
            **{name: getattr(self, name) for name in _COUNTERS},
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": [torch.cuda.get_rng_state(self.device)] if on_cuda else [],
            "micro_batch_limit": self.passes.micro.limit,
            "eval_batch_limit": self.passes.evaluation.limit,
            "interval": None if self.interval is None else self.interval.state(),
        }

    def provenance(self) -> dict[str, Any]:
        """What the metrics were measured on and with; stands beside them in metrics.json."""
        manifest, labels = self.store.manifest, self.store.split("dev").labels
        return {
            "data": manifest.label,
            "is_sample": manifest.is_sample,
            "data_checksum": manifest.checksum,
            "task": self.config.task,
            layout.NUM_DEV: len(labels),
            layout.DEV_MAJORITY: float(np.bincount(labels).max() / len(labels)),
            **({"transferred": self.transferred} if self.transferred else {}),
            "environment": {
                "dmx": __version__,
                "code": code_version(),
                "torch": torch.__version__,
                "device": self.device.type,
                "precision": precision_of(self.device, self.config.train.precision),
                "threads": torch.get_num_threads(),
            },
        }

    def save(
        self,
        folder: Path,
        notes: Mapping[str, str] | None = None,
        before_replacing: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a checkpoint directory, atomically; see save_checkpoint."""
        save_checkpoint(
            folder,
            model_state=self.model.state_dict(),
            training_state=self.state(),
            config=self.config,
            metrics={**self.provenance(), **self.metrics},
            notes=notes,
            before_replacing=before_replacing,
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue where the checkpoint stopped, bit for bit on a CPU.

        Raises:
            CheckpointError: it belongs to another experiment, or is damaged.
        """
        self.load_weights(checkpoint)
        self.load_state(checkpoint.training_state(), str(checkpoint.folder))
        self.metrics = {k: v for k, v in checkpoint.metrics.items() if k in layout.REPORT_KEYS}
        self.transferred = checkpoint.metrics.get("transferred")

    def load_state(self, state: Mapping[str, Any], source: str) -> None:
        """Take all but the weights from what `state` gave; an error names `source`."""
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            for name in _COUNTERS:
                setattr(self, name, state[name])
            self.passes.micro.limit = state["micro_batch_limit"]
            self.passes.evaluation.limit = state["eval_batch_limit"]
            interval = state["interval"]
            self.interval = (
                None if interval is None else Interval.restored(interval, self.device, self.group)
            )
            torch.set_rng_state(state["rng_cpu"])
            if self.device.type == "cuda" and state["rng_cuda"]:
                torch.cuda.set_rng_state(state["rng_cuda"][0], self.device)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{source} does not continue this run: {type(error).__name__} {error}."
            ) from None

    def follow_main(self) -> None:
        """Bring every process of the run to the weights and the state of the main one.

        They travel from process to process: a shared file system may show an old checkpoint to
        another node.
        """
        group = self.group
        if group.size == 1:
            return
        content = io.BytesIO()
        if group.is_main:
            torch.save({**self.state(), "metrics": self.metrics}, content)
        group.broadcast(self.model.state_dict().values())
        content = io.BytesIO(group.broadcast_object(content.getvalue()))
        state = torch.load(content, map_location="cpu", weights_only=True)
        self.metrics = state.pop("metrics")
        if not group.is_main:
            self.load_state(state, "the main process's state")

    def adopt(self, source: Checkpoint, own: Checkpoint) -> None:
        """Take over another run's weights, optimizer moments, step and random state (PBT).

        The settings stay those of this trainer's config. A changed learning rate rescales the whole
        one-cycle schedule: start, peak and end are all multiples of it, so the rate at the step
        where the run goes on is multiplied by new / old, and follows the new curve from there.
        The best accuracy stays the run's own, that of the checkpoint in its folder.

        Args:
            source: of the other run. own: this run's own last checkpoint.
        """
        fresh = [{k: g[k] for k in _SETTINGS_OF_A_GROUP} for g in self.optimizer.param_groups]
        self.load(source)
        for group, settings in zip(self.optimizer.param_groups, fresh, strict=True):
            group["lr"] *= settings["max_lr"] / group["max_lr"]
            group.update(settings)
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        state = own.training_state()
        self.best_accuracy, self.best_step = state["best_accuracy"], state["best_step"]
        self.train_seconds = state["train_seconds"]
        self.stale_evaluations = 0

    def start_from(
        self, source: Weights, reinit: Iterable[str] = (), *, whole: bool = False
    ) -> None:
        """Start the fresh model from other weights (see transfer); metrics.json says what moved."""
        moved = transfer(self.model, source, self.config.task_info, reinit, whole=whole)
        self.transferred = dataclasses.asdict(moved)

    def load_weights(self, checkpoint: Checkpoint) -> None:
        load_weights(self.model, checkpoint.model_state(), str(checkpoint.folder))

    def close(self) -> None:
        self.batches.close()
