"""Noise that belongs to a sample: every draw of a generated sample comes from its own seed, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = Sequence[torch.Generator]


def generators(seeds: Tensor) -> list[torch.Generator]:
    """One CPU generator for each seed (B,) int64: the same numbers at any batch size and on any device.

    Hand the list to diffusers' schedulers (``step(..., generator=...)``) and to the functions below.
    """
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def gaussian(like: Tensor, generator: Generators | None = None) -> Tensor:
    """Standard normal noise of the shape, type and device of ``like`` (B, ...).

    Args:
        like: what the noise will be added to.
        generator: one generator for each sample; PyTorch's global one on the device when None.
    """
    if generator is None:
        return torch.randn_like(like)
    from diffusers.utils.torch_utils import randn_tensor

    drawn: Tensor = randn_tensor(like.shape, generator=list(generator), device=like.device, dtype=like.dtype)
    return drawn


def timesteps(like: Tensor, num_steps: int, generator: Generators | None = None) -> Tensor:
    """Steps (B,) int64, uniform on 0 ... num_steps - 1, on the device of ``like`` (B, ...).

    Args:
        like: a tensor with the batch's length and device.
        num_steps: number of training steps of the noise schedule.
        generator: one generator for each sample; PyTorch's global one on the device when None.
    """
    if generator is None:
        return torch.randint(num_steps, (len(like),), device=like.device)
    return torch.cat([torch.randint(num_steps, (1,), generator=g) for g in generator]).to(like.device)


def antithetic_timesteps(like: Tensor, num_steps: int) -> Tensor:
    """Steps (B,) int64 in pairs t and num_steps - 1 - t, which makes the mean loss of a batch vary less.

    As PIG's code draws them (Algorithm 1, stage x): B // 2 + 1 of them, then their mirror images, cut to B.
    """
    drawn = torch.randint(num_steps, (len(like) // 2 + 1,), device=like.device)
    return torch.cat([drawn, num_steps - 1 - drawn])[: len(like)]
