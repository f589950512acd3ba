"""Weights of the training loss over the noise levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairdiff_lightning.diffusion.schedulers import signal_power


def min_snr_weights(scheduler: Any, steps: Tensor, gamma: float) -> Tensor:
    """Weights that bound a step's share of the loss on the clean sample by ``gamma`` (min-SNR).

    Hang et al., *Efficient Diffusion Training via Min-SNR Weighting Strategy*, ICCV 2023, arXiv:2303.09556; gamma
    is 5 there. The noisiest steps weigh next to nothing under ``v_prediction`` and ``sample``.

    Args:
        scheduler: of the training noise.
        steps: step (B,) of each sample.
        gamma: largest weight, in units of the signal-to-noise ratio.

    Returns:
        (B,), on the device of ``steps``: what the squared error of ``training_target`` is multiplied by.

    Raises:
        ValueError: for a prediction type other than epsilon, v_prediction and sample.
    """
    kept = signal_power(scheduler, steps)
    snr = (kept / (1 - kept)).float()
    bounded: Tensor = snr.clamp(max=gamma)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return torch.where(snr > 0, bounded / snr.clamp(min=torch.finfo(snr.dtype).tiny), 1.0)
    if kind == "v_prediction":
        return bounded / (snr + 1)
    if kind == "sample":
        return bounded
    raise ValueError(f"prediction_type {kind!r}; expected is epsilon, v_prediction or sample.")
