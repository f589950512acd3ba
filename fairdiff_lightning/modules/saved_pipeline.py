"""A ControlNet pipeline in a folder: diffusers' layout, learned prompts, and what it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairdiff_lightning.data.native import atomic_path
from fairdiff_lightning.data.provenance import read_training_cases, write_training_cases
from fairdiff_lightning.modules.generative import TRAINING_CASES
from fairdiff_lightning.networks.checkpoint import read_checkpoint
from fairdiff_lightning.networks.prompts import LEARNED_FILE, Prompts

CONTROLNET = "controlnet"
"""Folder of the control branch in a saved pipeline."""


def save_pipeline(folder: Path, pipeline: Any, prompts: Prompts, training_cases: frozenset[str]) -> None:
    """Save a pipeline so that either of its folder and its control branch's tells what was trained on.

    Args:
        folder: gets diffusers' layout.
        pipeline: ``StableDiffusionControlNetPipeline``.
        prompts: those that were learned in the place of a text encoder are saved too.
        training_cases: marks of the real cases that were trained on.
    """
    pipeline.save_pretrained(str(folder))
    if prompts.learned is not None:
        with atomic_path(folder / LEARNED_FILE) as temporary:
            prompts.write_learned(temporary)
    for part in (folder, folder / CONTROLNET):
        write_training_cases(part, training_cases)


def saved_training_cases(base: str, controlnet: str | None) -> frozenset[str]:
    """What the weights that a module starts from were trained on: a saved pipeline's parts, or a checkpoint of ours."""
    return _training_cases(Path(base)) | _training_cases(Path(controlnet or base))


def _training_cases(weights: Path) -> frozenset[str]:
    if weights.is_file():
        return frozenset(read_checkpoint(weights).get(TRAINING_CASES, ()))
    return read_training_cases(weights)
