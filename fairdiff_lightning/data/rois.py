"""Regions of interest: cut around lesions out of full scans, put back into them, and placed where none is yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, signal

from fairdiff_lightning.data.airways import find_airways
from fairdiff_lightning.data.blocks import shares_grid
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.grid import Native
from fairdiff_lightning.data.resample import move
from fairdiff_lightning.data.volumes import (
    AIR,
    RAS,
    Array,
    Size,
    Volume,
    as_type,
    block_of,
    centred_start,
    check_hu,
    check_same_grid,
    offset_in,
)

WHOLE = np.ones((3, 3, 3), bool)
"""Voxels that touch at a corner belong together."""
SMALLEST_LUNG, DARKEST_LUNG = 20e3, -950.0
"""Cubic mm that a part of a lung in the scan has, and HU of the median of emphysema: what is darker is air."""


@dataclass(frozen=True)
class ROI:
    """A block of a scan around one lesion.

    Args:
        image: the block, in its place in the patient.
        mask: of every lesion in the block, not of this one alone: another one is no healthy tissue.
        start: voxel of the scan at which the block begins, negative where it begins in padding.
        is_cut: whether the lesion goes on outside of the block.
    """

    image: Volume
    mask: Volume
    start: Size
    is_cut: bool


def extract_rois(
    image: Volume,
    mask: Volume,
    size: Sequence[float],
    unit: Literal["voxel", "mm"] = "voxel",
    min_voxels: int = 1,
    fill: float = AIR,
) -> list[ROI]:
    """Cut a block around each connected lesion of a scan.

    A block at the border is moved inwards, so that it shows tissue and no padding; it is padded only along an axis on
    which the scan is shorter than the block.

    Args:
        image: full scan.
        mask: class indices on the same grid; lesions that touch are one, of whatever classes.
        size: of the blocks, (H, W, D).
        unit: of ``size``; mm are rounded to whole voxels, nothing is resampled.
        min_voxels: smaller lesions get no block.
        fill: intensity of padding; see :func:`~fairdiff_lightning.data.blocks.cut` where the scan cannot hold it.

    Returns:
        Largest lesion first.

    Raises:
        InvalidSampleError: when image and mask do not lie on one grid, or no lesion is large enough.
    """
    check_same_grid(image, mask, "lesion mask")
    voxels = [max(1, round(s)) for s in (np.asarray(size) / image.spacing if unit == "mm" else size)]
    labels, count = ndimage.label(mask.array != 0, WHOLE)
    volumes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    boxes = ndimage.find_objects(labels)
    kept = [k for k in np.argsort(-volumes, kind="stable") if volumes[k] >= min_voxels]
    if not kept:
        raise InvalidSampleError(
            "lesion mask", f"{count} lesions, the largest of {volumes.max(initial=0)} voxels", f"one of {min_voxels}"
        )
    return [block_around(image, mask, boxes[k], voxels, fill) for k in kept]


def block_around(image: Volume, mask: Volume, box: tuple[slice, ...], size: Sequence[int], fill: float) -> ROI:
    """Cut a block about a box of voxels, moved and padded as those of :func:`extract_rois`.

    Args:
        image: full scan.
        mask: class indices on the same grid.
        box: what the block has in its middle; ``is_cut`` where it does not fit.
        size: (H, W, D), voxels.
        fill: intensity of padding.
    """
    centre = [(side.start + side.stop) // 2 for side in box]
    start = [_moved_inwards(c - n // 2, n, full) for c, n, full in zip(centre, size, image.shape, strict=True)]
    is_cut = any(b.start < s or b.stop > s + n for b, s, n in zip(box, start, size, strict=True))
    return ROI(
        block_of(image, start, size, fill), block_of(mask, start, size, 0), (start[0], start[1], start[2]), is_cut
    )


def paste_roi(scan: Volume, roi: Volume, lesion: Array) -> Volume:
    """Put the lesion of a block back into the scan; every other voxel stays bit for bit what it is.

    A block of the scan's voxels is put back as it is, also with its axes in another order; one on another grid is
    resampled to the scan's, the image linearly and the mask by the nearest voxel.

    Args:
        scan: full scan; its affine, type and file header are kept.
        roi: block in the intensities of the scan, at its place by its affine.
        lesion: (H, W, D) of the block; voxels other than 0 are replaced.

    Raises:
        InvalidSampleError: for a mask of another size, a lesion that is empty, partly outside of the scan or too small
            for its voxels, and for values in it that are not finite or that the scan's type cannot hold.
    """
    if lesion.shape != roi.shape:
        raise InvalidSampleError("lesion", f"mask of {lesion.shape} voxels for a block of {roi.shape}", "one shape")
    if not lesion.any():
        raise InvalidSampleError("lesion", "an empty mask", "voxels to replace")
    if not np.isfinite(roi.array[lesion != 0]).all():
        raise InvalidSampleError("lesion", "NaN or infinite values in the block", "finite intensities of the scan")
    block, inside = roi.reoriented(scan.axes), replace(roi, array=lesion, native=None).reoriented(scan.axes)
    places = _voxels_in(inside, scan)
    outside = np.count_nonzero(((places < -0.5) | (places > np.array(scan.shape) - 0.5)).any(1))
    if outside:
        raise InvalidSampleError(
            "lesion", f"{outside} of {len(places)} voxels outside of the scan of {scan.shape}", "a lesion inside"
        )
    if not shares_grid(block, scan):
        block, inside = _on_grid_of(scan, block, inside, places)
    where = np.argwhere(inside.array != 0)
    array, values = scan.array.copy(), block.array[tuple(where.T)]
    _check_holds(scan, values)
    array[tuple((where + offset_in(block, scan)).T)] = as_type(values, array.dtype)
    return scan.with_array(array)


def lung_mask(scan: Volume, threshold: float = -400.0, closing: float = 8.0) -> Volume:
    """Find the lungs in a CT of the chest: dark, not the air around the body, large, closed over vessels and nodules.

    The trachea and the main bronchi, see :func:`~fairdiff_lightning.data.airways.find_airways`, are left out.

    Args:
        scan: HU, in RAS order, with the lungs whole or cut by the field of view.
        threshold: HU below which tissue is lung or air.
        closing: half the width, mm, of vessels and of nodules at the wall that still belong to the lung.

    Returns:
        uint8 {0, 1} on the scan's grid.

    Raises:
        InvalidSampleError: for values that are no HU, or a scan without lungs.
    """
    airways = find_airways(scan.with_array(check_hu(scan.array, "scan")), threshold)
    labels, count = ndimage.label((scan.array < threshold) & ~airways)
    sizes = np.bincount(labels.ravel(), minlength=count + 1) * np.prod(scan.spacing)
    large = [k for k in np.argsort(-sizes[1:], kind="stable") + 1 if sizes[k] > SMALLEST_LUNG]
    inside = [k for k in large if not _is_outside_air(scan.array, labels == k)]
    largest = [k for k in inside[:2] if sizes[k] > 0.1 * sizes[inside[0]]]
    if not largest:
        raise InvalidSampleError(
            "scan", f"no region below {threshold:g} HU of 20 ml or more inside of the body", "a CT of the chest"
        )
    lungs = _close(np.isin(labels, largest), closing, scan.spacing)
    filled = np.stack([ndimage.binary_fill_holes(lungs[..., k]) for k in range(lungs.shape[2])], -1)
    return replace(scan, array=(filled & ~airways).astype(np.uint8), native=None)


def candidate_places(
    organ: Volume,
    lesion: Array | Sequence[int],
    count: int,
    seed: int,
    margin: float = 0.0,
    distance: float = 0.0,
) -> NDArray[np.int64]:
    """Draw places at which a lesion lies inside of an organ as a whole.

    Args:
        organ: mask of the organ, without what must be kept free.
        lesion: (h, w, d) mask, or three sides of a box, in voxels of the organ's grid.
        count: how many places.
        seed: of the draw; the first places of a larger count are those of a smaller one.
        margin: least distance of the lesion from the organ's border, mm.
        distance: least distance between the centres of two places, mm.

    Returns:
        (count, 3) first voxels of the lesion's block, as :func:`~fairdiff_lightning.data.volumes.block_of` takes them;
        negative where the block, but not the lesion in it, begins outside of the scan.

    Raises:
        InvalidSampleError: for an empty lesion, or when fewer places are found, with their number.
    """
    shape = np.ones([int(side) for side in lesion], bool) if np.ndim(lesion) == 1 else np.asarray(lesion) != 0
    if not shape.any():
        raise InvalidSampleError("lesion", "an empty mask", "a lesion to place")
    first, tight = _trim(shape)
    room = deep_inside(organ, margin).array
    corner, inside = _trim(room != 0) if room.any() else (np.zeros(3, np.int64), room != 0)
    starts = _starts_inside(inside, tight) + corner
    free = np.random.default_rng(seed).permutation(starts)
    chosen: list[NDArray[np.int64]] = []
    while len(chosen) < count and len(free):
        chosen.append(free[0])
        apart = np.linalg.norm((free - free[0]) * organ.spacing, axis=1) >= max(distance, 1e-6)
        free = free[apart]
    if len(chosen) < count:
        raise InvalidSampleError(
            "organ mask",
            f"{len(chosen)} places for a lesion of {tight.shape} voxels, margin {margin:g}, distance {distance:g} mm",
            f"{count}; ask for fewer, a smaller lesion, margin or distance",
        )
    return np.array(chosen, np.int64).reshape(-1, 3) - first


def deep_inside(organ: Volume, margin: float) -> Volume:
    """The voxels of an organ that lie further than ``margin`` mm from its border, uint8 {0, 1}."""
    deep = (organ.array != 0).astype(np.uint8)
    if margin > 0 and deep.any():
        (box,) = ndimage.find_objects(deep)
        away = ndimage.distance_transform_edt(np.pad(deep[box], 1), sampling=organ.spacing)
        deep[box] = away[1:-1, 1:-1, 1:-1] > margin
    return organ.with_array(deep)


def _voxels_in(lesion: Volume, scan: Volume) -> NDArray[np.float64]:
    """Where in the scan the centres of a lesion's voxels lie, (N, 3), in voxels of the scan."""
    between = np.linalg.solve(scan.affine, lesion.affine)
    places: NDArray[np.float64] = np.argwhere(lesion.array != 0) @ between[:3, :3].T + between[:3, 3]
    return places


def _on_grid_of(scan: Volume, block: Volume, lesion: Volume, places: NDArray[np.float64]) -> tuple[Volume, Volume]:
    """A block and its lesion on the part of the scan's grid that holds the lesion."""
    reach = 1 + np.ceil(block.spacing.max() / scan.spacing)
    low = np.maximum(np.floor(places.min(0) - reach), 0).astype(int)
    high = np.minimum(np.ceil(places.max(0) + reach) + 1, scan.shape).astype(int)
    grid = block_of(scan, low.tolist(), (high - low).tolist(), 0)
    affine, target = block.affine.copy(), torch.from_numpy(grid.affine)
    affine[:3, 3] -= affine[:3, :3].sum(1)  # one voxel more on each side: no 0 from beyond the ends mixes in
    wider, place = np.pad(block.array.astype(np.float32), 1, mode="edge"), torch.from_numpy(affine)
    image = move(torch.from_numpy(wider)[None], place, target, grid.shape, "bilinear")
    mask = np.pad(lesion.array != 0, 1).astype(np.uint8)
    inside = move(torch.from_numpy(mask)[None], place, target, grid.shape, "nearest")
    if not inside.any():
        raise InvalidSampleError(
            "lesion",
            f"{np.count_nonzero(lesion.array)} voxels of {block.spacing.round(2).tolist()} mm",
            f"one that covers the centre of a voxel of the scan, of {scan.spacing.round(2).tolist()} mm",
        )
    return grid.with_array(image[0].numpy()), grid.with_array(inside[0].numpy())


def _check_holds(scan: Volume, values: Array) -> None:
    """Check that neither the array nor the file that the scan comes from limits what is put into it."""
    for holder in (Native(RAS, scan.array.dtype), scan.native):
        if holder is None or holder.dtype.kind not in "iu":
            continue
        limits, half = np.iinfo(holder.dtype), np.abs(holder.slope).max() / 2
        ends = np.stack([end * np.atleast_1d(holder.slope) + holder.intercept for end in (limits.min, limits.max)])
        low, high = ends.min(0).max(), ends.max(0).min()  # of every slice
        if values.min() < low - half or values.max() > high + half:
            raise InvalidSampleError(
                "lesion",
                f"values from {values.min():g} to {values.max():g} for a scan of {holder.dtype}, which holds "
                f"{low:g} to {high:g}",
                "intensities of the scan; where its HU offset was never applied, add it to the scan first "
                "(as int16), or take it from the lesion",
            )


def _moved_inwards(start: int, size: int, full: int) -> int:
    if size > full:
        return centred_start([full] * 3, [size] * 3)[0]
    return min(max(start, 0), full - size)


def _is_outside_air(values: Array, region: NDArray[np.bool_]) -> bool:
    """Whether a region touches a side of the scan and is air: a lung that the field of view cuts is not as dark."""
    touches = any(side.any() for side in (region[0], region[-1], region[:, 0], region[:, -1]))
    return touches and bool(np.median(values[region]) < DARKEST_LUNG)


def _close(mask: Array, radius: float, spacing: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Close with a ball of ``radius`` mm, by distances: as fast for a large ball as for a small one."""
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    reach = [int(np.ceil(radius / step)) + 1 for step in spacing]
    padded = np.pad(mask[box], [(r, r) for r in reach])
    grown = ndimage.distance_transform_edt(~padded, sampling=spacing) <= radius
    closed = ndimage.distance_transform_edt(grown, sampling=spacing) > radius
    inner = tuple(slice(r, r + b.stop - b.start) for r, b in zip(reach, box, strict=True))
    whole = np.zeros(mask.shape, bool)
    whole[box] = closed[inner] | mask[box]
    return whole


def _trim(shape: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The first voxel of a mask's bounding box, and the box."""
    (box,) = ndimage.find_objects(shape.astype(np.uint8))
    return np.array([side.start for side in box], np.int64), shape[box]


def _starts_inside(inside: NDArray[np.bool_], lesion: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where a lesion's bounding box may begin so that no voxel of the lesion lies outside, (N, 3) in scan order."""
    if not inside.any() or any(have < need for have, need in zip(inside.shape, lesion.shape, strict=True)):
        return np.zeros((0, 3), np.int64)
    forbidden = (~inside).astype(np.float32)
    flipped = lesion[::-1, ::-1, ::-1].astype(np.float32)
    outside = signal.oaconvolve(forbidden, flipped, mode="valid")  # how many voxels of the lesion would lie outside
    return np.argwhere(outside < 0.5)
