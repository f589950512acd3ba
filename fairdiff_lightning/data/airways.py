"""The trachea and the main bronchi in a CT of the chest, which are no lung tissue."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fairdiff_lightning.data.grid import Array, Volume

Bools = NDArray[np.bool_]

IN_PLANE = np.zeros((3, 3, 3), bool)
IN_PLANE[..., 1] = True
"""Voxels of one slice that touch."""
LUMEN, AREA, HEIGHT = -950.0, (50.0, 800.0), 15.0
"""HU that the median of a trachea is below, its smallest and largest cross-section, square mm, and least height, mm."""
LEVELS = (LUMEN, -900.0, -850.0, -800.0, -750.0, -700.0)
"""HU below which the lumen is grown, step by step: partial volume makes that of a small bronchus brighter."""
NARROWEST, LARGEST, WALL = 1.5, 100e3, 2.0
"""Least radius of a bronchus, mm; cubic mm beyond which growth has leaked into the lung; thickness of a wall, mm."""


def find_airways(scan: Volume, threshold: float) -> Bools:
    """Find the trachea and the main bronchi with their walls.

    A trachea is a tube: in slice after slice a small region of air with tissue around it. From there it is grown down
    into the bronchi, through all that is darker than a level that rises, for as long as what it reaches stays as small
    as airways are. Gas elsewhere (oesophagus, bowel) may be found too, and is no lung either.

    Args:
        scan: HU, in RAS order.
        threshold: HU below which a voxel is lung or air.

    Returns:
        (H, W, D) of the scan; nothing where no trachea is in the field of view.
    """
    seeds = _tubes(scan, threshold)
    if not seeds.any():
        return seeds
    lumen, disc = seeds, _disc(NARROWEST, scan.spacing)
    for level in LEVELS:
        labels, count = ndimage.label(ndimage.binary_opening(scan.array < level, disc))
        small = np.bincount(labels.ravel(), minlength=count + 1) * np.prod(scan.spacing) <= LARGEST
        reached = np.zeros(count + 1, bool)
        reached[labels[seeds]] = True
        reached[0] = False
        lumen = lumen | (reached & small)[labels]
    return _grown(lumen, WALL, scan.spacing)


def _tubes(scan: Volume, threshold: float) -> Bools:
    """Regions of air, of the cross-section of a trachea in every slice and as high as a part of one."""
    labels, count = ndimage.label(scan.array < threshold, IN_PLANE)
    area = np.bincount(labels.ravel(), minlength=count + 1) * np.prod(scan.spacing[:2])
    fits = (area >= AREA[0]) & (area <= AREA[1])
    fits[0] = False
    for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        fits[side] = False
    inside: Bools = fits[labels]
    found = np.flatnonzero(fits)
    if not len(found):
        return inside
    fits[found] = np.asarray(ndimage.median(scan.array[inside], labels[inside], found)) < LUMEN
    tubes, _ = ndimage.label(fits[labels])
    heights = [(box[2].stop - box[2].start) * scan.spacing[2] for box in ndimage.find_objects(tubes)]
    tall: Bools = (np.array([0, *heights]) >= HEIGHT)[tubes]
    return tall


def _disc(radius: float, spacing: NDArray[np.float64]) -> Bools:
    """The voxels (h, w, 1) of a slice within a radius, mm, and the next ones at least."""
    reach = [max(1, int(radius / step)) for step in spacing[:2]]
    y, x = np.ogrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    within: Bools = (np.hypot(y * spacing[0], x * spacing[1]) <= max(radius, *spacing[:2]))[..., None]
    return within


def _grown(mask: Array, radius: float, spacing: NDArray[np.float64]) -> Bools:
    """A mask with all that is within a radius, mm, of it."""
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    reach = [int(radius / step) + 1 for step in spacing]
    wider = tuple(slice(max(side.start - r, 0), side.stop + r) for side, r in zip(box, reach, strict=True))
    whole = mask.copy()
    whole[wider] = ndimage.distance_transform_edt(~mask[wider], sampling=spacing) <= radius
    return whole
