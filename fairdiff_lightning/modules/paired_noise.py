"""The schedulers of PIG: the noise that both networks are trained on, and the sampler that follows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairdiff_lightning.diffusion import build_scheduler, build_training_scheduler

PAPER_NOISE = {"num_train_timesteps": 1024, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SAMPLERS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {"use_lu_lambdas": True},  # even in log SNR, where it needs the fewest steps
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
}
"""Arguments of samplers where diffusers' own are not meant: estimates are not clipped."""


def training_noise(hparams: Mapping[str, Any]) -> Any:
    """A new scheduler of the noise that ``scheduler`` and ``scheduler_args`` name, the paper's where they say nothing.

    Raises:
        ValueError: for an unknown name or argument, or noise that cannot be trained with.
    """
    return build_training_scheduler(hparams["scheduler"], PAPER_NOISE | (hparams["scheduler_args"] or {}))


def noise_sampler(hparams: Mapping[str, Any], noise: Any) -> Any:
    """A new scheduler for sampling, that ``sampler`` and ``sampler_args`` name, along the noise of training.

    Raises:
        ValueError: for an unknown name or argument.
    """
    name, arguments = hparams["sampler"], hparams["sampler_args"]
    return build_scheduler(name, SAMPLERS.get(name, {}) | (arguments or {}), like=noise)
