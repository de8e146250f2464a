"""What the contract suites run over: every registered attention, and butterfly with each inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmx.attention import ATTENTIONS, AttentionConfig, MixerContext, TokenMixer

LENGTH, HEADS, HEAD_DIM = 64, 2, 8

# What dmx ships. Costs and the order of positions are promises of these; the contract is one of
# every registered attention, also of one that docs/extending.md adds.
SHIPPED = (
    *("butterfly", "linear", "linformer", "none", "nystrom", "performer", "reformer"),
    "softmax",
)

# Sizes that exercise the approximation at 64 positions. An attention that is not listed here is
# tested with its defaults, so a new file in dmx/attention is covered without a change.
SMALL: dict[str, dict[str, Any]] = {
    "butterfly": {"block_size": 8},
    "nystrom": {"num_landmarks": 8, "conv_kernel_size": 5},
    "linformer": {"projection_dim": 16},
    "performer": {"num_features": 24},
    "reformer": {"num_hashes": 2, "chunk_length": 8},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "nystrom/per_matrix": {"name": "nystrom", **SMALL["nystrom"], "inverse_init": "per_matrix"},
    "nystrom/no_conv": {"name": "nystrom", "num_landmarks": 8, "conv_kernel_size": None},
    "nystrom/exact": {"name": "nystrom", "num_landmarks": LENGTH, "conv_kernel_size": 35},
    "performer/relu": {"name": "performer", **SMALL["performer"], "kernel": "relu"},
    "performer/exp": {"name": "performer", **SMALL["performer"], "kernel": "exp"},
    "reformer/one_chunk": {"name": "reformer", "num_hashes": 2},
}


def _cases() -> dict[str, dict[str, Any]]:
    plain = {name: {"name": name, **SMALL.get(name, {})} for name in ATTENTIONS.names()}
    cases = plain | VARIANTS
    for name in plain.keys() - {"butterfly"}:
        inner = dict(plain[name])
        if name == "linformer":
            inner["projection_dim"] = 8
        cases[f"butterfly({name})"] = {"name": "butterfly", "block_size": 16, "inner": inner}
    return dict(sorted(cases.items()))


CASES = _cases()
NAMES = list(CASES)


def config(name: str) -> AttentionConfig:
    return AttentionConfig.parse(CASES[name], "attention")


def context(layer: int = 0, length: int = LENGTH) -> MixerContext:
    return MixerContext(length=length, num_heads=HEADS, head_dim=HEAD_DIM, layer_index=layer)


def mixer(name: str, *, seed: int = 0, layer: int = 0) -> TokenMixer:
    torch.manual_seed(seed)
    settings = config(name)
    settings.check(context(layer))
    return settings.build(context(layer)).eval()


PACKING = [name for name in NAMES if mixer(name).packs]


def base_name(name: str) -> str:
    """The attention that does the mixing: `butterfly(linear)` -> `linear`."""
    return name.removeprefix("butterfly(").removesuffix(")").split("/")[0]


def qkv(seed: int = 0, batch: int = 4, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, length, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return q, k, v


def masks(seed: int = 0, length: int = LENGTH) -> dict[str, Tensor]:
    """[4, length] masks. `holes` has a fully masked row, and rows with fully masked groups."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(length)
    random = torch.rand(4, length, generator=generator) < 0.3
    holes = random.clone()
    holes[0] = False
    holes[1, position % 8 == 3] = False  # a group of a strided butterfly layer
    holes[2, : length // 2] = False  # groups of its first layer, and landmark segments
    single = torch.zeros(4, length, dtype=torch.bool)
    single[torch.arange(4), torch.tensor([0, 5, length // 2, length - 1])] = True
    return {
        "full": torch.ones(4, length, dtype=torch.bool),
        "random": random,
        "tails": position < torch.tensor([[length], [length // 3], [1], [length - 1]]),
        "holes": holes,
        "single": single,
    }
