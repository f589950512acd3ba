"""The cosine noise schedule with the authors' own cap, for ``trained_betas`` of diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

NUM_STEPS = 300
"""Of LeFusion's training."""
_OTHER_NOISE = {"trained_betas", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps"}


def cosine_betas(num_steps: int, s: float = 0.008, max_beta: float = 0.9999) -> list[float]:
    """Noise added in each step by the cosine schedule.

    Nichol and Dhariwal, *Improved Denoising Diffusion Probabilistic Models*, ICML 2021, equation 17. diffusers'
    ``squaredcos_cap_v2`` is the same with a cap of 0.999, which leaves ten times the signal power at the last step.
    Hand both ``trained_betas`` and ``num_train_timesteps=num_steps`` to a scheduler.

    Args:
        num_steps: of training, 300 for LeFusion.
        s: offset that keeps the first steps from being too small.
        max_beta: cap of a step.

    Returns:
        ``num_steps`` numbers in (0, max_beta], from the least noisy step on.
    """
    position = np.linspace(0, 1, num_steps + 1)
    kept = np.cos((position + s) / (1 + s) * np.pi / 2) ** 2
    betas: list[float] = (1 - kept[1:] / kept[:-1]).clip(0, max_beta).tolist()
    return betas


def cosine_arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of a scheduler of diffusers with LeFusion's noise, unless those given bring a noise of their own."""
    own = dict(given or {})
    if _OTHER_NOISE & own.keys():
        return own
    return {"trained_betas": cosine_betas(NUM_STEPS), "num_train_timesteps": NUM_STEPS, **own}
