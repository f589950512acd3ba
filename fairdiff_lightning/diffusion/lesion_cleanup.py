"""What is done to generated lesion masks: holes filled, borders smoothed, specks removed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

Bools = NDArray[np.bool_]

SMOOTHING = ((20, 0.5, 0.01), (50, 0.5, 0.1), (100, 0.5, 0.2), (1_000, 1.0, 0.3), (10_000, 1.5, 0.5), (None, 2.0, 0.5))
"""For lesions of fewer voxels than the first number: the blur's sigma, voxels, and the share that it is cut at."""
REFERENCE_ZOOM = 1.5
"""How much larger than the volume the authors' code makes the mask."""


def clean_lesions(lesions: Tensor, within: Tensor | None = None, zoom: float = 1.0) -> Tensor:
    """Make one smooth lesion without holes of each mask.

    Zhang et al., *LeFusion*, arXiv:2403.14066, authors' code: fill the holes, blur, cut, and keep the largest component
    of voxels that share a face. Blur and cut depend on the lesion's size, see :data:`SMOOTHING`.

    Args:
        lesions: (B, 1, H, W, D), other than 0 in the lesion.
        within: (B, 1, H, W, D), other than 0 where a lesion may lie; everywhere when None.
        zoom: scale of the result's grid; 1 is the mask's own, :data:`REFERENCE_ZOOM` that of the authors' code, whose
            lesions lie elsewhere in the volume and are larger.

    Returns:
        (B, 1, H, W, D) bool on the device of ``lesions``, every side times ``zoom``. An empty mask stays empty, where
        the authors' code makes all of the volume a lesion; a mask of threads alone can become empty.

    Raises:
        ValueError: when ``within`` has another shape.
    """
    if within is not None and within.shape != lesions.shape:
        raise ValueError(
            f"within has shape {tuple(within.shape)}; expected is that of lesions, {tuple(lesions.shape)}."
        )
    masks = (lesions != 0).cpu().numpy()[:, 0]
    allowed = np.ones_like(masks) if within is None else (within != 0).cpu().numpy()[:, 0]
    cleaned = [_zoomed(clean_lesion(mask, free), zoom) for mask, free in zip(masks, allowed, strict=True)]
    return torch.from_numpy(np.stack(cleaned)[:, None]).to(lesions.device)


def clean_lesion(lesion: Bools, within: Bools) -> Bools:
    """One lesion (H, W, D); see :func:`clean_lesions`."""
    voxels = np.count_nonzero(lesion)
    sigma, share = next((s, t) for below, s, t in SMOOTHING if below is None or voxels < below)
    filled = ndimage.binary_fill_holes(lesion)
    smooth = (ndimage.gaussian_filter(filled.astype(np.float32), sigma) > share) & within
    labels, found = ndimage.label(smooth)
    if not found:
        return np.zeros_like(lesion)
    largest: Bools = labels == 1 + np.bincount(labels.ravel())[1:].argmax()
    return largest


def _zoomed(lesion: Bools, zoom: float) -> Bools:
    if zoom == 1:
        return lesion
    larger: Bools = ndimage.zoom(lesion.astype(np.float32), zoom, order=1) > 0.5
    return larger
