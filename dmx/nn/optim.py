"""AdamW with a one-cycle schedule, as the reference really runs it, every hidden default named."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dmx.schema import check_range


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule.

    The reference builds `AdamW(betas=(0.9, 0.999), eps=1e-6)` and `OneCycleLR` with PyTorch's
    defaults. Those defaults cycle the first beta: from max_momentum down to base_momentum while
    the learning rate rises, and back. beta1 = 0.9 is therefore never used. The rate starts at
    learning_rate / div_factor and ends at learning_rate / (div_factor * final_div_factor).

    Attributes:
        learning_rate: the peak. weight_decay: decoupled, on every parameter, biases included.
        warmup_steps: optimizer steps until the peak. anneal: shape of both ramps.
    """

    learning_rate: float = 1.0e-4
    weight_decay: float = 0.0
    warmup_steps: int = 1000
    anneal: Literal["linear", "cos"] = "linear"
    beta2: float = 0.999
    eps: float = 1.0e-6
    base_momentum: float = 0.85
    max_momentum: float = 0.95
    div_factor: float = 25.0
    final_div_factor: float = 1.0e4

    def __post_init__(self) -> None:
        check_range(self, "learning_rate", "eps", "div_factor", "final_div_factor", above=0)
        check_range(self, "weight_decay", least=0)
        check_range(self, "warmup_steps", least=2)  # OneCycleLR divides by warmup_steps - 1
        check_range(self, "beta2", "base_momentum", "max_momentum", least=0, below=1)


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, num_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    """The optimizer and the schedule over `num_steps` optimizer steps."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.max_momentum, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.learning_rate,
        total_steps=num_steps,
        pct_start=config.warmup_steps / num_steps,
        anneal_strategy=config.anneal,
        cycle_momentum=True,
        base_momentum=config.base_momentum,
        max_momentum=config.max_momentum,
        div_factor=config.div_factor,
        final_div_factor=config.final_div_factor,
    )
    return optimizer, schedule
