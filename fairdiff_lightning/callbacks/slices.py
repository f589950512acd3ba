"""Flat pictures of volumes: the slice that shows most of a lesion, and three orthogonal ones side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def lesion_slice(mask: Tensor) -> int:
    """Index along the last axis of the slice of a mask (1, H, W, D) with the largest foreground; the middle without."""
    areas = (mask > 0).sum((0, 1, 2))
    return int(areas.argmax()) if int(areas.max()) else mask.shape[-1] // 2


def flat(image: Tensor, mask: Tensor) -> Tensor:
    """A picture (C, H, W) as it is, and of a volume (C, H, W, D) the slice that shows most of the mask's foreground."""
    return image if image.dim() == 3 else image[..., lesion_slice(mask)]


def orthogonal(volumes: Sequence[Tensor], mask: Tensor, spacing: Sequence[float] | None = None) -> list[Tensor]:
    """Cut three orthogonal planes through the foreground's middle and lay them side by side, to scale.

    Args:
        volumes: (C, H, W, D) each, floating point for images and integers for class indices.
        mask: (1, H, W, D), through whose foreground the planes are cut; through the middle where it is empty.
        spacing: of the voxels, for the scale; equal when None.

    Returns:
        For each volume (C, h, w): the planes of H and W, of D and W, and of D and H, the last two with D running up.
    """
    inside = (mask[0] > 0).nonzero()
    middle = inside.float().mean(0).round().long() if len(inside) else torch.tensor(mask.shape[1:]) // 2
    row, column, depth = middle.tolist()
    steps = torch.tensor(spacing if spacing is not None else (1.0, 1.0, 1.0), dtype=torch.float64)
    height, width, length = (max(1, round(float(v))) for v in torch.tensor(mask.shape[1:]) * steps / steps.min())
    sizes = ((height, width), (length, width), (length, height))

    def montage(volume: Tensor) -> Tensor:
        planes = (
            volume[..., depth],
            volume[:, row].transpose(-1, -2).flip(-2),
            volume[:, :, column].transpose(-1, -2).flip(-2),
        )
        scaled = [_resized(plane, size) for plane, size in zip(planes, sizes, strict=True)]
        tallest = max(height, length)
        return torch.cat([F.pad(plane, (0, 0, 0, tallest - plane.shape[-2])) for plane in scaled], -1)

    return [montage(volume) for volume in volumes]


def _resized(plane: Tensor, size: tuple[int, int]) -> Tensor:
    if plane.is_floating_point():
        return F.interpolate(plane[None], size, mode="bilinear", antialias=True)[0]
    return F.interpolate(plane[None].float(), size, mode="nearest-exact")[0].to(plane.dtype)
