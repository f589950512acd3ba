"""Lesion classes as channels of their own: a label map taken apart, and their volumes merged into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def class_masks(mask: Tensor, classes: Sequence[int]) -> Tensor:
    """One channel for each lesion class.

    Args:
        mask: (B, 1, *S) class indices.
        classes: K indices; (3, 4) are infarct and no-reflow of Emidec.

    Returns:
        (B, K, *S) bool, no two channels true in one voxel.
    """
    wanted = torch.tensor(tuple(classes), device=mask.device).view(1, -1, *[1] * (mask.dim() - 2))
    return mask == wanted


def merge_classes(volumes: Tensor, masks: Tensor, background: Tensor) -> Tensor:
    """One volume of which each lesion class comes from its own channel.

    Voxels are taken as they are, not weighted, so that there is no seam between classes that touch and none to the
    background.

    Args:
        volumes: (B, K, *S), one channel for each class.
        masks: (B, K, *S) bool as :func:`class_masks` makes them; of two that overlap, the first counts.
        background: (B, 1, *S), what is outside of all classes.

    Returns:
        (B, 1, *S).
    """
    chosen = volumes.gather(1, masks.byte().argmax(1, keepdim=True))
    return torch.where(masks.any(1, keepdim=True), chosen, background)
