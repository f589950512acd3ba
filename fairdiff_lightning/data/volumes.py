"""Files of volumes, NIfTI or DICOM series, read and written, and what their values have to be."""

# nibabel's functions carry no annotations
# mypy: allow-untyped-calls
from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fairdiff_lightning.data.blocks import (
    AIR,
    as_type,
    block_of,
    centred_start,
    crop_or_pad,
    cut,
    offset_in,
    overlap,
    place_back,
)
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.grid import RAS, Array, Native, Size, Volume, check_affine, check_same_grid
from fairdiff_lightning.data.native import atomic_path, check_classes

__all__ = [
    "AIR",
    "NIFTI",
    "RAS",
    "Array",
    "Native",
    "Size",
    "Volume",
    "Window",
    "as_type",
    "block_of",
    "centred_start",
    "check_affine",
    "check_hu",
    "check_mask",
    "check_same_grid",
    "crop_or_pad",
    "cut",
    "offset_in",
    "open_nifti",
    "overlap",
    "place_back",
    "read_nifti",
    "read_notes",
    "read_volume",
    "write_nifti",
    "write_volume",
]

NIFTI = (".nii", ".nii.gz")
COMMENT = "comment"
NOTES = "fairdiff_lightning"


@dataclass(frozen=True)
class Window:
    """A range of intensities that is mapped to [0, 1]; the default is LeFusion's for lungs, HU.

    Raises:
        ValueError: for ends that are not finite, or of which the first is not the lower one.
    """

    low: float = -1000.0
    high: float = 400.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"window=({self.low:g}, {self.high:g}); expected are two finite intensities, the lower one first, as "
                "(-200, 250)."
            )

    def to_unit(self, values: Array) -> NDArray[np.float32]:
        """Scale to [0, 1] and clip."""
        return _scaled(values, (self.low, self.high), (0.0, 1.0))

    def from_unit(self, scaled: Array) -> NDArray[np.float32]:
        """Intensities of [0, 1]; what :meth:`to_unit` clipped does not come back."""
        return _scaled(scaled, (0.0, 1.0), (self.low, self.high))


def read_volume(path: str | Path, axes: Sequence[str] | None = RAS) -> Volume:
    """Read a NIfTI file, or the DICOM series in a folder.

    Args:
        path: ``.nii``, ``.nii.gz``, or a folder of one DICOM series.
        axes: directions that the axes are turned to run to; None leaves them as the file has them.

    Raises:
        InvalidSampleError: naming the file and what is wrong with it.
    """
    if Path(path).is_dir():
        from fairdiff_lightning.data.dicom_series import read_series

        return read_series(path, axes)
    return read_nifti(path, axes)


def write_volume(path: str | Path, volume: Volume, notes: Mapping[str, Any] | None = None) -> Path:
    """Write a NIfTI file, or a DICOM series for a path without that suffix, as the file that it comes from.

    Raises:
        ValueError: for notes with a DICOM series, which has no place for them.
        FileExistsError: for a series whose folder exists.
    """
    if str(path).endswith(NIFTI):
        return write_nifti(path, volume, notes)
    if notes:
        raise ValueError(f"{path}: notes are kept in NIfTI files only; expected a path that ends in {NIFTI}.")
    from fairdiff_lightning.data.dicom_series import write_series

    return write_series(path, volume)


def open_nifti(path: str | Path) -> Any:
    """Open a NIfTI file with nibabel, which reads its header only.

    Raises:
        InvalidSampleError: for another kind of file, a damaged header, or a spacing that is not above 0.
    """
    if not str(path).endswith(NIFTI):
        raise InvalidSampleError(path, "another kind of file", f"a name that ends in {' or '.join(NIFTI)}")
    try:
        image: Any = nib.load(path)
        with nib.openers.ImageOpener(str(path)) as stream:  # as it stands there: load takes the absolute value
            header: Any = type(image.header).from_fileobj(stream, check=False)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise InvalidSampleError(path, f"unreadable ({error})", "a whole NIfTI file; fetch it again") from error
    spacing = header["pixdim"][1 : 1 + min(3, len(image.shape))]
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise InvalidSampleError(
            path, f"pixdim[1:4] {spacing.tolist()}", "sizes of a voxel above 0, mm; flips belong into the affine"
        )
    return image


def read_nifti(path: str | Path, axes: Sequence[str] | None = RAS) -> Volume:
    """Read a NIfTI file of three dimensions; further ones of length 1 are dropped.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        axes: directions that the axes are turned to run to; None leaves them as the file has them.

    Raises:
        InvalidSampleError: for a damaged file, another number of dimensions, no numbers, a spacing that is not above 0,
            or an oblique grid.
    """
    image = open_nifti(path)
    shape = image.shape
    if len(shape) < 3 or any(length != 1 for length in shape[3:]):
        raise InvalidSampleError(path, f"{len(shape)}-D data of {shape}", "one volume, (H, W, D); write it out alone")
    try:
        stored = np.asarray(image.dataobj.get_unscaled()).reshape(shape[:3])
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InvalidSampleError(path, f"data unreadable ({error})", "a whole NIfTI file; fetch it again") from error
    if stored.dtype.kind not in "iuf":
        raise InvalidSampleError(path, f"{stored.dtype} voxels", "integers or floating-point numbers")
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    affine = check_affine(image.affine, path)
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    native = Native(nib.aff2axcodes(affine), stored.dtype, float(slope), float(intercept), image.header.copy())
    volume = Volume(native.load(stored), affine, native)
    return volume if axes is None else volume.reoriented(axes)


def write_nifti(path: str | Path, volume: Volume, notes: Mapping[str, Any] | None = None) -> Path:
    """Write a volume atomically, in the orientation, type, scaling and header of the file that it comes from.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        volume: values that the type cannot hold are rounded and limited; one from no file keeps its axes and type.
        notes: kept in the header, see :func:`read_notes`.
    """
    path = Path(path)
    if not path.name.endswith(NIFTI):
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(NIFTI)}.")
    native = _native_to_nifti(volume)
    placed = volume.reoriented(native.axes)
    image = nib.Nifti1Image(native.store(placed.array), placed.affine, native.header, dtype=native.dtype)
    image.header.set_slope_inter(native.slope, native.intercept)
    if notes is not None:
        _set_notes(image.header, notes)
    content = image.to_bytes()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(content, 3, mtime=0) if path.suffix == ".gz" else content)
    return path


def read_notes(path: str | Path) -> dict[str, Any]:
    """What :func:`write_nifti` noted in a file's header; nothing for one that it did not write."""
    for extension in open_nifti(path).header.extensions:
        content = extension.get_content()
        text = content.decode(errors="replace") if isinstance(content, bytes) else str(content)
        if extension.get_code() == 6 and text.startswith(f'{{"{NOTES}"'):
            try:
                return dict(json.loads(text.rstrip("\0"))[NOTES])
            except (ValueError, TypeError) as error:
                raise InvalidSampleError(path, f"notes {text[:80]!r}", "what we wrote; write it again") from error
    return {}


def check_mask(volume: Volume, num_classes: int, where: str | Path) -> Volume:
    """Check that a mask holds class indices only, and make it uint8.

    Raises:
        InvalidSampleError: with the values that were found.
    """
    return volume.with_array(check_classes(volume.array, num_classes, str(where)))


def check_hu(values: Array, where: str | Path, offset: float | None = None) -> Array:
    """Check that values are Hounsfield units.

    Args:
        values: of a CT or a part of one that holds air, as every scan of the chest does.
        where: named in the error.
        offset: HU of what is stored as 0 (-1024, or -1000), for files whose offset was never applied.

    Returns:
        The values in HU, the offset applied where it is given.

    Raises:
        InvalidSampleError: for values that are not finite or have no air among them; for an offset where air is.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise InvalidSampleError(where, "NaN or infinite values", "finite HU")
    found = f"values from {low:g} to {high:g}"
    if offset is not None:
        if low < 0:
            raise InvalidSampleError(where, f"{found} with hu_offset={offset:g}", "no offset: these are HU already")
        return values.astype(np.float32) + np.float32(offset)
    if low >= 0:
        raise InvalidSampleError(
            where, found, "HU, in which air is -1000: the offset has not been applied; give hu_offset=-1024 (or -1000)"
        )
    if low >= -1.01 and high <= 1.01:
        raise InvalidSampleError(where, found, "HU; values scaled to [-1, 1] have to be turned back first")
    return values


def _scaled(values: Array, old: tuple[float, float], new: tuple[float, float]) -> NDArray[np.float32]:
    """Values of one range in another, limited to it."""
    from monai.transforms import ScaleIntensityRange

    return np.asarray(ScaleIntensityRange(*old, *new, clip=True)(values.astype(np.float32)))


def _native_to_nifti(volume: Volume) -> Native:
    """How the file is to hold the volume; a DICOM series' many slopes do not go into a NIfTI file."""
    native = volume.native
    if native is not None and np.ndim(native.slope) == 0:
        return native
    return Native(native.axes if native else volume.axes, _nifti_type(volume.array.dtype))


def _nifti_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type itself, or the one that every reader of NIfTI knows in its place."""
    return np.dtype(
        {"bool": "uint8", "int64": "int32", "uint64": "uint32", "float16": "float32"}.get(dtype.name, dtype)
    )


def _set_notes(header: Any, notes: Mapping[str, Any]) -> None:
    kept = [e for e in header.extensions if NOTES.encode() not in bytes(str(e.get_content()), "utf-8")]
    header.extensions.clear()
    text = json.dumps({NOTES: dict(notes)}).encode()
    header.extensions.extend([*kept, nib.nifti1.Nifti1Extension(COMMENT, text)])
