"""Volumes on other grids, by MONAI: to a spacing, and predictions back to the grid of their file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fairdiff_lightning.data.blocks import overlap
from fairdiff_lightning.data.grid import Volume


def to_spacing(volume: Volume, spacing: Sequence[float], mode: Literal["bilinear", "nearest"]) -> Volume:
    """Resample a volume to a spacing, mm, along its own axes; the same volume where it has it already.

    Args:
        volume: an image or a mask.
        spacing: size of a voxel along each axis, mm.
        mode: ``nearest`` for masks.

    Raises:
        ValueError: for a spacing that is not three sizes above 0.
    """
    if len(spacing) != 3 or not all(np.isfinite(size) and size > 0 for size in spacing):
        raise ValueError(f"spacing is {tuple(spacing)}; expected are three sizes of a voxel above 0, mm, as (1, 1, 3).")
    if np.allclose(volume.spacing, spacing, atol=1e-3):
        return volume
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    image = MetaTensor(torch.from_numpy(volume.array.astype(np.float32))[None], affine=torch.from_numpy(volume.affine))
    moved = Spacing(spacing, mode=mode, padding_mode="border", dtype=torch.float32)(image)
    array = moved[0].numpy().astype(volume.array.dtype if mode == "nearest" else np.float32)
    return replace(volume, array=array, affine=np.asarray(moved.affine, np.float64))


def restore_volumes(
    logits: Tensor, affine: Tensor, native_affine: Tensor, native_size: Tensor
) -> Tensor | list[Tensor]:
    """Turn logits of blocks into masks on the grids of their files, background outside of the block.

    A block of the file's own voxels is put back as it is; one on another grid is interpolated before it is decided.

    Args:
        logits: (B, K, h, w, d).
        affine: (B, 4, 4) of the blocks.
        native_affine: (B, 4, 4) of the files.
        native_size: (B, 3) sides of the files, voxels.

    Returns:
        int64 masks (B, 1, H, W, D), or a list of (1, H, W, D) when the files differ in size.
    """
    rows = zip(logits.float(), affine.cpu(), native_affine.cpu(), native_size.tolist(), strict=True)
    masks = [_restore(*row) for row in rows]
    return torch.stack(masks) if len({mask.shape for mask in masks}) == 1 else masks


def move(
    values: Tensor,
    affine: Tensor,
    target: Tensor,
    size: Sequence[int],
    mode: Literal["bilinear", "nearest"] = "nearest",
) -> Tensor:
    """An image or class indices (C, H, W, D) on another grid, 0 where there is nothing.

    Args:
        values: of any type, which they keep.
        affine: (4, 4) of the values.
        target: (4, 4) of the other grid.
        size: sides of the other grid, voxels.
        mode: ``nearest`` for class indices.
    """
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    resample = SpatialResample(mode=mode, padding_mode="zeros", dtype=torch.float32)
    placed = MetaTensor(values.cpu().float(), affine=affine.cpu())
    moved: Tensor = resample(placed, dst_affine=target.cpu(), spatial_size=list(size)).as_tensor()
    return torch.as_tensor(moved, dtype=values.dtype, device=values.device)


def _restore(logits: Tensor, affine: Tensor, native_affine: Tensor, size: Sequence[int]) -> Tensor:
    between = torch.linalg.solve(native_affine, affine)
    start = between[:3, 3].round()
    if (between[:3, :3] - torch.eye(3)).abs().max() > 1e-3 or (between[:3, 3] - start).abs().max() > 0.1:
        return _interpolated(logits, affine, native_affine, size)
    inner, outer = overlap(size, [int(s) for s in start], logits.shape[1:])
    mask = torch.zeros(1, *size, dtype=torch.int64, device=logits.device)
    mask[(slice(None), *outer)] = logits[(slice(None), *inner)].argmax(0, keepdim=True)
    return mask


def _interpolated(logits: Tensor, affine: Tensor, native_affine: Tensor, size: Sequence[int]) -> Tensor:
    return move(logits.softmax(0), affine, native_affine, size, "bilinear").argmax(0, keepdim=True)
