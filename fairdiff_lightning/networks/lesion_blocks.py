"""Residual blocks and levels of LeFusion's U-Net, on slices (B, D, C, H, W) with channels last in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairdiff_lightning.networks.lesion_attention import (
    DepthAttention,
    LinearSliceAttention,
    Positions,
    SliceAttention,
    TokenAttention,
)

NORM_GROUPS = 8


@dataclass(frozen=True)
class Parts:
    """What all levels of one network are built with.

    Attributes:
        embedding: length of the vector that scales and shifts the residual blocks.
        heads: of each attention.
        head_dim: features of a head.
        token_dim: features of a condition token; None where there are none.
    """

    embedding: int
    heads: int
    head_dim: int
    token_dim: int | None

    def attention_to_tokens(self, channels: int) -> TokenAttention | None:
        """Cross-attention of a level, where the network has tokens."""
        return None if self.token_dim is None else TokenAttention(channels, self.token_dim, self.heads, self.head_dim)


class SliceConv(nn.Conv2d):
    """A convolution of each slice of (B, D, C, H, W) by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        return _unstack(super().forward(_stack(x)), x)


class SliceUpsampling(nn.ConvTranspose2d):
    """A transposed convolution of each slice of (B, D, C, H, W) by itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the size of the output is never asked for
        """Convolve."""
        return _unstack(super().forward(_stack(x)), x)


class Residual(nn.Module):
    """Two convolutions with norms over whole volumes; the embedding scales and shifts after the first norm.

    Shapes:
        x (B, D, I, H, W); embedded (B, E), or None where ``embedding`` is None; output (B, D, O, H, W).
    """

    def __init__(self, channels: int, out_channels: int, embedding: int | None) -> None:
        super().__init__()
        self.film = None if embedding is None else nn.Linear(embedding, 2 * out_channels)
        self.conv1 = SliceConv(channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(NORM_GROUPS, out_channels)
        self.conv2 = SliceConv(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, out_channels)
        self.shortcut = nn.Identity() if channels == out_channels else SliceConv(channels, out_channels, 1)

    def forward(self, x: Tensor, embedded: Tensor | None) -> Tensor:
        """Return the block's output."""
        h = self.norm1(self.conv1(x).transpose(1, 2))
        if self.film is not None:
            scale, shift = self.film(embedded)[..., None, None, None].chunk(2, 1)
            h = h * (scale + 1) + shift
        h = self.norm2(self.conv2(F.silu(h).transpose(1, 2)).transpose(1, 2))
        out: Tensor = F.silu(h).transpose(1, 2) + self.shortcut(x)
        return out


class Level(nn.Module):
    """What one resolution does on the way down or up.

    Shapes:
        x (B, D, I, H, W); embedded (B, E); tokens (B, K, T) or None; output (B, D, O, H, W).
    """

    def __init__(self, channels: int, out_channels: int, parts: Parts) -> None:
        super().__init__()
        self.block1 = Residual(channels, out_channels, parts.embedding)
        self.block2 = Residual(out_channels, out_channels, parts.embedding)
        self.within = LinearSliceAttention(out_channels, parts.heads, parts.head_dim)
        self.to_tokens = parts.attention_to_tokens(out_channels)
        self.along = DepthAttention(out_channels, parts.heads, parts.head_dim)

    def forward(self, x: Tensor, embedded: Tensor, positions: Positions, tokens: Tensor | None) -> Tensor:
        """Return the level's output."""
        x = self.within(self.block2(self.block1(x, embedded), embedded))
        if self.to_tokens is not None:
            x = self.to_tokens(x, tokens)
        out: Tensor = self.along(x, positions)
        return out


class Middle(nn.Module):
    """What the lowest resolution does between the ways; shapes as in :class:`Level`."""

    def __init__(self, channels: int, parts: Parts) -> None:
        super().__init__()
        self.block1 = Residual(channels, channels, parts.embedding)
        self.within = SliceAttention(channels, parts.heads, parts.head_dim)
        self.to_tokens = parts.attention_to_tokens(channels)
        self.along = DepthAttention(channels, parts.heads, parts.head_dim)
        self.block2 = Residual(channels, channels, parts.embedding)

    def forward(self, x: Tensor, embedded: Tensor, positions: Positions, tokens: Tensor | None) -> Tensor:
        """Return the lowest level's output."""
        x = self.within(self.block1(x, embedded))
        if self.to_tokens is not None:
            x = self.to_tokens(x, tokens)
        out: Tensor = self.block2(self.along(x, positions), embedded)
        return out


class BinTokens(nn.Module):
    """Tokens (B, K, T) of a histogram (B, K): what a bin is, and how much of the lesion falls into it."""

    def __init__(self, bins: int, token_dim: int) -> None:
        super().__init__()
        self.bin = nn.Parameter(torch.randn(bins, token_dim) * token_dim**-0.5)
        self.amount = nn.Parameter(torch.randn(bins, token_dim) * token_dim**-0.5)

    def forward(self, histogram: Tensor) -> Tensor:
        """Return the tokens."""
        return self.bin + self.amount * histogram[..., None]


def sinusoidal(steps: Tensor, dim: int) -> Tensor:
    """Embedding (B, dim) float32 of steps (B,): sines, then cosines, of frequencies that fall from 1 to 1e-4."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=steps.device) * (-math.log(10_000) / (half - 1)))
    angle = steps[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def _stack(x: Tensor) -> Tensor:
    """Slices (B * D, C, H, W), channels last in memory; a view where they are already."""
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _unstack(slices: Tensor, like: Tensor) -> Tensor:
    return slices.view(*like.shape[:2], *slices.shape[1:])


def choose(null: Tensor, condition: Tensor | None, dropped: Tensor | None, size: int) -> Tensor:
    """The condition (B, cond_dim) of each sample, or the learned null condition (1, cond_dim).

    Always of both, so that the null condition has a gradient.
    """
    nothing = null.expand(size, -1)
    if condition is None:
        return nothing
    if dropped is None:
        dropped = torch.zeros(size, dtype=torch.bool, device=condition.device)
    return torch.where(dropped[:, None], nothing, condition)
