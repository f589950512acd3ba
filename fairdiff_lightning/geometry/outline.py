"""Outlines of the structures of a mask as a point cloud."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairdiff_lightning.geometry.reference import sample_edge_pixels
from fairdiff_lightning.geometry.structures import DISC_AND_CUP, StructureSpec

EncodeMethod = Literal["arc_length", "fps"]


def mask_to_points(
    mask: Tensor | NDArray[np.integer],
    num_points: int = 512,
    method: EncodeMethod = "arc_length",
    z: float = 5.0,
    structures: StructureSpec = DISC_AND_CUP,
) -> Tensor:
    """Points on the outlines of a mask's nested structures.

    ``arc_length`` gives every structure the same share of the points (:meth:`StructureSpec.quotas`), whatever its
    size, so that every cloud has the same layout: structure after structure, outermost first, each a closed contour
    without a repeated end. A contour is the 0.5 level of the structure's region, outside the image being 0, so that it
    follows the border of the image half a pixel outside the outermost pixels. Its points start at its topmost point,
    run in one direction and are equally spaced along it. Of a region in several pieces the one that encloses the
    largest area is kept; holes are filled.

    ``fps`` is FairDiff's encoder: the pixels on the edge of all structures together, thinned by farthest-point
    sampling in (row, col, z), in row-major order; it takes a disc and a cup only. Most of the points are the disc's,
    and a mask with fewer edge pixels than ``num_points`` cannot be encoded.

    Args:
        mask: class indices (H, W) or (1, H, W), of an integer type.
        num_points: N.
        method: see above.
        z: tag of the innermost structure, the outermost having -z; one structure alone has -z.
        structures: the classes of the mask from 1 on.

    Returns:
        (N, 3) float32: row and column in pixels, pixel centres at integers, and the tag z of the structure.

    Raises:
        ValueError: for another shape or type, a class outside ``structures``, a structure without a pixel, too few
            points for the structures, or (``fps``) too few edge pixels.
    """
    if method not in get_args(EncodeMethod):
        raise ValueError(f"method must be one of {get_args(EncodeMethod)}, but is {method!r}.")
    classes = _checked(mask, structures)
    tags = structures.tags(z)
    if method == "fps":
        return sample_edge_pixels(classes, num_points, z, structures)
    quotas = structures.quotas(num_points)
    outlines = [resample(contour(classes > k), quota) for k, quota in enumerate(quotas)]
    points = torch.from_numpy(np.concatenate(outlines))
    return torch.cat([points, tags.repeat_interleave(torch.tensor(quotas))[:, None]], 1).float()


def masks_to_points(
    masks: Tensor | NDArray[np.integer],
    num_points: int = 512,
    method: EncodeMethod = "arc_length",
    z: float = 5.0,
    structures: StructureSpec = DISC_AND_CUP,
) -> Tensor:
    """Points (B, N, 3) on the outlines of a batch of masks (B, 1, H, W); see :func:`mask_to_points`.

    Raises:
        ValueError: as :func:`mask_to_points`, with the index of the mask.
    """
    if masks.ndim != 4 or masks.shape[1] != 1 or 0 in masks.shape:
        raise ValueError(f"masks must have shape (B, 1, H, W), none of them 0, but have {tuple(masks.shape)}.")
    clouds = []
    for index, mask in enumerate(masks):
        try:
            clouds.append(mask_to_points(mask, num_points, method, z, structures))
        except ValueError as error:
            raise ValueError(f"mask {index} of the batch: {error}") from error
    return torch.stack(clouds)


def contour(region: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Closed contour (M + 1, 2) of the largest piece of a region (H, W), first point topmost and equal to the last."""
    from skimage.measure import find_contours

    rows, cols = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    box = np.pad(region[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1], 1).astype(np.float64)
    largest: NDArray[np.float64] = max(find_contours(box, 0.5), key=_enclosed_area)[:-1]  # type: ignore[no-untyped-call]
    first = np.lexsort((largest[:, 1], largest[:, 0]))[0]
    closed: NDArray[np.float64] = np.concatenate([largest[first:], largest[: first + 1]])
    closed += (rows[0] - 1, cols[0] - 1)
    return closed


def resample(closed: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """``count`` points (count, 2) equally spaced along a closed contour (M + 1, 2), from its first point."""
    lengths = np.hypot(*np.diff(closed, axis=0).T).cumsum()
    along = np.concatenate([[0.0], lengths])
    wanted = np.linspace(0, along[-1], count, endpoint=False)
    return np.stack([np.interp(wanted, along, coordinate) for coordinate in closed.T], 1)


def _enclosed_area(closed: NDArray[np.float64]) -> float:
    row, col = (closed - closed[0]).T
    return abs(float(row[:-1] @ col[1:] - row[1:] @ col[:-1])) / 2


def _checked(mask: Tensor | NDArray[np.integer], structures: StructureSpec) -> NDArray[np.integer]:
    """The mask (H, W) as an array, every class known and every structure present."""
    classes = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if classes.ndim == 3 and len(classes) == 1:
        classes = classes[0]
    if classes.ndim != 2 or 0 in classes.shape:
        raise ValueError(f"mask must have shape (H, W) or (1, H, W), but has {tuple(mask.shape)}.")
    if classes.dtype.kind not in "iub":
        raise ValueError(f"mask must hold integer class indices, but is {classes.dtype}.")
    found = np.unique(classes)
    unknown = found[(found < 0) | (found > len(structures))]
    if len(unknown):
        row, col = np.argwhere(classes == unknown[0])[0]
        raise ValueError(
            f"mask holds class {unknown[0]} at row {row}, column {col}; expected {structures}. "
            "Give a StructureSpec that names every class."
        )
    if found[-1] == 0:
        raise ValueError(f"mask is empty: all pixels are background; expected {structures}.")
    if found[-1] < len(structures):
        name = structures.names[found[-1]]
        raise ValueError(
            f"mask has no pixel of '{name}' (class {found[-1] + 1}); expected {structures}. "
            "Leave such masks out, or give a StructureSpec without it."
        )
    return classes
