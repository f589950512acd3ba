"""NIfTI files of several volumes, the grid of a file by its header alone, and masks on it."""

# nibabel's functions carry no annotations
# mypy: allow-untyped-calls
from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.volumes import RAS, Array, Native, Volume, check_affine, open_nifti


def read_nifti_channels(path: str | Path) -> list[Volume]:
    """Read the volumes of a NIfTI file of three or four dimensions, float32 in RAS order.

    Raises:
        InvalidSampleError: for a damaged file, another number of dimensions, or an oblique grid.
    """
    image = open_nifti(path)
    try:
        values = np.asarray(image.dataobj, np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InvalidSampleError(path, f"unreadable ({error})", "a whole NIfTI file; fetch it again") from error
    if values.ndim not in (3, 4):
        raise InvalidSampleError(path, f"{values.ndim}-D data of {values.shape}", "(H, W, D) or (H, W, D, C)")
    affine = check_affine(image.affine, path)
    native = Native(nib.aff2axcodes(affine), np.dtype(np.float32), header=image.header.copy())
    volumes = np.moveaxis(values[..., None] if values.ndim == 3 else values, -1, 0)
    return [Volume(volume, affine, native).reoriented(RAS) for volume in volumes]


def nifti_grid(path: str | Path, axes: Sequence[str] | None = RAS) -> Volume:
    """The grid of a NIfTI file, as a volume of 0; none of its voxels is read.

    Args:
        path: of three dimensions, or of more for several volumes on one grid.
        axes: directions that the axes are turned to run to; None leaves them as the file has them.

    Raises:
        InvalidSampleError: for a damaged header, less than three dimensions, or an oblique grid.
    """
    image = open_nifti(path)
    if len(image.shape) < 3:
        raise InvalidSampleError(path, f"{len(image.shape)}-D data of {image.shape}", "(H, W, D) or (H, W, D, C)")
    affine = check_affine(image.affine, path)
    native = Native(nib.aff2axcodes(affine), np.dtype(np.uint8), header=image.header.copy())
    grid = Volume(np.zeros(image.shape[:3], np.uint8), affine, native)
    return grid if axes is None else grid.reoriented(axes)


def labels_on(image: Volume, mask: NDArray[np.uint8]) -> Volume:
    """Place a mask (H, W, D) on the grid of an image, to be written voxel for voxel as its file is.

    Of the header the mask gets the place in the patient alone; texts, intensities and extensions are the image's.
    """
    native = image.native
    if native is not None:
        header = None if native.header is None else _place_of(native.header)
        native = Native(native.axes, np.dtype(np.uint8), header=header)
    return replace(image.with_array(mask.astype(np.uint8)), native=native)


def check_finite(values: Array, where: str | Path) -> Array:
    """Check that intensities are numbers.

    Raises:
        InvalidSampleError: for NaN or infinite ones.
    """
    if not np.isfinite(values).all():
        raise InvalidSampleError(where, "NaN or infinite values", "finite intensities")
    return values


def _place_of(header: Any) -> Any:
    """A new NIfTI header with the affines of another one, their codes, and the unit of length."""
    new = nib.Nifti1Header()
    new.set_data_shape(header.get_data_shape()[:3])
    new.set_zooms(header.get_zooms()[:3])
    new.set_xyzt_units(header.get_xyzt_units()[0])
    new.set_qform(*header.get_qform(coded=True))
    new.set_sform(*header.get_sform(coded=True))
    return new
