"""Volumes: arrays with their place in the patient, read from and written to NIfTI files and DICOM series.

In memory a volume is (H, W, D) in RAS order: the axes run to the patient's right, front and head, depth last.
"""

# nibabel's functions carry no annotations
# mypy: allow-untyped-calls
from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import atomic_path, check_classes

Array = NDArray[Any]
Size = tuple[int, int, int]
RAS = ("R", "A", "S")
AIR = -1000.0
"""HU."""
NIFTI = (".nii", ".nii.gz")
COMMENT = "comment"
NOTES = "fairdiff_lightning"


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


@dataclass(frozen=True)
class Window:
    """A range of intensities that is mapped to [0, 1]; the default is LeFusion's for lungs, HU."""

    low: float = -1000.0
    high: float = 400.0

    def to_unit(self, values: Array) -> NDArray[np.float32]:
        """Clip to the window and scale to [0, 1]."""
        clipped = np.clip(values, self.low, self.high, dtype=np.float64)
        scaled: NDArray[np.float32] = ((clipped - self.low) / (self.high - self.low)).astype(np.float32)
        return scaled

    def from_unit(self, scaled: Array) -> NDArray[np.float32]:
        """Intensities of [0, 1]; what :meth:`to_unit` clipped does not come back."""
        values = np.clip(scaled, 0, 1, dtype=np.float64) * (self.high - self.low) + self.low
        return values.astype(np.float32)  # type: ignore[no-any-return]


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


def read_nifti(path: str | Path, axes: Sequence[str] | None = RAS) -> Volume:
    """Read a NIfTI file of three dimensions; further ones of length 1 are dropped.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        axes: directions that the axes are turned to run to; None leaves them as the file has them.

    Raises:
        InvalidSampleError: for a damaged file, another number of dimensions, no numbers, or an oblique grid.
    """
    image = _open(path)
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
    for extension in _open(path).header.extensions:
        content = extension.get_content()
        text = content.decode(errors="replace") if isinstance(content, bytes) else str(content)
        if extension.get_code() == 6 and text.startswith(f'{{"{NOTES}"'):
            try:
                return dict(json.loads(text.rstrip("\0"))[NOTES])
            except (ValueError, TypeError) as error:
                raise InvalidSampleError(path, f"notes {text[:80]!r}", "what we wrote; write it again") from error
    return {}


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
    """Cut a block out of an array; what lies beyond its ends is filled."""
    block = np.full(size, fill, array.dtype)
    inner, outer = overlap(array.shape, start, size)
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
    between = np.linalg.solve(whole.affine, part.affine)
    start = np.round(between[:3, 3])
    if np.abs(between[:3, :3] - np.eye(3)).max() > 1e-3 or np.abs(between[:3, 3] - start).max() > 0.1:
        raise InvalidSampleError(
            "part of a scan",
            f"affine {part.affine.round(4).tolist()} for a scan of {whole.affine.round(4).tolist()}",
            "voxels of the scan; resample or reorient the part first",
        )
    return int(start[0]), int(start[1]), int(start[2])


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


def _open(path: str | Path) -> Any:
    if not str(path).endswith(NIFTI):
        raise InvalidSampleError(path, "another kind of file", f"a name that ends in {' or '.join(NIFTI)}")
    try:
        return nib.load(path)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise InvalidSampleError(path, f"unreadable ({error})", "a whole NIfTI file; fetch it again") from error


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
