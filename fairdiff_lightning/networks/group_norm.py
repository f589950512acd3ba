"""Group normalisation whose backward pass is fast on a CPU for tensors in channels-last order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ChannelsLastGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` for networks in ``torch.channels_last``: the same numbers, trained faster on a CPU.

    PyTorch's own backward pass takes over ten times as long there in that layout as in the contiguous one, which costs
    more than the convolutions gain (``benchmarks/paired_step.py`` measures whole steps). On other devices, when
    compiled, and for contiguous tensors it is PyTorch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
        if not last or input.device.type != "cpu" or not self.affine or torch.compiler.is_compiling():
            return super().forward(input)
        norm: Any = _GroupNorm
        normalised: Tensor = norm.apply(input, self.weight, self.bias, self.num_groups, self.eps)
        return normalised


def replace_group_norms(network: nn.Module) -> None:
    """Put a :class:`ChannelsLastGroupNorm` of the same weights in the place of each group norm of a network."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.GroupNorm:
                norm = ChannelsLastGroupNorm(child.num_groups, child.num_channels, child.eps, child.affine)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(parent, name, norm)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        normalised, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        places, upstream = (_rows(t).to(wide) for t in (x, gradient))
        mean, rstd = (t.to(wide)[..., None] for t in (mean, rstd))
        scale = weight.to(wide).view(1, mean.shape[1], -1)
        product = upstream * places
        sums, weighted = (_sums(rows).view(len(x), mean.shape[1], -1) for rows in (upstream, product))
        shift, stretch = ((of * scale).sum(2, keepdim=True) for of in (sums, weighted))
        count = places.shape[1] * scale.shape[2]
        slope = (shift * mean - stretch) * rstd**3 / count
        offset = -slope * mean - shift * rstd / count
        factors = [of.expand_as(sums).reshape(len(x), 1, -1) for of in (offset, slope, scale * rstd)]
        torch.addcmul(factors[0], places, factors[1], out=product).addcmul_(upstream, factors[2])
        to_input = product.to(x.dtype).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        to_weight = ((weighted - mean * sums) * rstd).sum(0).flatten()
        return to_input, to_weight.to(weight.dtype), sums.sum(0).flatten().to(weight.dtype), None, None


def _rows(x: Tensor) -> Tensor:
    """(B, H * W, C), a view of a tensor (B, C, H, W) in channels-last order."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, x.shape[1])


def _sums(rows: Tensor) -> Tensor:
    """Sums (B, 1, C) over the rows of (B, N, C), as a product of matrices, which is faster here than ``sum``."""
    with torch.autocast("cpu", enabled=False):
        return rows.new_ones(len(rows), 1, rows.shape[1]) @ rows
