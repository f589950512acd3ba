"""The cosine noise schedule with the authors' own cap, for ``trained_betas`` of diffusers' schedulers."""

from __future__ import annotations

import numpy as np


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
