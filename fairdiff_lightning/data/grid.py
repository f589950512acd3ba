"""Arrays with their place in the patient, and how the files that they come from hold them.

A volume is (H, W, D) in RAS order: the axes run to the patient's right, front and head, depth last.
"""

# nibabel's functions carry no annotations
# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray

from fairdiff_lightning.data.errors import InvalidSampleError

Array = NDArray[Any]
Size = tuple[int, int, int]
RAS = ("R", "A", "S")


@dataclass(frozen=True)
class Native:
    """How a file holds a volume: what is needed to write it back as it was.

    Args:
        axes: directions that the file's axes run to, as ``("L", "P", "S")``.
        dtype: of the stored numbers.
        slope: values are ``stored * slope + intercept``; one for each slice of a DICOM series.
        intercept: see ``slope``.
        header: of a NIfTI file.
        slices: headers of a DICOM series, in the order of the last axis.
    """

    axes: tuple[str, ...]
    dtype: np.dtype[Any]
    slope: float | Array = 1.0
    intercept: float | Array = 0.0
    header: Any = None
    slices: tuple[Any, ...] = ()

    def load(self, stored: Array) -> Array:
        """Turn stored numbers into values; they stay what they are where nothing is rescaled."""
        if np.all(self.slope == 1) and np.all(self.intercept == 0):
            return stored
        values: Array = stored.astype(np.float64) * self.slope + self.intercept
        coarsest = np.abs(values).max(initial=0) * np.finfo(np.float32).eps
        exact = coarsest < 0.25 * np.min(np.abs(self.slope))  # so that integers come back as they were
        return values.astype(np.float32) if exact else values

    def store(self, values: Array, bits: int | None = None) -> Array:
        """Turn values into stored numbers, rounded and limited to what the type, or so many bits of it, can hold."""
        if np.all(self.slope == 1) and np.all(self.intercept == 0):
            if values.dtype == self.dtype:
                return values
            unscaled = values
        else:
            unscaled = (values.astype(np.float64) - self.intercept) / self.slope
        if self.dtype.kind not in "iu":
            return unscaled.astype(self.dtype)
        limits = np.iinfo(self.dtype)
        width = limits.bits if bits is None else bits
        low, high = (0, 2**width - 1) if self.dtype.kind == "u" else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
        return np.clip(np.round(unscaled), low, high).astype(self.dtype)


@dataclass(frozen=True)
class Volume:
    """An array on a grid in the patient.

    Args:
        array: (H, W, D), in HU for CT.
        affine: (4, 4), from voxel indices to mm; x runs to the right, y to the front, z to the head.
        native: how the file holds it; None for one that comes from no file.
    """

    array: Array
    affine: NDArray[np.float64]
    native: Native | None = None

    @property
    def shape(self) -> Size:
        """(H, W, D)."""
        return self.array.shape

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Size of a voxel along each axis, mm."""
        return nib.affines.voxel_sizes(self.affine)  # type: ignore[no-any-return]

    @property
    def axes(self) -> tuple[str, ...]:
        """Directions that the axes run to, as ``("R", "A", "S")``."""
        return nib.aff2axcodes(self.affine)  # type: ignore[no-any-return]

    def with_array(self, array: Array) -> Volume:
        """Another array on the same grid."""
        if array.shape != self.array.shape:
            raise ValueError(f"an array of {array.shape} for a grid of {self.array.shape}.")
        return replace(self, array=array)

    def reoriented(self, axes: Sequence[str]) -> Volume:
        """The same volume with axes that run as said: flipped and permuted, never resampled."""
        moves = ornt_transform(io_orientation(self.affine), axcodes2ornt(axes))
        affine = self.affine @ inv_ornt_aff(moves, self.shape)
        return replace(self, array=np.ascontiguousarray(apply_orientation(self.array, moves)), affine=affine)


def check_affine(affine: Array, where: str | Path) -> NDArray[np.float64]:
    """Check that an affine gives a grid of right angles.

    Raises:
        InvalidSampleError: with the spacing, or the angle found.
    """
    affine = np.asarray(affine, np.float64)
    columns = affine[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    if not np.isfinite(affine).all() or spacing.min() <= 0:
        raise InvalidSampleError(where, f"affine {affine.tolist()}", "finite numbers and a spacing above 0")
    cosines = np.abs((columns / spacing).T @ (columns / spacing) - np.eye(3))
    if cosines.max() > 0.02:
        angle = np.degrees(np.arccos(min(cosines.max(), 1)))
        raise InvalidSampleError(
            where,
            f"axes at {angle:.1f} degrees (a tilted gantry, or a sheared affine)",
            "axes at right angles; resample the volume first",
        )
    return affine


def check_same_grid(image: Volume, mask: Volume, where: str | Path, tolerance: float = 0.1) -> None:
    """Check that an image and its mask lie on one grid.

    Args:
        image: a volume.
        mask: of the same orientation.
        where: named in the error.
        tolerance: how far a corner may lie off, as a share of the smallest side of a voxel.

    Raises:
        InvalidSampleError: with both shapes, or both affines and how far the corners lie off.
    """
    if image.shape != mask.shape:
        raise InvalidSampleError(where, f"mask of {mask.shape} voxels for an image of {image.shape}", "one shape")
    corners = np.array(np.meshgrid(*((0, side - 1) for side in image.shape), [1])).reshape(4, -1)
    off = np.linalg.norm((image.affine @ corners - mask.affine @ corners)[:3], axis=0).max()
    if off > tolerance * image.spacing.min():
        raise InvalidSampleError(
            where,
            f"image and mask lie up to {off:.3g} mm off: affines {image.affine.round(4).tolist()} and "
            f"{mask.affine.round(4).tolist()}",
            "one grid",
        )
