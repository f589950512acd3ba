"""A series of DICOM slices as one volume, and back as the series that it comes from."""

# nibabel's functions carry no annotations
# mypy: allow-untyped-calls
from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    CTImageStorage,
    EnhancedContinuousRTImageStorage,
    EnhancedRTImageStorage,
    ExplicitVRLittleEndian,
    ParametricMapStorage,
    RTDoseStorage,
    RTImageStorage,
    SegmentationStorage,
    generate_uid,
)

from fairdiff_lightning.data.dicom import read_stored
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.grid import RAS, Array, Native, Volume, check_affine
from fairdiff_lightning.data.native import visible_files

PLACE = ("SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
GRID = ("Rows", "Columns", "BitsStored", "PixelRepresentation", "ImageOrientationPatient", "PixelSpacing")
WHOSE = ("PatientID", "FrameOfReferenceUID")
NO_SLICES = (
    EnhancedContinuousRTImageStorage,
    EnhancedRTImageStorage,
    ParametricMapStorage,
    RTDoseStorage,
    RTImageStorage,
    SegmentationStorage,
)
"""Objects with pixels that lie beside a series and are none of its slices."""
OFF_LINE = 0.1
"""How far a slice may lie beside the line that the others lie on, as a share of a pixel."""
TO_RAS = np.diag([-1.0, -1.0, 1.0])
"""DICOM's x and y run to the patient's left and back."""
NEW_SERIES_AXES = ("P", "L", "S")


def read_series(folder: str | Path, axes: Sequence[str] | None = RAS, series: str | None = None) -> Volume:
    """Read the slices in a folder as a volume; what is no slice (structures, plans, doses, masks) is passed over.

    Args:
        folder: of one series.
        axes: directions that the axes are turned to run to; None leaves rows, columns, slices.
        series: SeriesInstanceUID of the one to read, where there are several.

    Raises:
        InvalidSampleError: for no or several series, slices missing, doubled, moved, of unequal size or orientation, or
            of several patients or frames of reference, a tilted gantry, a spacing that is not above 0, or pixels that
            cannot be decoded.
    """
    slices = _of_one_series(Path(folder), series)
    for path, header in slices:
        _check_spacing(path, header)
    _check_alike(slices, folder)
    order = np.argsort([_depth(header) for _, header in slices], kind="stable")
    slices = [slices[i] for i in order]
    headers = tuple(header for _, header in slices)
    affine = check_affine(_affine(headers, folder), folder)
    stored = np.stack([read_stored(path) for path, _ in slices], -1)
    slope, intercept = (_rescale(headers, name, rest) for name, rest in (("RescaleSlope", 1), ("RescaleIntercept", 0)))
    native = Native(nib.aff2axcodes(affine), stored.dtype, slope, intercept, slices=headers)
    volume = Volume(native.load(stored), affine, native)
    return volume if axes is None else volume.reoriented(axes)


def write_series(folder: str | Path, volume: Volume) -> Path:
    """Write a volume as a new, derived series, uncompressed; the folder appears whole or not at all.

    A volume that was read from a series keeps the slices' headers, scaling and bits; another one becomes a CT of int16.

    Raises:
        FileExistsError: when the folder exists.
        ValueError: for a volume that was cut out of the series whose headers it carries.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"'{folder}' exists; a series is written into a folder of its own. Remove it first.")
    native = volume.native
    if native is None or not native.slices:
        native = Native(NEW_SERIES_AXES, np.dtype(np.int16))
    placed = volume.reoriented(native.axes)
    headers = native.slices or _new_headers(placed, folder.name)
    if len(headers) != placed.shape[2] or (headers[0].Rows, headers[0].Columns) != placed.shape[:2]:
        raise ValueError(
            f"a volume of {placed.shape} with the headers of {len(headers)} slices of {headers[0].Rows} x "
            f"{headers[0].Columns}; paste it back into its scan first, or give Volume(array, affine) without native."
        )
    stored = native.store(placed.array, headers[0].BitsStored)
    uid = generate_uid(entropy_srcs=[headers[0].SeriesInstanceUID, hashlib.sha256(stored.tobytes()).hexdigest()])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        content = Path(work) / "content"
        content.mkdir()
        for k, header in enumerate(headers):
            _write_slice(content / f"{k:06d}.dcm", header, stored[..., k], uid, k)
        os.rename(content, folder)
    return folder


def _of_one_series(folder: Path, series: str | None) -> list[tuple[Path, Dataset]]:
    found = list(_images(folder))
    counts = Counter(str(header.SeriesInstanceUID) for _, header in found)
    if series is not None:
        found = [(path, header) for path, header in found if header.SeriesInstanceUID == series]
    if not found:
        wanted = "a series of DICOM slices" if series is None else f"the series {series}"
        raise InvalidSampleError(folder, f"{len(counts)} series: {dict(counts)}", wanted)
    if series is None and len(counts) > 1:
        raise InvalidSampleError(
            folder, f"{len(counts)} series, of slices {dict(counts)}", "one; sort them into folders, or name the series"
        )
    return found


def _images(folder: Path) -> Iterator[tuple[Path, Dataset]]:
    """Path and header of every image slice."""
    for path in visible_files(folder, "*"):
        if not path.is_file():
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except InvalidDicomError as error:
            if path.suffix.lower() in (".dcm", ".dicom"):
                raise InvalidSampleError(path, f"unreadable ({error})", "a DICOM file; fetch it again") from error
            continue
        except (OSError, EOFError, ValueError) as error:
            raise InvalidSampleError(path, f"unreadable ({error})", "a DICOM file; fetch it again") from error
        if "Rows" not in header or header.get("SOPClassUID") in NO_SLICES:
            continue
        missing = [name for name in PLACE if name not in header]
        if missing:
            raise InvalidSampleError(path, f"no {', '.join(missing)}", "a slice that says where in the patient it lies")
        yield path, header


def _check_alike(slices: Sequence[tuple[Path, Dataset]], folder: str | Path) -> None:
    first_path, first = slices[0]
    for path, header in slices[1:]:
        for name in GRID:
            one, other = (np.asarray(h[name].value, float) for h in (first, header))
            if not np.allclose(one, other, atol=1e-4):
                found = f"{name} {one.tolist()} in {first_path.name} and {other.tolist()} in {path.name}"
                raise InvalidSampleError(folder, found, "slices that are alike")
    for name in WHOSE:
        named = {str(header[name].value): path.name for path, header in slices if header.get(name)}
        if len(named) > 1:
            found = " and ".join(f"{value!r} in {file}" for value, file in list(named.items())[:2])
            raise InvalidSampleError(folder, f"{name} {found}", "slices of one patient in one frame of reference")


def _check_spacing(path: Path, header: Dataset) -> None:
    """Check that sizes are above 0; a thickness of 0 is taken for one that is not known."""
    pixel = np.asarray(header.PixelSpacing, float)
    if not (pixel.shape == (2,) and np.isfinite(pixel).all() and pixel.min() > 0):
        raise InvalidSampleError(path, f"PixelSpacing {pixel.tolist()}", "two sizes above 0, mm")
    thickness = float(header.get("SliceThickness") or 0)
    if not (np.isfinite(thickness) and thickness >= 0):
        raise InvalidSampleError(path, f"SliceThickness {thickness:g}", "a size above 0, mm")


def _directions(header: Dataset) -> tuple[Array, Array, Array]:
    """Unit vectors, in DICOM's axes, along which rows, columns and slices follow each other."""
    cosines = np.asarray(header.ImageOrientationPatient, float)
    along_row, along_column = cosines[:3], cosines[3:]
    return along_column, along_row, np.cross(along_row, along_column)


def _depth(header: Dataset) -> float:
    return float(np.asarray(header.ImagePositionPatient, float) @ _directions(header)[2])


def _affine(headers: Sequence[Dataset], folder: str | Path) -> NDArray[np.float64]:
    """From (row, column, slice) to RAS in mm, for slices in order."""
    down, right, through = _directions(headers[0])
    height, width = np.asarray(headers[0].PixelSpacing, float)
    places = np.array([np.asarray(header.ImagePositionPatient, float) for header in headers])
    step = _step(places, through, headers, folder)
    _check_in_line(places, np.stack([down, right], 1), min(height, width), folder)
    affine = np.eye(4)
    affine[:3, :3] = TO_RAS @ np.stack([down * height, right * width, step], 1)
    affine[:3, 3] = TO_RAS @ places[0]
    return affine


def _step(places: Array, through: Array, headers: Sequence[Dataset], folder: str | Path) -> Array:
    """From one slice to the next, mm."""
    if len(places) == 1:
        return through * _thickness(headers[0], folder)
    gaps = np.diff(places @ through)
    usual = float(np.median(gaps))
    widest = int(np.argmax(np.abs(gaps - usual)))
    if gaps.min() < 1e-3:
        twin = int(np.argmin(gaps))
        raise InvalidSampleError(
            folder, f"slices {twin} and {twin + 1} at one place, {places[twin].tolist()} mm", "one slice at each place"
        )
    if abs(gaps[widest] - usual) > 0.05 * usual:
        raise InvalidSampleError(
            folder,
            f"{gaps[widest]:.3f} mm between slices {widest} and {widest + 1}, {usual:.3f} mm between others",
            "even gaps; slices are missing, or of several scans",
        )
    _check_every_slice(usual, headers, folder)
    return (places[-1] - places[0]) / (len(places) - 1)  # type: ignore[no-any-return]


def _check_in_line(places: Array, plane: Array, pixel: float, folder: str | Path) -> None:
    """Check that slices lie one behind the other, along whatever line most of them do.

    Args:
        places: of the slices in order, (N, 3), mm.
        plane: directions of rows and columns, (3, 2).
        pixel: the smaller side of a pixel, mm.
        folder: named in the error.
    """
    beside, numbers = places @ plane, np.arange(len(places))[:, None]
    far = max(len(places) // 2, 1)  # over half of the scan, positions that are rounded tell the line well
    drift = np.median((beside[far:] - beside[:-far]) / far, 0) if len(places) > 1 else np.zeros(2)
    beside = beside - numbers * drift
    off = np.linalg.norm(beside - np.median(beside, 0), axis=1)
    worst = int(np.argmax(off))
    if off[worst] > OFF_LINE * pixel:
        raise InvalidSampleError(
            folder,
            f"slice {worst} at {places[worst].round(3).tolist()} mm, {off[worst]:.3f} mm beside the line of the others",
            "slices one behind the other; are they of several scans?",
        )


def _thickness(header: Dataset, folder: str | Path) -> float:
    """Of a slice that lies alone, mm."""
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        if header.get(name):
            thickness = float(header[name].value)
            if not (np.isfinite(thickness) and thickness > 0):
                raise InvalidSampleError(folder, f"{name} {thickness:g}", "a size above 0, mm")
            return thickness
    raise InvalidSampleError(folder, "one slice without SliceThickness", "a slice that says how thick it is")


def _check_every_slice(gap: float, headers: Sequence[Dataset], folder: str | Path) -> None:
    """Check an even gap against what the headers say.

    Slices may lie further apart than they are thick (lungs are scanned so), some scanners state the space between
    slices for their distance, and numbers may count echoes too. So it takes two witnesses to say that slices are
    missing: a gap of n times the spacing, and numbers that count by n. One alone, a spacing that differs or a gap of n
    times the thickness, is a warning.
    """
    names = ("SpacingBetweenSlices", "SliceThickness")
    name = next((name for name in names if headers[0].get(name)), None)
    if name is None:
        return
    stated = abs(float(headers[0][name].value))
    times = round(gap / stated)
    multiple = times > 1 and abs(gap / stated - times) < 0.05
    numbers = np.array([int(header.get("InstanceNumber") or 0) for header in headers])
    if multiple and set(np.abs(np.diff(numbers)).tolist()) == {times}:
        raise InvalidSampleError(
            folder,
            f"slices {gap:.3f} mm apart for a {name} of {stated:g} mm, of InstanceNumber "
            f"{numbers[0]}, {numbers[1]}, ... that count by {times}",
            f"every slice; {times - 1} of {times} are missing",
        )
    if multiple if name == "SliceThickness" else abs(gap - stated) > 0.05 * gap:
        rank_zero_warn(
            f"{folder}: slices lie {gap:.3f} mm apart, which is taken, but {name} is {stated:g} mm. Check that none is "
            "missing."
        )


def _rescale(headers: Sequence[Dataset], name: str, default: float) -> float | Array:
    """Slope or intercept: one number, or one for each slice where they differ."""
    values = np.array([float(header.get(name, default)) for header in headers])
    return float(values[0]) if np.all(values == values[0]) else values


def _write_slice(path: Path, header: Dataset, pixels: Array, series: str, number: int) -> None:
    image = deepcopy(header)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.SeriesInstanceUID = series
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
    image.ImageType = ["DERIVED", "SECONDARY", *list(header.get("ImageType", []))[2:]]
    for name in ("SmallestImagePixelValue", "LargestImagePixelValue"):  # of the original's pixels
        if name in image:
            delattr(image, name)
    image.PixelData = np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()
    image["PixelData"].VR = "OW"
    image.save_as(path, enforce_file_format=True, implicit_vr=False, little_endian=True)


def _new_headers(volume: Volume, name: str) -> tuple[Any, ...]:
    """Headers of an int16 CT for a volume of the axes rows, columns, slices."""
    down, right, step = (TO_RAS @ column for column in volume.affine[:3, :3].T)
    place = TO_RAS @ volume.affine[:3, 3]
    height, width, depth = volume.spacing
    identity = [name, repr(volume.affine.tolist()), repr(volume.shape)]
    study, series, frame = (generate_uid(entropy_srcs=[*identity, role]) for role in ("study", "series", "frame"))
    headers = []
    for k in range(volume.shape[2]):
        header = Dataset()
        header.SOPClassUID, header.Modality = CTImageStorage, "CT"
        header.PatientName = header.PatientID = name[:64]
        header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = study, series, frame
        header.InstanceNumber, header.ImageType = k + 1, ["DERIVED", "SECONDARY"]
        header.ImagePositionPatient = _decimals(place + k * step)
        header.ImageOrientationPatient = _decimals([*(right / width), *(down / height)])
        header.PixelSpacing, header.SliceThickness = _decimals([height, width]), _decimals([depth])[0]
        header.Rows, header.Columns = volume.shape[:2]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
        header.RescaleSlope, header.RescaleIntercept, header.RescaleType = 1, 0, "HU"
        headers.append(header)
    return tuple(headers)


def _decimals(values: Any) -> list[str]:
    """Numbers as DICOM's decimal strings, of 16 characters at most."""
    return [f"{value:.9g}" if abs(value) > 1e-9 else "0" for value in values]
