"""Attention of LeFusion's U-Net: along depth, within a slice, and to condition tokens; each adds to its input."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_BUCKETS = 32
_MOST_SEQUENCES = 65_535  # CUDA's grid limit, which fused attention with a bias meets with one block for a sequence


class Positions(NamedTuple):
    """What attention along depth knows of the slices' places, made once for all layers.

    Attributes:
        bias: (heads, D, D), added to the scores.
        cos: (D, head_dim / 2) of the rotary angles.
        sin: likewise.
    """

    bias: Tensor
    cos: Tensor
    sin: Tensor


def relative_buckets(length: int, device: torch.device | None = None) -> Tensor:
    """Bucket of each pair of places: T5's 32 buckets in both directions, exact below 8, logarithmic up to 32.

    Returns:
        (length, length) int64 in 0 ... 31; rows are queries. From 16 on the key lies behind the query.
    """
    place = torch.arange(length, device=device)
    distance = place - place[:, None]
    far = distance.abs()
    wide = 8 + (torch.log(far.clamp(min=8) / 8) / math.log(32 / 8) * 8).long()
    return 16 * (distance > 0) + torch.where(far < 8, far, wide.clamp(max=15))


def rotary_angles(length: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, dim / 2) of the rotary angles, in the type and on the device of ``like``."""
    frequency = 10_000 ** (-torch.arange(0, dim, 2, device=like.device) / dim)
    angle = torch.arange(length, device=like.device)[:, None] * frequency
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of features of ``x`` (..., L, dim) by the angles of :func:`rotary_angles`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin, pairs = cos.to(wide), sin.to(wide), x.to(wide).view(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # fuses what follows, but no complex numbers
        even, odd = pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


class _Attention(nn.Module):
    """Norm over the channels of each voxel, and the projections before and after."""

    def __init__(self, channels: int, heads: int, head_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels, bias=False)
        self.to_qkv = nn.Linear(channels, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, channels, bias=bias)

    def heads_of(self, tokens: Tensor) -> Tensor:
        """Queries, keys and values (3, N, heads, L, head_dim) of tokens (N, L, C)."""
        found: Tensor = self.to_qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return found

    def out_of(self, heads: Tensor) -> Tensor:
        """Tokens (N, L, C) of (N, heads, L, head_dim)."""
        out: Tensor = self.to_out(heads.transpose(1, 2).flatten(2))
        return out


class DepthAttention(_Attention):
    """Softmax attention of each column of voxels along depth, with rotary features and a relative bias.

    Shapes:
        x (B, D, C, H, W), also the output.
    """

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Add what each voxel takes from its column."""
        batch, depth, channels, height, width = x.shape
        columns = x.permute(0, 3, 4, 1, 2).reshape(-1, depth, channels)
        q, k, v = self.heads_of(columns)
        q, k = (rotate(part, positions.cos, positions.sin) for part in (q, k))
        bias = positions.bias[None].to(v.dtype)  # four axes: with three, the CPU does not fuse the attention
        parts = [
            F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
            for queries, keys, values in zip(*(t.split(_MOST_SEQUENCES) for t in (q, k, v)), strict=True)
        ]
        out = self.out_of(parts[0] if len(parts) == 1 else torch.cat(parts))
        return x + out.view(batch, height, width, depth, channels).permute(0, 3, 4, 1, 2)


class SliceAttention(_Attention):
    """Softmax attention among the voxels of a slice.

    Shapes:
        x (B, D, C, H, W), also the output.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Add what each voxel takes from its slice."""
        return x + _slices(self.out_of(F.scaled_dot_product_attention(*self.heads_of(_tokens(x)))), x)


class LinearSliceAttention(_Attention):
    """Linear attention among the voxels of a slice: cost grows with their number, not its square.

    Each output is linear in what a slice's values hold, so that projections of values and outputs are joined into one
    small matrix for each slice, before they meet the voxels.

    Shapes:
        x (B, D, C, H, W), also the output.
    """

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__(channels, heads, head_dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Add what each voxel takes from its slice."""
        tokens = self.norm(_tokens(x))
        to_q, to_k, to_v = self.to_qkv.weight.chunk(3)
        each = (self.heads, len(to_q) // self.heads, tokens.shape[-1])
        q = F.linear(tokens, to_q).view(*tokens.shape[:2], self.heads, -1).softmax(-1)
        gathered = (F.linear(tokens, to_k).softmax(1).mT @ tokens).view(-1, *each)
        context = gathered @ to_v.view(each).mT * q.shape[-1] ** -0.5
        joined = (context @ self.to_out.weight.T.view(each)).flatten(1, 2)
        return x + _slices(torch.baddbmm(self.to_out.bias, q.flatten(2), joined), x)


class TokenAttention(nn.Module):
    """Cross-attention of all voxels to condition tokens.

    Shapes:
        x (B, D, C, H, W), also the output; tokens (B, K, E).
    """

    def __init__(self, channels: int, token_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels, bias=False)
        self.to_q = nn.Linear(channels, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(token_dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, channels)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Add what each voxel takes from the tokens."""
        voxels = x.permute(0, 1, 3, 4, 2).flatten(1, 3)
        q = self.to_q(self.norm(voxels)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + _slices(out, x)


def _tokens(x: Tensor) -> Tensor:
    """Voxels (B * D, H * W, C) of slices (B, D, C, H, W)."""
    return x.permute(0, 1, 3, 4, 2).flatten(2, 3).flatten(0, 1)


def _slices(tokens: Tensor, like: Tensor) -> Tensor:
    """Slices shaped like (B, D, C, H, W) of their voxels in any grouping."""
    batch, depth, channels, height, width = like.shape
    return tokens.reshape(batch, depth, height, width, channels).permute(0, 1, 4, 2, 3)
