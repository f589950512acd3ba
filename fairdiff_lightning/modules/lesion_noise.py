"""What the diffusions of lesions and of lesion masks have in common: their noise, and which classes are lesions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fairdiff_lightning.diffusion import build_scheduler, build_training_scheduler
from fairdiff_lightning.diffusion.cosine import cosine_arguments
from fairdiff_lightning.diffusion.inpaint import check_chain


def lesion_noise(settings: Mapping[str, Any]) -> tuple[Any, float]:
    """The scheduler of the training noise, and how much noise sampling adds on its way.

    Args:
        settings: of the module: ``scheduler``, ``sampler``, their arguments, ``num_steps``, ``eta`` and jumps.

    Raises:
        ValueError: for a sampler, a number of steps or jumps that could not sample, before any training.
    """
    with torch.device("cpu"):
        noise = build_training_scheduler(settings["scheduler"], cosine_arguments(settings["scheduler_args"]))
        sampler = build_scheduler(settings["sampler"], settings["sampler_args"], like=noise)
        ancestral = type(sampler).__name__ == "DDIMScheduler"
        eta = float(ancestral) if settings["eta"] is None else settings["eta"]
        jumps = {name: settings[name] for name in ("jump_length", "jump_n_sample") if name in settings}
        check_chain(sampler, settings["num_steps"], eta, **jumps)
    return noise, eta


def check_lesion_classes(lesions: Sequence[int], boundary: Sequence[int], num_classes: int) -> None:
    """Check the classes that are synthesised, and those that they may lie in.

    Raises:
        ValueError: for none, one that stands twice, or one that the mask does not have.
    """
    chosen = [*lesions, *boundary]
    if not lesions or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(1, num_classes)):
        raise ValueError(
            f"lesion_classes {tuple(lesions)} and boundary_classes {tuple(boundary)}; expected are different classes "
            f"from 1 to {num_classes - 1} (num_classes={num_classes}), and at least one lesion class."
        )
