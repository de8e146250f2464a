"""RunConfig: one whole experiment as a frozen value, built from presets, YAML and overrides."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import yaml

from dmx.attention import AttentionConfig
from dmx.attention.butterfly import ButterflyConfig
from dmx.errors import ConfigError
from dmx.model import ModelConfig
from dmx.nn.optim import OptimConfig
from dmx.schema import (
    UnknownSettingError,
    check_range,
    expand,
    flatten,
    from_dict,
    merge,
    set_dotted,
    to_dict,
)
from dmx.tasks import Task, task_for


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data come from and in which order.

    Attributes:
        root: the data root; None lets the caller decide (the default root, or sample data).
        seed: of the training order (`seed_data` of the reference).
        order: `shuffled`: a seeded permutation an epoch; `bucketed`: the same, but batches hold
            sequences of similar length; `reference`: the reference's own chain of shuffles.
    """

    root: str | None = None
    seed: int = 123
    order: Literal["shuffled", "bucketed", "reference"] = "shuffled"

    def __post_init__(self) -> None:
        if self.root is not None:
            object.__setattr__(self, "root", expand("root", self.root))
        check_range(self, "seed", least=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop.

    Attributes:
        batch_size: sequences per optimizer step. micro_batch_size: sequences per forward pass,
            a divisor of batch_size (gradient accumulation); None takes batch_size.
        num_steps: optimizer steps of the whole schedule. eval_every_steps: steps between
            evaluations of the whole dev split.
        seed: of weights and dropout (`seed_model` of the reference).
        precision: `auto` is bf16 autocast on a GPU from compute capability 8.0 (A100, RTX 30) on
            and fp32 elsewhere.
        device: `auto` is CUDA where there is a GPU, else the CPU.
        clip_gradient_norm: None does not clip, as the reference.
        patience: stop after so many evaluations without a better dev accuracy; None never does.
        eval_batch_size: None takes the micro batch's size, on a CPU at least 32, on CUDA 8 times it
            where no example depends on the others of its batch.
        compile: torch.compile the model (CUDA).
    """

    batch_size: int = 32
    micro_batch_size: int | None = None
    eval_batch_size: int | None = None
    num_steps: int = 5000
    eval_every_steps: int = 500
    seed: int = 2023
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    clip_gradient_norm: float | None = None
    patience: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "micro_batch_size", "eval_batch_size", least=1)
        check_range(self, "num_steps", "eval_every_steps", "patience", least=1)
        check_range(self, "clip_gradient_norm", above=0)
        check_range(self, "seed", least=0, below=2**63)  # torch's generators take no larger one
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"micro_batch_size is {self.micro_batch_size}; it must divide batch_size "
                f"{self.batch_size}."
            )


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Weights of another run that this one starts from.

    Attributes:
        path: a checkpoint folder or a reference `*_output.model`. sha256: of its weights' file;
            None is filled in at the start, another than the file's is refused.
        reinit: parameters that may keep fresh values (see transfer.transfer).
    """

    path: str
    sha256: str | None = None
    reinit: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", expand("path", self.path))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a result; `config.yaml` beside each checkpoint holds one."""

    task: str
    attention: AttentionConfig = field(default_factory=ButterflyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: InitConfig | None = None

    def __post_init__(self) -> None:
        task = task_for(self.task)
        if self.optim.warmup_steps >= self.train.num_steps:
            raise ConfigError(
                f"optim.warmup_steps is {self.optim.warmup_steps}; it must be below "
                f"train.num_steps {self.train.num_steps}."
            )
        length = self.model.max_length or task.max_length
        if length < task.max_length:
            raise ConfigError(
                f"model.max_length is {length}, below the {task.max_length} of task {task.name}."
            )
        if task.image_side is not None and length != task.max_length:
            raise ConfigError(
                f"model.max_length is {length}, but the pictures of task {task.name} have "
                f"{task.max_length} pixels; leave it out."
            )
        # Strides repeat after log2(length) layers at the latest.
        for layer_index in range(min(self.model.num_layers, length.bit_length())):
            context = self.model.context(length, layer_index)
            try:
                self.attention.check(context)
            except ConfigError as error:
                raise ConfigError(f"attention.{error}") from None
        if self.model.execution == "packed":
            with torch.random.fork_rng(devices=[]):
                self.model.check_packs(self.attention, self.attention.build(context))

    @property
    def task_info(self) -> Task:
        """The task this run trains on."""
        return task_for(self.task)

    def resolved(self, *, vocab_size: int, num_classes: int) -> RunConfig:
        """The same run with the model's open sizes filled in from the data."""
        model = dataclasses.replace(
            self.model,
            vocab_size=self.model.vocab_size or vocab_size,
            max_length=self.model.max_length or self.task_info.max_length,
            num_classes=self.model.num_classes or num_classes,
        )
        assert model.vocab_size and model.num_classes
        if model.vocab_size < vocab_size:
            raise ConfigError(
                f"model.vocab_size is {model.vocab_size}; task {self.task} has {vocab_size} token "
                f"ids, with padding and CLS: leave it out, or give at least {vocab_size}."
            )
        if model.num_classes < num_classes:
            raise ConfigError(
                f"model.num_classes is {model.num_classes}; the data of task {self.task} "
                f"have {num_classes}."
            )
        return dataclasses.replace(self, model=model)

    def to_yaml(self) -> str:
        """YAML that `parse_run_config` reads back to an equal value."""
        return yaml.safe_dump(to_dict(self), sort_keys=False)


def parse_run_config(*layers: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from mappings (nested or dotted), later ones winning over earlier ones.

    The task's preset (the reference's values) lies under all of them. When a layer names another
    attention than the one below it, the lower one's sizes are dropped. A ConfigError names the
    dotted path of an unknown key, a wrong type or an impossible combination.
    """
    tree: dict[str, Any] = {}
    for layer in (_DEFAULTS, *layers):
        if isinstance(named := layer.get("attention"), str):
            layer = {**layer, "attention": {"name": named}}
        _drop_replaced_attention(tree, layer)
        for path, value in flatten(layer).items():
            set_dotted(tree, path, value)
    if "task" not in tree:
        raise ConfigError("task is required and has no value.")
    if not isinstance(tree["task"], str):
        raise ConfigError(f"task must be text, not {tree['task']!r}.")
    task = task_for(tree["task"])
    train = tree.get("train")
    steps = train.get("num_steps") if isinstance(train, Mapping) else None
    try:
        return from_dict(RunConfig, merge(task.preset, schedule(task, steps), tree))
    except UnknownSettingError as error:
        chosen = tree["attention"]
        name = chosen.get("name") if isinstance(chosen, Mapping) else None
        meant = similar_settings(error.path, name) if isinstance(name, str) else ""
        if not meant:
            raise
        raise ConfigError(
            f"{error.path} is not a setting; did you mean {meant}? (dmx.train --show lists all)"
        ) from None


_EVALUATIONS = 8


def full_budget(task: Task, key: str) -> int:
    """A whole number of a task's preset, or the general one where the preset leaves it out."""
    section, name = key.split(".")
    general = {"train": TrainConfig(), "optim": OptimConfig()}[section]
    return int(str(task.preset.get(key, getattr(general, name))))


def schedule(task: Task, num_steps: object) -> dict[str, int]:
    """What of a task's preset follows from another number of steps; {} where it is the preset's.

    The warm-up keeps its share (text: 40 %, as in the reference). A shorter run is evaluated eight
    times.
    """
    full = full_budget(task, "train.num_steps")
    if type(num_steps) is not int or num_steps < 1 or num_steps == full:
        return {}
    share = full_budget(task, "optim.warmup_steps") / full
    every = {"train.eval_every_steps": max(num_steps // _EVALUATIONS, 1)}
    return {
        **(every if num_steps < full else {}),
        "optim.warmup_steps": min(max(round(share * num_steps), 2), max(num_steps - 1, 2)),
    }


_ALSO_CALLED = {
    **dict.fromkeys(("lr", "max_lr", "rate"), "learning_rate"),
    **dict.fromkeys(("wd", "l2"), "weight_decay"),
    **dict.fromkeys(("warmup", "warm_up", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("batch", "bs", "batchsize"), "batch_size"),
    **dict.fromkeys(("steps", "max_steps", "train_steps", "iterations"), "num_steps"),
    **dict.fromkeys(("layers", "depth", "n_layers"), "num_layers"),
    **dict.fromkeys(("heads", "n_heads"), "num_heads"),
    **dict.fromkeys(("dim", "d_model", "emb_dim", "hidden_size"), "embedding_dim"),
    **dict.fromkeys(("clip", "grad_clip", "max_grad_norm"), "clip_gradient_norm"),
    **dict.fromkeys(("eval_every", "eval_steps", "eval_frequency"), "eval_every_steps"),
    **dict.fromkeys(("max_len", "seq_len", "length"), "max_length"),
}
"""What other programs call a setting -> the last part of its name here."""


def similar_settings(name: str, attention: str) -> str:
    """The settings that `name` may mean, with `or` between them; "" where none is like it."""
    chosen = AttentionConfig.parse(attention, "attention")
    parts = {"model": ModelConfig(), "optim": OptimConfig(), "data": DataConfig()}
    known = list(flatten(to_dict({**parts, "train": TrainConfig(), "attention": chosen})))
    last = name.rpartition(".")[2].lower().replace("-", "_")
    last = _ALSO_CALLED.get(last, last)
    ends = {key.rpartition(".")[2] for key in known}
    like = [last] if last in ends else difflib.get_close_matches(last, ends, n=1, cutoff=0.75)
    return " or ".join(key for key in known if key.rpartition(".")[2] in like)


_DEFAULTS = {"attention.name": "butterfly"}


def _drop_replaced_attention(tree: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Another attention than before has other sizes; only its dropout means the same."""
    given = layer.get("attention")
    name = given.get("name") if isinstance(given, Mapping) else layer.get("attention.name")
    old = tree.get("attention")
    if isinstance(name, str) and isinstance(old, dict) and old.get("name") != name:
        tree["attention"] = {k: v for k, v in old.items() if k == "dropout"}
