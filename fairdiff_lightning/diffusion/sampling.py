"""The way from noise to samples that all generators go, along any scheduler of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fairdiff_lightning.diffusion.noise import Generators


def denoise(
    sampler: Any,
    predict: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    num_steps: int,
    generator: Generators,
    eta: float = 0.0,
) -> Tensor:
    """Run a sampler.

    Args:
        sampler: a new scheduler, as :func:`~fairdiff_lightning.diffusion.build_scheduler` makes it.
        predict: gives the prediction (B, ...) for noisy samples (B, ...) at a step (a scalar tensor on their device).
        start: standard normal noise (B, ...); its type and device are those of the chain.
        num_steps: of the sampler.
        generator: one for each sample, for samplers that draw noise on their way.
        eta: noise that DDIM adds, 1 being as much as DDPM.

    Returns:
        Samples (B, ...).

    Raises:
        ValueError: for ``eta`` with a sampler that has none, or steps that begin twice.
    """
    set_steps(sampler, num_steps, start.device)
    extra = step_arguments(sampler, eta, generator)
    noisy: Tensor = start * sampler.init_noise_sigma
    for step in sampler.timesteps:
        predicted = predict(sampler.scale_model_input(noisy, step), step)
        noisy = sampler.step(predicted, step, noisy, **extra, return_dict=False)[0]
    return noisy


def set_steps(sampler: Any, num_steps: int, device: torch.device) -> None:
    """Give a sampler its steps.

    Raises:
        ValueError: when the first two fall on one step of training, as so many that are even in log SNR do: solvers
            would then begin with the second.
    """
    sampler.set_timesteps(num_steps, device=device)
    first = sampler.timesteps[:2].tolist()
    if len(first) > len(set(first)):
        raise ValueError(
            f"{num_steps} steps of {type(sampler).__name__} begin twice at step {first[0]} of "
            f"{sampler.config.num_train_timesteps}: take fewer steps, or use_lu_lambdas=False."
        )


def step_arguments(sampler: Any, eta: float, generator: Generators | None) -> dict[str, Any]:
    """What a sampler's ``step`` is given beside prediction, step and state.

    Raises:
        ValueError: for ``eta`` with a sampler that has none.
    """
    accepted = inspect.signature(sampler.step).parameters
    if eta and "eta" not in accepted:
        raise ValueError(f"eta={eta}: {type(sampler).__name__} has none; take DDIMScheduler, or eta=0.")
    extra: dict[str, Any] = {"eta": eta} if eta else {}
    if generator is not None and "generator" in accepted:
        extra["generator"] = list(generator)
    return extra
