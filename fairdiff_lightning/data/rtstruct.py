"""Structures of radiotherapy (DICOM RTSTRUCT): contours, plane by plane, as masks, and masks as contours."""

# scikit-image's functions carry no annotations
# mypy: allow-untyped-calls
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ImplicitVRLittleEndian, RTStructureSetStorage
from scipy import ndimage
from scipy.spatial import KDTree
from skimage.draw import polygon
from skimage.measure import find_contours

from fairdiff_lightning.data.dicom_seg import (
    SOFTWARE,
    UNICODE,
    check_frame_of_reference,
    date_and_time,
    derived_uids,
    on_slices,
    open_object,
    patient_and_study,
    series_number,
    series_of,
)
from fairdiff_lightning.data.dicom_series import TO_RAS
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.grid import Volume
from fairdiff_lightning.data.native import atomic_path
from fairdiff_lightning.version import __version__

Points = NDArray[np.float64]
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
SAME_PLANE = 0.05
"""Contours whose depths differ by less, as a share of a slice, are drawn in one plane."""
TILT = 0.5
"""How far the points of a contour may lie apart in depth, as a share of a slice."""
MARGIN = 1.0
"""How far a contour may run beyond the centres of the outermost pixels, pixels."""


def structure_names(path: str | Path) -> list[str]:
    """Names of the structures in a structure set, in the order of the file.

    Raises:
        InvalidSampleError: for a file that is none.
    """
    return [_name(roi) for roi in _open(path).get("StructureSetROISequence", [])]


def read_structures(path: str | Path, image: Volume, patterns: Sequence[str]) -> Volume:
    """Read the union of the structures whose names match as a mask on the grid of the image.

    A voxel belongs to a structure when its centre does. The contours of a structure in one plane are combined by the
    even-odd rule, so that a hole may be a keyhole, an XOR contour or a further contour inside (DICOM PS3.3, C.8.8.6.3).
    A plane between slices goes to the nearest one; of several planes on a slice, the union counts. Slices without a
    contour stay empty: nothing is interpolated.

    Args:
        path: of the RTSTRUCT.
        image: the DICOM series that it was drawn on, as :func:`read_series` gives it.
        patterns: regular expressions of which one matches the whole name, in capitals or not.

    Returns:
        uint8 {0, 1}. Structures without contours add nothing as long as another one that matches has some.

    Raises:
        InvalidSampleError: for no RTSTRUCT, no structure that matches, none of them with contours, contours that are
            not closed, not in the planes of the slices or outside of the image, another frame of reference, and an
            image from no DICOM series.
    """
    headers, grid = series_of(image, path)
    structures = _open(path)
    chosen = _matching(structures, patterns, path)
    contours = {int(item.ReferencedROINumber): item for item in structures.get("ROIContourSequence", [])}
    mask, drawn = np.zeros(grid.shape, bool), False
    for roi in chosen:
        check_frame_of_reference(roi.get("ReferencedFrameOfReferenceUID"), headers, f"{path}, {_name(roi)}")
        rings = [
            _voxels(contour, grid, f"{path}, {_name(roi)}")
            for contour in contours.get(int(roi.ROINumber), Dataset()).get("ContourSequence", None) or []
        ]
        drawn = drawn or bool(rings)
        _draw(rings, mask)
    if not drawn:
        raise InvalidSampleError(path, f"no contours for {[_name(roi) for roi in chosen]}", "a structure with contours")
    return Volume(mask.astype(np.uint8), grid.affine).reoriented(image.axes)


def write_structures(path: str | Path, mask: Volume, image: Volume, names: Mapping[int, str]) -> Path:
    """Write a mask as an RTSTRUCT with a structure for each named class, atomically.

    Contours run half-way between the voxels inside and outside, so that reading them gives the mask again. Holes are
    keyholes, which readers of every age understand. A class without voxels becomes a structure without contours: it was
    looked for and not found. UIDs follow from the content and dates are the series', so that the same mask gives the
    same bytes.

    Args:
        path: of the file; one that exists is replaced.
        mask: class indices, 0 is background, on the grid of the image in any orientation.
        image: a DICOM series as :func:`read_series` gives it.
        names: of all classes, which become the structures' numbers.

    Raises:
        InvalidSampleError: for an image from no DICOM series, another grid, or classes without a name.
    """
    path = Path(path)
    headers, grid = series_of(image, path)
    placed = on_slices(mask, grid, names, path)
    series, instance, _ = derived_uids(headers, placed.array.astype(np.uint8), names, "RTSTRUCT")
    structures = _structure_set(headers, series, instance)
    frame = headers[0].FrameOfReferenceUID
    structures.StructureSetROISequence = [
        _item(ROINumber=number, ReferencedFrameOfReferenceUID=frame, ROIName=name, ROIGenerationAlgorithm="AUTOMATIC")
        for number, name in sorted(names.items())
    ]
    structures.ROIContourSequence = [_contours(placed, number, headers) for number in sorted(names)]
    structures.RTROIObservationsSequence = [
        _item(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType=None, ROIInterpreter=None)
        for number in sorted(names)
    ]
    structures.ApprovalStatus = "UNAPPROVED"
    with atomic_path(path) as temporary:
        structures.save_as(temporary, enforce_file_format=True)
    return path


def _open(path: str | Path) -> Dataset:
    return open_object(path, (RTStructureSetStorage,), "a DICOM structure set (RTSTRUCT)")


def _name(roi: Dataset) -> str:
    return str(roi.get("ROIName") or "").strip()


def _matching(structures: Dataset, patterns: Sequence[str], path: str | Path) -> list[Dataset]:
    rois = list(structures.get("StructureSetROISequence", []))
    chosen = [roi for roi in rois if any(re.fullmatch(p, _name(roi), re.IGNORECASE) for p in patterns)]
    if not chosen:
        names = sorted({_name(roi) for roi in rois})
        raise InvalidSampleError(path, f"no structure that matches {list(patterns)}", f"one of those there: {names}")
    return chosen


def _voxels(contour: Dataset, grid: Volume, where: str) -> Points:
    """Points (N, 3) of a contour in voxel indices of the grid.

    Raises:
        InvalidSampleError: for a contour that is no closed polygon in the plane of a slice of the grid.
    """
    kind = contour.get("ContourGeometricType")
    if kind not in CLOSED:
        raise InvalidSampleError(where, f"a contour of type {kind}", " or ".join(CLOSED))
    values = np.atleast_1d(np.asarray(contour.get("ContourData", None) or [], np.float64))
    if not values.size or values.size % 3 or not np.isfinite(values).all():
        raise InvalidSampleError(where, f"ContourData of {values.size} numbers", "x, y, z of each point in mm")
    offset = np.asarray(contour.get("ContourOffsetVector", None) or np.zeros(3), np.float64)
    to_voxels = np.linalg.inv(grid.affine)
    points: Points = (values.reshape(-1, 3) + offset) @ (to_voxels[:3, :3] @ TO_RAS).T + to_voxels[:3, 3]
    if np.ptp(points[:, 2]) > TILT:
        raise InvalidSampleError(
            where, f"a contour across {np.ptp(points[:, 2]):.2f} slices", "contours in the planes of the image's slices"
        )
    last = np.array(grid.shape) - 1
    depth = points[:, 2].mean()
    beyond = np.maximum(-points.min(0), points.max(0) - last) - MARGIN
    beyond[2] = max(-depth, depth - last[2]) - TILT
    if beyond.max() > 1e-3:
        low, high = (corner.round(2).tolist() for corner in (points.min(0), points.max(0)))
        raise InvalidSampleError(
            where,
            f"a contour outside of the image, at voxels {low} to {high}",
            f"points between [0, 0, 0] and {last.tolist()} (rows, columns, slices); is it of another scan?",
        )
    return points


def _draw(rings: Sequence[Points], mask: NDArray[np.bool_]) -> None:
    """Add the contours of one structure to a mask: even-odd within a plane, the union of planes."""
    rings = sorted(rings, key=lambda ring: float(ring[:, 2].mean()))
    depths = np.array([ring[:, 2].mean() for ring in rings])
    plane_of = np.cumsum(np.diff(depths, prepend=depths[:1]) > SAME_PLANE)
    for plane in np.unique(plane_of):
        inside = np.zeros(mask.shape[:2], bool)
        for index in np.flatnonzero(plane_of == plane):
            rows, columns = polygon(rings[index][:, 0], rings[index][:, 1], inside.shape)
            inside[rows, columns] ^= True
        k = int(np.clip(np.round(depths[plane_of == plane].mean()), 0, mask.shape[2] - 1))
        mask[..., k] |= inside


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item


def _structure_set(headers: tuple[Dataset, ...], series: str, instance: str) -> Dataset:
    """A structure set without structures, for a series."""
    first = headers[0]
    structures = patient_and_study(first)
    structures.file_meta = FileMetaDataset()
    structures.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # explicit lengths end at 64 KiB, contours do not
    structures.file_meta.MediaStorageSOPClassUID = structures.SOPClassUID = RTStructureSetStorage
    structures.file_meta.MediaStorageSOPInstanceUID = structures.SOPInstanceUID = UID(instance)
    structures.SpecificCharacterSet, structures.Modality = UNICODE, "RTSTRUCT"
    structures.SeriesInstanceUID, structures.SeriesNumber = series, series_number(headers)
    structures.OperatorsName, structures.Manufacturer = None, SOFTWARE
    structures.ManufacturerModelName, structures.SoftwareVersions = SOFTWARE, __version__
    structures.FrameOfReferenceUID, structures.PositionReferenceIndicator = first.FrameOfReferenceUID, None
    structures.StructureSetLabel = "SEGMENTATION"
    structures.StructureSetDate, structures.StructureSetTime = date_and_time(headers)
    of_series = _item(
        SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=[_reference(header) for header in headers]
    )
    of_study = _item(
        ReferencedSOPClassUID=STUDY_CLASS,
        ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[of_series],
    )
    structures.ReferencedFrameOfReferenceSequence = [
        _item(FrameOfReferenceUID=first.FrameOfReferenceUID, RTReferencedStudySequence=[of_study])
    ]
    return structures


def _reference(header: Dataset) -> Dataset:
    return _item(ReferencedSOPClassUID=header.SOPClassUID, ReferencedSOPInstanceUID=header.SOPInstanceUID)


def _contours(mask: Volume, number: int, headers: tuple[Dataset, ...]) -> Dataset:
    """The contours of one class; the sequence is left out where there are none, as DICOM wants it."""
    contours = []
    to_patient = TO_RAS @ mask.affine[:3]
    for k in np.flatnonzero((mask.array == number).any((0, 1))):
        for ring in _rings(mask.array[..., k] == number):
            places = np.column_stack([ring, np.full(len(ring), k), np.ones(len(ring))]) @ to_patient.T
            contours.append(
                _item(
                    ContourImageSequence=[_reference(headers[k])],
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(ring),
                    ContourData=[f"{value:.4f}" for value in places.ravel()],
                )
            )
    return _item(ReferencedROINumber=number, **({"ContourSequence": contours} if contours else {}))


def _rings(inside: NDArray[np.bool_]) -> Iterator[Points]:
    """Outlines (N, 2) of the parts of a slice, rows and columns, each with its holes as keyholes."""
    parts, _ = ndimage.label(inside)
    for part, box in enumerate(ndimage.find_objects(parts), start=1):
        start = [side.start - 1 for side in box]
        outlines = find_contours(np.pad(parts[box] == part, 1).astype(np.float64), 0.5)
        outlines = sorted((ring[:-1] + start for ring in outlines), key=lambda ring: -float(np.ptp(ring, axis=0).max()))
        yield _with_keyholes(outlines[0], outlines[1:])


def _with_keyholes(outer: Points, holes: Sequence[Points]) -> Points:
    """One ring that runs around each hole, led there and back on the shortest way, nearest hole first."""
    waiting = list(holes)
    while waiting:
        distances, at = KDTree(outer).query(np.concatenate(waiting))
        nearest = int(np.argmin(distances))
        ends = np.cumsum([len(hole) for hole in waiting])
        which = int(np.searchsorted(ends, nearest, side="right"))
        hole = waiting.pop(which)
        entry, leave = nearest - int(ends[which]) + len(hole), int(at[nearest])
        outer = np.concatenate([outer[: leave + 1], hole[entry:], hole[: entry + 1], outer[leave:]])
    return outer
