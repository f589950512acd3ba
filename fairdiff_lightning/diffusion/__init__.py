"""What the generative modules share, on top of diffusers' schedulers."""

from fairdiff_lightning.diffusion.noise import gaussian, generators, timesteps
from fairdiff_lightning.diffusion.schedulers import build_scheduler, training_target

__all__ = ["build_scheduler", "gaussian", "generators", "timesteps", "training_target"]
