"""LeFusion's U-Net as its equations read: volumes with depth first, flat kernels in 3-D, attention matrix by matrix.

What a programmer writes from the paper and its code, without a thought for speed: every attention permutes its input
and back, scores are materialised, norms over channels are written out. It loads the weights of ``LesionUNet``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairdiff_lightning.networks.lesion_unet import LesionUNet

HEADS, HEAD_DIM, BUCKETS = 8, 32, 32


class ChannelNorm(nn.Module):
    """Norm over the channels of each voxel, with a gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var(1, unbiased=False, keepdim=True)
        return (x - x.mean(1, keepdim=True)) / (variance + 1e-5).sqrt() * self.weight


def rotate(x: Tensor) -> Tensor:
    """Rotary features of (..., L, dim), neighbouring features being pairs."""
    length, dim = x.shape[-2:]
    frequency = 10_000 ** (-torch.arange(0, dim, 2, device=x.device) / dim)
    angle = (torch.arange(length, device=x.device)[:, None] * frequency).repeat_interleave(2, -1)
    quarter = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angle.cos() + quarter * angle.sin()


class Attention(nn.Module):
    """Softmax attention along depth (with rotary features and a bias) or within slices (with neither)."""

    def __init__(self, channels: int, along_depth: bool) -> None:
        super().__init__()
        self.along_depth = along_depth
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * HEADS * HEAD_DIM, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_DIM, channels, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        height, width = x.shape[3:]
        y = self.norm(x)
        y = y.permute(0, 3, 4, 2, 1) if self.along_depth else y.permute(0, 2, 3, 4, 1).flatten(2, 3)
        q, k, v = self.to_qkv(y).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(-2, -3) for t in (q, k, v))
        q = q * HEAD_DIM**-0.5
        if self.along_depth:
            q, k = rotate(q), rotate(k)
        scores = torch.einsum("...id,...jd->...ij", q, k)
        if bias is not None:
            scores = scores + bias
        out = torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)
        out = self.to_out(out.transpose(-2, -3).flatten(-2))
        if self.along_depth:
            return x + out.permute(0, 4, 3, 1, 2)
        return x + out.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)


class LinearAttention(nn.Module):
    """Attention within slices whose cost is linear in their voxels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_DIM, 1, bias=False)
        self.to_out = nn.Conv2d(HEADS * HEAD_DIM, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, depth, height, width = x.shape
        slices = self.norm(x).permute(0, 2, 1, 3, 4).reshape(batch * depth, channels, height, width)
        q, k, v = (t.reshape(batch * depth, HEADS, HEAD_DIM, -1) for t in self.to_qkv(slices).chunk(3, 1))
        q, k = q.softmax(-2) * HEAD_DIM**-0.5, k.softmax(-1)
        context = torch.einsum("nhdl,nhel->nhde", k, v)
        out = torch.einsum("nhde,nhdl->nhel", context, q).reshape(batch * depth, -1, height, width)
        return x + self.to_out(out).reshape(batch, depth, channels, height, width).permute(0, 2, 1, 3, 4)


class Residual(nn.Module):
    """Two convolutions; the embedding scales and shifts after the first norm."""

    def __init__(self, channels: int, out_channels: int, embedding: int | None) -> None:
        super().__init__()
        self.film = None if embedding is None else nn.Linear(embedding, 2 * out_channels)
        self.conv1 = nn.Conv3d(channels, out_channels, (1, 3, 3), padding=(0, 1, 1))
        self.norm1 = nn.GroupNorm(8, out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, (1, 3, 3), padding=(0, 1, 1))
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv3d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedded: Tensor | None) -> Tensor:
        h = self.norm1(self.conv1(x))
        if self.film is not None:
            scale, shift = self.film(F.silu(embedded))[:, :, None, None, None].chunk(2, 1)
            h = h * (scale + 1) + shift
        return F.silu(self.norm2(self.conv2(F.silu(h)))) + self.shortcut(x)


class Level(nn.Module):
    """What one resolution does on the way down or up."""

    def __init__(self, channels: int, out_channels: int, embedding: int) -> None:
        super().__init__()
        self.block1 = Residual(channels, out_channels, embedding)
        self.block2 = Residual(out_channels, out_channels, embedding)
        self.within = LinearAttention(out_channels)
        self.along = Attention(out_channels, along_depth=True)

    def forward(self, x: Tensor, embedded: Tensor, bias: Tensor) -> Tensor:
        return self.along(self.within(self.block2(self.block1(x, embedded), embedded)), bias)


class Middle(nn.Module):
    """What the lowest resolution does."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.block1 = Residual(channels, channels, embedding)
        self.within = Attention(channels, along_depth=False)
        self.along = Attention(channels, along_depth=True)
        self.block2 = Residual(channels, channels, embedding)

    def forward(self, x: Tensor, embedded: Tensor, bias: Tensor) -> Tensor:
        return self.block2(self.along(self.within(self.block1(x, embedded)), bias), embedded)


class PlainLesionUNet(nn.Module):
    """The network of the paper's code for one channel and a histogram of 16 bins.

    Shapes:
        noisy (B, 1, D, H, W); steps (B,); condition (B, 16); output (B, 1, D, H, W).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, embedding = width, 4 * width + 16
        self.conv_in = nn.Conv3d(1, width, (1, 7, 7), padding=(0, 3, 3))
        self.depth_in = Attention(width, along_depth=True)
        self.relative_bias = nn.Embedding(BUCKETS, HEADS)
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 4 * width))
        self.null_condition = nn.Parameter(torch.zeros(1, 16))
        steps = [(width, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 8 * width)]
        scaling = {"kernel_size": (1, 4, 4), "stride": (1, 2, 2), "padding": (0, 1, 1)}
        self.downs = nn.ModuleList(Level(i, o, embedding) for i, o in steps)
        self.halvings = nn.ModuleList(nn.Conv3d(o, o, **scaling) for _, o in steps[:-1])
        self.middle = Middle(8 * width, embedding)
        self.ups = nn.ModuleList(Level(2 * o, i, embedding) for i, o in reversed(steps))
        self.doublings = nn.ModuleList(nn.ConvTranspose3d(i, i, **scaling) for i, _ in reversed(steps[1:]))
        self.block_out = Residual(2 * width, width, None)
        self.conv_out = nn.Conv3d(width, 1, 1)

    @classmethod
    def with_weights_of(cls, network: LesionUNet) -> PlainLesionUNet:
        plain = cls(network.width)
        shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
        plain.load_state_dict({name: tensor.view(shapes[name]) for name, tensor in network.state_dict().items()})
        return plain

    def forward(self, noisy: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
        embedded = torch.cat([self.time(self.embed(steps)), condition], 1)
        bias = self.relative_bias(self.buckets(noisy.shape[2]).to(noisy.device)).permute(2, 0, 1)
        first = self.conv_in(noisy)
        x = self.depth_in(first, bias)
        skips = []
        for i, level in enumerate(self.downs):
            x = level(x, embedded, bias)
            skips.append(x)
            x = self.halvings[i](x) if i < len(self.halvings) else x
        x = self.middle(x, embedded, bias)
        for i, level in enumerate(self.ups):
            x = level(torch.cat([x, skips.pop()], 1), embedded, bias)
            x = self.doublings[i](x) if i < len(self.doublings) else x
        return self.conv_out(self.block_out(torch.cat([x, first], 1), None))

    def embed(self, steps: Tensor) -> Tensor:
        half = self.width // 2
        frequency = torch.exp(-torch.arange(half, device=steps.device) * math.log(10_000) / (half - 1))
        angle = steps[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], 1)

    @staticmethod
    def buckets(length: int) -> Tensor:
        """T5's buckets in both directions, exact below 8 and logarithmic up to 32; rows are queries."""
        place = torch.arange(length)
        behind = place[:, None] - place
        offset, far = 16 * (behind < 0), behind.abs()
        wide = 8 + (torch.log(far.clamp(min=1) / 8) / math.log(4) * 8).long()
        return offset + torch.where(far < 8, far, wide.clamp(max=15))
