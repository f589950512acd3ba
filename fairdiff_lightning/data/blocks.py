"""Blocks of volumes: cut out or padded in their place in the patient, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.grid import RAS, Array, Native, Size, Volume

AIR = -1000.0
"""HU."""


def centred_start(shape: Sequence[int], size: Sequence[int], centre: Sequence[int] | None = None) -> Size:
    """First voxel of a crop, negative where it begins in the padding.

    Args:
        shape: of the volume.
        size: of the crop.
        centre: voxel that comes to lie at ``size // 2``; None takes the volume's centre, and of an odd difference the
            larger half in front, as the reference (torchio) does.
    """
    if centre is not None:
        start = [c - side // 2 for c, side in zip(centre, size, strict=True)]
    else:
        less = [full - side for full, side in zip(shape, size, strict=True)]
        start = [(d + 1) // 2 if d >= 0 else d // 2 for d in less]
    return start[0], start[1], start[2]


def cut(array: Array, start: Sequence[int], size: Sequence[int], fill: float) -> Array:
    """Cut a block out of an array; what lies beyond its ends is filled.

    A number that the array's type cannot hold (-1000 in a CT of uint16, whose offset was never applied) becomes the
    nearest one that it can, with a warning where anything is filled.
    """
    inner, outer = overlap(array.shape, start, size)
    held = as_type(np.array(fill), array.dtype)
    if held != fill and array[outer].size < np.prod(size):
        rank_zero_warn(
            f"padding of {fill:g} for an array of {array.dtype}, which cannot hold it: {held} is taken, its nearest. "
            "Where the offset of a CT was never applied, add it first (as int16)."
        )
    block = np.full(size, held, array.dtype)
    block[inner] = array[outer]
    return block


def crop_or_pad(volume: Volume, size: Sequence[int], fill: float, centre: Sequence[int] | None = None) -> Volume:
    """Cut or pad a volume to a size around its centre, or another one; its affine follows.

    Args:
        volume: an image or a mask.
        size: (H, W, D).
        fill: of the padding, in the volume's own unit: :data:`AIR` for CT. The reference pads with 0 after scaling to
            [-1, 1], which is -300 HU.
        centre: voxel that becomes the centre; None takes the volume's, see :func:`centred_start`.

    Returns:
        The block, which :func:`place_back` puts back.
    """
    start = centred_start(volume.shape, size, centre)
    return block_of(volume, start, size, fill)


def block_of(volume: Volume, start: Sequence[int], size: Sequence[int], fill: float) -> Volume:
    """The block of a volume that begins at a voxel, in its place in the patient."""
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.asarray(start, np.float64)
    return replace(volume, array=cut(volume.array, start, size, fill), affine=affine)


def place_back(part: Volume, whole: Volume) -> Volume:
    """``whole`` with its voxels where ``part`` lies replaced by those of ``part``, in the type of ``whole``.

    Raises:
        InvalidSampleError: when the two do not lie on one grid.
    """
    inner, outer = overlap(whole.shape, offset_in(part, whole), part.shape)
    array = whole.array.copy()
    array[outer] = as_type(part.array[inner], array.dtype)
    return whole.with_array(array)


def offset_in(part: Volume, whole: Volume) -> Size:
    """Voxel of ``whole`` at which the first one of ``part`` lies, told from their affines.

    Raises:
        InvalidSampleError: when the two do not lie on one grid, with both affines.
    """
    start = np.round(np.linalg.solve(whole.affine, part.affine)[:3, 3])
    if not shares_grid(part, whole):
        raise InvalidSampleError(
            "part of a scan",
            f"affine {part.affine.round(4).tolist()} for a scan of {whole.affine.round(4).tolist()}",
            "voxels of the scan; resample or reorient the part first",
        )
    return int(start[0]), int(start[1]), int(start[2])


def shares_grid(part: Volume, whole: Volume) -> bool:
    """Whether the voxels of ``part`` are voxels of ``whole``, or of its grid gone on beyond its ends."""
    between = np.linalg.solve(whole.affine, part.affine)
    off = np.abs(between[:3, 3] - np.round(between[:3, 3]))
    return bool(np.abs(between[:3, :3] - np.eye(3)).max() <= 1e-3 and off.max() <= 0.1)


def as_type(values: Array, dtype: np.dtype[Any]) -> Array:
    """Values in another type: rounded for integers, and limited to what it can hold."""
    return values if values.dtype == dtype else Native(RAS, dtype).store(values)


def overlap(
    shape: Sequence[int], start: Sequence[int], size: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a block and an array overlap: slices of the block and of the array."""
    low = [min(max(s, 0), full) for s, full in zip(start, shape, strict=True)]
    high = [min(max(s + n, 0), full) for s, n, full in zip(start, size, shape, strict=True)]
    outer = tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))
    inner = tuple(
        slice(o.start - s, o.stop - s) if o.stop > o.start else slice(0, 0) for o, s in zip(outer, start, strict=True)
    )
    return inner, outer
