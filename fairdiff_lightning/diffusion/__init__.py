"""What the generative modules share, on top of diffusers' schedulers."""

from fairdiff_lightning.diffusion.noise import antithetic_timesteps, gaussian, generators, timesteps
from fairdiff_lightning.diffusion.paired import sample_guide, sample_guided, sample_pairs
from fairdiff_lightning.diffusion.sampling import denoise
from fairdiff_lightning.diffusion.schedulers import (
    add_noise,
    build_scheduler,
    build_training_scheduler,
    clean_estimate,
    training_target,
)

__all__ = [
    "add_noise",
    "antithetic_timesteps",
    "build_scheduler",
    "build_training_scheduler",
    "clean_estimate",
    "denoise",
    "gaussian",
    "generators",
    "sample_guide",
    "sample_guided",
    "sample_pairs",
    "timesteps",
    "training_target",
]
