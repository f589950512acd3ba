"""What the generative modules share, on top of diffusers' schedulers."""

from fairdiff_lightning.diffusion.cosine import cosine_betas
from fairdiff_lightning.diffusion.inpaint import inpaint
from fairdiff_lightning.diffusion.lesion_channels import class_masks, merge_classes
from fairdiff_lightning.diffusion.lesion_histogram import jitter, lesion_histogram
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
from fairdiff_lightning.diffusion.visits import visit_list

__all__ = [
    "add_noise",
    "antithetic_timesteps",
    "build_scheduler",
    "build_training_scheduler",
    "class_masks",
    "clean_estimate",
    "cosine_betas",
    "denoise",
    "gaussian",
    "generators",
    "inpaint",
    "jitter",
    "lesion_histogram",
    "merge_classes",
    "sample_guide",
    "sample_guided",
    "sample_pairs",
    "timesteps",
    "training_target",
    "visit_list",
]
