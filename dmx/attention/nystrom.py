"""Nystromformer (Xiong et al. 2021, arXiv 2102.03902): attention through segment-mean landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmx.attention.base import (
    ATTENTIONS,
    AttentionConfig,
    Heads,
    MixerContext,
    TokenMixer,
    fused_attention,
    kept_keys,
    zero_masked,
)
from dmx.errors import ConfigError
from dmx.schema import check_range

_ITERATIONS = 6
"""Steps of the pseudo-inverse, as in the paper's experiments."""

_BLOCK, _BLOCK_OF_SOME = 64, 32
"""Rows of a band of the convolution: wide enough for matrix products, narrow beside the taps."""

_SPARSE = 6
"""Where fewer than one position in six is real, bands of only these are cheaper than all."""


@ATTENTIONS.register("nystrom")
@dataclass(frozen=True, kw_only=True)
class NystromConfig(AttentionConfig):
    """softmax(q k_m^T) pinv(softmax(q_m k_m^T)) softmax(q_m k^T) v, plus a convolution of v.

    q_m and k_m are means over num_landmarks equal segments of the sequence (equation 9 of the
    paper), in which masked tokens count as zeros. As many landmarks as positions make it exact
    softmax. The reference has no dropout here, nor has dmx: `dropout` does nothing.

    Attributes:
        num_landmarks: m; divides the length.
        conv_kernel_size: taps of the depthwise convolution residual, odd; None leaves it out.
        inverse_init: what scales the first guess of the pseudo-inverse: the largest column sum
            of the whole batch (`original`: the paper's code, and what the reference always
            runs), or of each matrix (`per_matrix`: an example does not depend on its batch).
    """

    size_field: ClassVar[str | None] = "num_landmarks"

    num_landmarks: int = 64
    conv_kernel_size: int | None = 35
    inverse_init: Literal["original", "per_matrix"] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_landmarks", least=1)
        taps = self.conv_kernel_size
        if taps is not None and (taps < 1 or taps % 2 == 0):
            raise ConfigError(f"conv_kernel_size is {taps}; it must be odd and positive, or null.")

    def check(self, context: MixerContext) -> None:
        """Segments are equally long."""
        if context.length % self.num_landmarks:
            raise ConfigError(
                f"num_landmarks is {self.num_landmarks}; it must divide the length "
                f"{context.length}."
            )

    def build(self, context: MixerContext) -> TokenMixer:
        return NystromMixer(self, context)


class NystromMixer(TokenMixer):
    """See NystromConfig. Legend: m landmarks, s = L / m positions of a segment."""

    packs = True

    def __init__(self, config: NystromConfig, context: MixerContext) -> None:
        super().__init__()
        self.num_landmarks = config.num_landmarks
        self.original_init = config.inverse_init == "original"
        self.mixes_examples = self.original_init and config.num_landmarks < context.length
        self.conv: PositionConvolution | None = None
        if config.conv_kernel_size is not None:
            self.conv = PositionConvolution(context.num_heads, config.conv_kernel_size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Landmarks are means of whole segments, in which masked tokens are zeros."""
        length = q.shape[2]
        keep = kept_keys(mask)
        q, k, real_v = zero_masked(mask, q, k, v)
        if self.num_landmarks == length:
            out = fused_attention(q, k, v, keep)
        else:
            segments = (self.num_landmarks, length // self.num_landmarks)
            q_m = q.unflatten(2, segments).mean(dim=3)  # [B, H, m, Dh]
            k_m = k.unflatten(2, segments).mean(dim=3)
            summary = fused_attention(q_m, k, v, keep)
            out = fused_attention(q, k_m, self._inverse(q_m, k_m) @ summary)
        return out if self.conv is None else out + self.conv(real_v)

    def mix_buckets(self, buckets: Sequence[Heads], full_length: int) -> list[Tensor]:
        """Landmarks and inverses of all groups at once, the rest bucket by bucket.

        The original initialisation takes a maximum over the batch. A group without real tokens
        is missing here, and cannot be the maximum: its kernel is uniform, with column sums of 1,
        and the column sums of any m x m matrix whose rows sum to 1 have mean 1.
        """
        if not buckets:
            return []
        if self.num_landmarks == full_length:
            outs = [fused_attention(q, k, v) for q, k, v, _ in buckets]
        else:
            q_ms = [self._landmarks(q, slot, full_length) for q, _, _, slot in buckets]
            k_ms = [self._landmarks(k, slot, full_length) for _, k, _, slot in buckets]
            inverses = self._inverse(torch.cat(q_ms), torch.cat(k_ms)).split(list(map(len, q_ms)))
            outs = []
            for (q, k, v, _), q_m, k_m, inverse in zip(buckets, q_ms, k_ms, inverses, strict=True):
                summary = fused_attention(q_m, k, v)
                outs.append(fused_attention(q, k_m, inverse @ summary))
        if self.conv is None:
            return outs
        convolved = (self.conv.at(v, slot, full_length) for _, _, v, slot in buckets)
        return [out + near for out, near in zip(outs, convolved, strict=True)]

    def _landmarks(self, x: Tensor, slot: Tensor, full_length: int) -> Tensor:
        """[n, H, l, Dh] real tokens -> [n, H, m, Dh] means over full segments."""
        count, num_heads, length, head_dim = x.shape
        m = self.num_landmarks
        segment = full_length // m
        first = torch.arange(count, device=x.device)[:, None] * m
        rows = x.transpose(1, 2).reshape(count * length, num_heads * head_dim)
        sums = rows.new_zeros(count * m, rows.shape[1])
        sums = sums.index_add(0, (first + slot // segment).flatten(), rows)
        return (sums / segment).view(count, m, num_heads, head_dim).transpose(1, 2)

    def _inverse(self, q_m: Tensor, k_m: Tensor) -> Tensor:
        """Pseudo-inverse of softmax(q_m k_m^T / sqrt(Dh)), [n, H, m, m], by equation 11.

        It is applied to the landmarks' summary from the left, where the reference multiplies it
        into the [L, m] kernel: the same product, in m x m x Dh instead of L x m x m operations.
        """
        kernel = (q_m @ k_m.transpose(-1, -2) * q_m.shape[-1] ** -0.5).softmax(dim=-1)
        sums = kernel.sum(dim=-2)
        top = sums.max() if self.original_init else sums.amax(-1)[..., None, None]
        inverse = kernel.transpose(-1, -2) / top
        eye = torch.eye(kernel.shape[-1], device=kernel.device, dtype=kernel.dtype)
        for _ in range(_ITERATIONS):
            product = kernel @ inverse
            inner = 15 * eye - product @ (7 * eye - product)
            inverse = 0.25 * inverse @ (13 * eye - product @ inner)
        return inverse


class PositionConvolution(nn.Conv2d):
    """Every head's own taps over positions, as banded matrix products.

    Not F.conv2d: on CPU oneDNN gets its weight gradient wrong by some 10 % (torch 2.13, float32,
    depthwise, batch above 1), and it is several times slower.
    """

    def __init__(self, num_heads: int, taps: int) -> None:
        super().__init__(num_heads, num_heads, (taps, 1), groups=num_heads, bias=False)
        self.taps, self.reach = taps, taps // 2

    def forward(self, v: Tensor) -> Tensor:
        """[n, H, L, Dh] -> same; one band for all windows of positions, a product for each head."""
        count, num_heads, length, head_dim = v.shape
        block = min(_BLOCK, length)
        fill = -length % block
        row = torch.arange(block, device=v.device)
        column = torch.arange(-self.reach, block + self.reach, device=v.device)
        band = self._taps(column[:, None] - row).permute(2, 0, 1)  # [H, w, b]
        near = F.pad(v.transpose(2, 3), (self.reach, self.reach + fill))
        near = near.unfold(3, len(column), block).transpose(0, 1)
        near = near.reshape(num_heads, -1, len(column))  # [H, n * Dh * N, w]
        out = (near @ band).view(num_heads, count, head_dim, -1)
        return out.permute(1, 0, 3, 2)[:, :, :length]

    def at(self, v: Tensor, slot: Tensor, full_length: int) -> Tensor:
        """[n, H, l, Dh] of real tokens at positions `slot` [n, l] -> same."""
        if v.shape[2] == full_length:
            return self(v)
        if v.shape[2] * _SPARSE < full_length:
            return self._at_few(v, slot)
        index = slot[:, None, :, None].expand_as(v)
        full = v.new_zeros(*v.shape[:2], full_length, v.shape[3]).scatter(2, index, v)
        return self(full).gather(2, index)

    def _at_few(self, v: Tensor, slot: Tensor) -> Tensor:
        """A band of its own for each block of rows; masked positions cost nothing."""
        length = v.shape[2]
        whole = length <= _BLOCK_OF_SOME + 2 * self.reach
        block, border = (length, 0) if whole else (_BLOCK_OF_SOME, self.reach)
        fill = -length % block
        far = 1 << 30  # beyond the reach of any tap, for rows and columns that pad
        row = F.pad(slot, (0, fill), value=far).unflatten(1, (-1, block))  # [n, N, b]
        column = F.pad(slot, (border, border + fill), value=-far)
        column = column.unfold(1, block + 2 * border, block)  # [n, N, w]
        band = self._taps(column[:, :, None, :] - row[..., None])  # [n, N, b, w, H]
        near = F.pad(v, (0, 0, border, border + fill)).unfold(2, block + 2 * border, block)
        out = band.permute(0, 4, 1, 2, 3) @ near.transpose(-1, -2)
        return out.flatten(2, 3)[:, :, :length]

    def _taps(self, distance: Tensor) -> Tensor:
        """The taps at distances of a key from a query, [...] -> [..., H]; 0 beyond their reach."""
        tap = distance + self.reach
        tap = tap.where((tap >= 0) & (tap < self.taps), self.taps)
        return F.embedding(tap, F.pad(self.weight.flatten(1), (0, 1)).T)
