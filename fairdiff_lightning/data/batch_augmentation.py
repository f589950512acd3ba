"""Augmentation of whole batches: whatever shows one sample moves alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fairdiff_lightning.data import classical_augmentation
from fairdiff_lightning.data.augmentation import RandomRotateFlip
from fairdiff_lightning.data.classical_augmentation import ClassicalAugmentation
from fairdiff_lightning.data.edge_augmentation import RandomZoomRotate
from fairdiff_lightning.data.patch_merge import PatchMerge, merge_partners
from fairdiff_lightning.data.sample import Sample

Augmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""Maps image (B, C, H, W[, D]), mask (B, 1, H, W[, D]) and draws to image and mask."""
Classical = classical_augmentation.Name
AugmentationArgument = (
    Literal["none", "rotate_flip", "zoom_rotate", Classical]
    | RandomRotateFlip
    | RandomZoomRotate
    | ClassicalAugmentation
)
"""A name, or an augmentation of pictures with arguments of its own."""


def picture_augmentation(
    wanted: AugmentationArgument | None, edges: bool = False
) -> Augmentation | RandomZoomRotate | None:
    """The augmentation of pictures in [0, 1] that is asked for.

    Args:
        wanted: ``rotate_flip``, see :class:`RandomRotateFlip`; ``zoom_rotate``, see :class:`RandomZoomRotate`; a row of
            :class:`ClassicalAugmentation`; one of the three themselves, for other arguments than their defaults;
            ``none``; None takes ``zoom_rotate`` for samples with edges, else ``rotate_flip``.
        edges: whether the samples have edges.

    Raises:
        ValueError: for one that does not suit the samples.
    """
    wanted = wanted or ("zoom_rotate" if edges else "rotate_flip")
    found = _by_name(wanted) if isinstance(wanted, str) else wanted
    if isinstance(found, RandomZoomRotate) > edges or (edges and isinstance(found, ClassicalAugmentation)):
        allowed = "none, rotate_flip or zoom_rotate" if edges else "none, rotate_flip or a classical one"
        raise ValueError(
            f"augmentation='{wanted}' for samples {'with' if edges else 'without'} edges: expected is {allowed}. "
            "Classical ones change intensities, and edges are none; `zoom_rotate` needs the option `edges`."
        )
    return found


def augment_batch(batch: Sample, augmentation: Augmentation | RandomZoomRotate, draws: torch.Generator) -> Sample:
    """Change image, ``partner``, ``edge`` and mask of a batch alike: as channels of one image, from the same draws."""
    changed = cast(dict[str, Any], dict(batch))
    zooms = isinstance(augmentation, RandomZoomRotate)
    names = [name for name in ("image", "partner", "edge") if name in changed and not (zooms and name == "edge")]
    joined = torch.cat([changed[name] for name in names], 1)
    if isinstance(augmentation, RandomZoomRotate):
        joined, changed["mask"], changed["edge"] = augmentation(joined, changed["mask"], changed["edge"], draws)
    else:
        joined, changed["mask"] = augmentation(joined, changed["mask"], draws)
    parts = torch.split(joined, [changed[name].shape[1] for name in names], 1)
    return cast(Sample, changed | dict(zip(names, parts, strict=True)))


def merge_batch(batch: Sample, merge: PatchMerge, draws: torch.Generator) -> Sample:
    """Merge real images with their partners, or draw ``keep_real``, by which a module merges its logits."""
    batch = merge_partners(batch, merge, draws)
    if "partner" in batch:
        batch["keep_real"] = merge.mask(batch["image"].shape, draws, batch["image"].device)
    return batch


def _by_name(name: str) -> RandomRotateFlip | RandomZoomRotate | ClassicalAugmentation | None:
    if name in ("none", "rotate_flip"):
        return RandomRotateFlip() if name == "rotate_flip" else None
    return RandomZoomRotate() if name == "zoom_rotate" else ClassicalAugmentation(cast(Classical, name))
