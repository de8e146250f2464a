"""Performer, FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794): attention by random features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dmx.attention.base import ATTENTIONS, AttentionConfig, MixerContext, TokenMixer, zero_masked
from dmx.schema import check_range


@ATTENTIONS.register("performer")
@dataclass(frozen=True, kw_only=True)
class PerformerConfig(AttentionConfig):
    """phi(q) (phi(k)^T v) / (phi(q) sum_j phi(k_j)), with random features phi; linear cost.

    The reference asks performer_pytorch for a `relu` or `exp` kernel without the switch
    (`generalized_attention`) that would turn it on, so it always computes `softmax`, the default
    here. It also scales q and k by Dh^-1/4 before a library that does so again: it approximates
    softmax(q k^T / Dh), not / sqrt(Dh), and so does dmx. Masked keys are zero vectors; their
    features are constants that count in the normaliser, as in the reference.
    There are no attention weights, so dropout does nothing.

    Attributes:
        num_features: M, the number of random directions.
        kernel: `softmax`: phi(x) = exp(w x - |x|^2 / 2) (lemma 1 of the paper; what the reference
            runs); `relu`: max(w x, 0) (section 4.3); `exp`: exp(w x), with the stabiliser of
            `softmax`, where performer_pytorch's has none and overflows.
        redraw_every_steps: draw new directions after that many optimizer steps; 0 keeps the first
            ones, as the reference does.
    """

    size_field: ClassVar[str | None] = "num_features"

    num_features: int = 256
    kernel: Literal["softmax", "relu", "exp"] = "softmax"
    redraw_every_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_features", least=1)
        check_range(self, "redraw_every_steps", least=0)

    def build(self, context: MixerContext) -> TokenMixer:
        return PerformerMixer(self, context)


def orthogonal_directions(count: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """[count, dim] Gaussian rows, orthogonal within each block of `dim` rows (section 3.3).

    A row has the length of an independent Gaussian vector, so that each by itself is Gaussian.
    The signs that QR leaves to convention are drawn evenly by making R's diagonal positive
    (Mezzadri 2007); the reference keeps LAPACK's.
    """
    blocks = []
    for _ in range(-(-count // dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
        blocks.append((q * r.diagonal().sign()).T)
    lengths = torch.randn(count, dim, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:count] * lengths


class PerformerMixer(TokenMixer):
    """See PerformerConfig."""

    packs = True

    projection: Tensor

    def __init__(self, config: PerformerConfig, context: MixerContext) -> None:
        super().__init__()
        self.config = config
        self._layer, self._drawn = context.layer_index, 0
        directions = orthogonal_directions(config.num_features, context.head_dim)
        self.register_buffer("projection", directions)

    def at_step(self, step: int, seed: int) -> None:
        """New directions when it is time, a function of the seed, the layer and their number.

        The first ones, number 0, are those it was built with or started from.
        """
        every = self.config.redraw_every_steps
        number = step // every if every else 0
        again, self._drawn = number == self._drawn, number
        if again or number == 0:
            return
        words = np.random.SeedSequence([seed, self._layer, number]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> 1))
        count, dim = self.projection.shape
        self.projection = orthogonal_directions(count, dim, generator).to(self.projection)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = zero_masked(mask, k, v)
        return self.mix_real(q, k, v, q.shape[2])

    def mix_real(self, q: Tensor, k: Tensor, v: Tensor, full_length: int) -> Tensor:
        """Of masked keys, zero vectors with the same features, the number is enough."""
        num_masked = full_length - q.shape[2]
        q_phi, _ = self._features(q, -1, False)
        k_phi, zero_phi = self._features(k, (-1, -2), num_masked > 0)
        total = k_phi.sum(dim=-2, keepdim=True)  # [n, H, 1, M]
        if num_masked:
            total = total + num_masked * zero_phi
        context = k_phi.transpose(-1, -2) @ v  # [n, H, M, Dh]
        return (q_phi @ context) / (q_phi @ total.transpose(-1, -2))

    def _features(
        self, x: Tensor, over: int | tuple[int, int], with_zero: bool
    ) -> tuple[Tensor, Tensor | float]:
        """phi(x) [n, H, l, M] up to a factor that cancels, and phi(0) by the same factor.

        Args:
            x: [n, H, l, Dh].
            over: the dimensions that share a stabiliser: exponents are at most 0.
            with_zero: zero vectors belong to the set, so their exponent 0 counts in the maximum.
        """
        x = x * x.shape[-1] ** -0.5
        dots = x @ self.projection.T
        epsilon = 1e-3 if self.config.kernel == "relu" else 1e-4  # so that no normaliser vanishes
        if self.config.kernel == "relu":
            return dots.relu() + epsilon, epsilon
        # The stabiliser is no function of x to the gradient, as in the reference.
        top = dots.detach().amax(dim=over, keepdim=True)
        if with_zero:
            top = top.clamp(min=0.0)
        exponents = dots - top
        if self.config.kernel == "softmax":
            exponents = exponents - x.square().sum(dim=-1, keepdim=True) / 2
        return exponents.exp() + epsilon, (-top).exp() + epsilon
