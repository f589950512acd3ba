"""Masks as DICOM segmentations (SEG) of the series that they belong to, and what all objects of a series share."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage, generate_uid

from fairdiff_lightning.data.dicom_series import TO_RAS
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.grid import Array, Volume, check_same_grid
from fairdiff_lightning.data.native import atomic_path
from fairdiff_lightning.version import __version__

SOFTWARE = "fairdiff_lightning"
UNICODE = "ISO_IR 192"
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber")
IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
PLANE = ("Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
OFF_GRID = 0.1
"""How far a frame may lie off the image's voxels, as a share of a voxel."""


def write_segmentation(path: str | Path, mask: Volume, image: Volume, names: Mapping[int, str]) -> Path:
    """Write a mask as a binary DICOM SEG with one segment for each class, atomically.

    Slices without any class are left out, as is usual; of an empty mask all are kept: the file says that nothing was
    found. UIDs follow from the content and dates are the series', so that the same mask gives the same bytes; only for
    a series without dates the day of writing stands in it, since DICOM demands one.

    Args:
        path: of the file; one that exists is replaced.
        mask: class indices, 0 is background, on the grid of the image in any orientation.
        image: a DICOM series as :func:`read_series` gives it.
        names: of all classes from 1 on, which become the segments of these numbers.

    Raises:
        InvalidSampleError: for an image from no DICOM series, another grid, or classes without a name.
        ValueError: for names of classes that are not 1, 2, ...
    """
    path = Path(path)
    headers, grid = series_of(image, path)
    array = on_slices(mask, grid, names, path).array.astype(np.uint8)
    if sorted(names) != list(range(1, len(names) + 1)):
        raise ValueError(f"{path}: names of the classes {sorted(names)}; expected 1, 2, ..., as segments are numbered.")
    segmentation = _segmentation(headers, array, names)
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary, enforce_file_format=True)
    return path


def read_segmentation(path: str | Path, image: Volume, classes: Mapping[int, int] | None = None) -> Volume:
    """Read a binary DICOM SEG as class indices on the grid of the image.

    Args:
        path: of the file, from any software; its frames are placed by their own positions in the patient.
        image: the DICOM series that was segmented.
        classes: class of each segment that is read, by its number, from 1 to 255; several may be of one class. None
            reads all, each as a class of its number.

    Returns:
        uint8, the class at each voxel; 0 where there is none, as in slices without a frame.

    Raises:
        InvalidSampleError: for no SEG, a damaged one, one that is not binary, of another frame of reference or grid, or
            with classes that overlap.
    """
    headers, grid = series_of(image, path)
    segmentation = open_object(path, (SegmentationStorage,), "a DICOM segmentation (SEG)")
    if (kind := segmentation.get("SegmentationType")) != "BINARY":
        raise InvalidSampleError(path, f"SegmentationType {kind}", "BINARY")
    check_frame_of_reference(segmentation.get("FrameOfReferenceUID"), headers, path)
    places = _frame_slices(segmentation, grid, path)
    segments = [_group(segmentation, f, "SegmentIdentificationSequence", path) for f in range(len(places))]
    numbers = [int(segment.ReferencedSegmentNumber) for segment in segments]
    try:
        frames = np.asarray(segmentation.pixel_array, bool).reshape(-1, *grid.shape[:2])
    except (ValueError, AttributeError, RuntimeError) as error:
        raise InvalidSampleError(path, f"pixels unreadable ({error})", "a whole file; fetch it again") from error
    array = np.zeros(grid.shape, np.uint8)
    for k, segment, frame in zip(places, numbers, frames, strict=True):
        number = segment if classes is None else classes.get(segment, 0)
        if not number:
            continue
        taken = array[..., k][frame]
        if np.any((taken != 0) & (taken != number)):
            others = sorted({*taken.tolist()} - {0, number})
            raise InvalidSampleError(path, f"segments {others} and {number} overlap in slice {k}", "one class a voxel")
        array[..., k][frame] = number
    return Volume(array, grid.affine).reoriented(image.axes)


def open_object(path: str | Path, kinds: Collection[str], expected: str) -> Dataset:
    """Read a DICOM object of one of some storage classes.

    Raises:
        InvalidSampleError: for an unreadable file, or with the modality of another one.
    """
    try:
        found = pydicom.dcmread(path)
    except (InvalidDicomError, OSError, EOFError, ValueError) as error:
        raise InvalidSampleError(path, f"unreadable ({error})", expected) from error
    if found.get("SOPClassUID") not in kinds:
        raise InvalidSampleError(path, f"a DICOM object of modality {found.get('Modality')}", expected)
    return found


def series_of(image: Volume, where: str | Path) -> tuple[tuple[Dataset, ...], Volume]:
    """Headers of the slices that an image was read from, in order, and the image with rows, columns, slices as axes.

    Raises:
        InvalidSampleError: for an image from no DICOM series, slices without their UIDs or of several frames of
            reference, and a part of a scan that carries the headers of all of it.
    """
    if image.native is None or not image.native.slices:
        raise InvalidSampleError(where, "an image that comes from no DICOM series", "one that read_series has read")
    headers, grid = image.native.slices, image.reoriented(image.native.axes)
    for k, header in enumerate(headers):
        missing = [name for name in IDENTITY if not header.get(name)]
        if missing:
            raise InvalidSampleError(where, f"slice {k} of the image has no {', '.join(missing)}", "a whole header")
    frames = sorted({str(header.FrameOfReferenceUID) for header in headers})
    if len(frames) > 1:
        raise InvalidSampleError(where, f"slices in the frames of reference {frames}", "one frame of reference")
    held = (int(headers[0].Rows), int(headers[0].Columns), len(headers))
    corner = TO_RAS @ np.asarray(headers[0].ImagePositionPatient, float)
    if grid.shape != held or np.abs(grid.affine[:3, 3] - corner).max() > OFF_GRID * grid.spacing.min():
        raise InvalidSampleError(
            where,
            f"an image of {grid.shape} voxels from {grid.affine[:3, 3].round(2).tolist()} mm on, with the headers of "
            f"{held} from {corner.round(2).tolist()} mm on",
            "the whole scan; paste the part back into it first",
        )
    return headers, grid


def on_slices(mask: Volume, grid: Volume, names: Mapping[int, str], where: str | Path) -> Volume:
    """A mask of named classes with the axes of an image.

    Raises:
        InvalidSampleError: for another grid than the image's, or classes without a name.
        ValueError: for names of no class between 1 and 255.
    """
    if not names or not set(names) <= set(range(1, 256)):
        raise ValueError(f"{where}: names {dict(names)}; expected one for each class, by its index from 1 to 255.")
    mask = mask.reoriented(grid.axes)
    check_same_grid(grid, mask, where)
    unnamed = sorted({*np.unique(mask.array).tolist()} - {0, *names})
    if unnamed:
        raise InvalidSampleError(where, f"classes {unnamed[:8]} without a name", f"classes of {dict(names)}")
    return mask


def check_frame_of_reference(found: str | None, headers: tuple[Dataset, ...], where: str | Path) -> None:
    """Check that positions are given in the frame of reference of a series.

    Raises:
        InvalidSampleError: with both.
    """
    expected = headers[0].FrameOfReferenceUID
    if found != expected:
        raise InvalidSampleError(
            where, f"frame of reference {found}", f"{expected}, of the image; is it another scan's?"
        )


def patient_and_study(header: Dataset) -> Dataset:
    """What an object has in common with its series: all that DICOM demands of patient and study, empty if unknown."""
    shared = Dataset()
    for name in (*PATIENT, *STUDY):
        setattr(shared, name, header.get(name) or None)
    return shared


def derived_uids(
    headers: tuple[Dataset, ...], array: Array, names: Mapping[int, str], role: str
) -> tuple[str, str, str]:
    """UIDs of series, instance and a third thing; the same for the same mask of the same series."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    content = [str(headers[0].SeriesInstanceUID), digest, repr(sorted(names.items())), role, __version__]
    series, instance, other = (generate_uid(entropy_srcs=[*content, part]) for part in ("series", "instance", "other"))
    return series, instance, other


def series_number(headers: tuple[Dataset, ...]) -> int:
    """Places an object behind the series of a study."""
    return 1000 + int(headers[0].get("SeriesNumber") or 0)


def date_and_time(headers: tuple[Dataset, ...]) -> tuple[str | None, str | None]:
    """When a series was made, or else its study; None for what is unknown."""
    for kind in ("Series", "Study"):
        if headers[0].get(f"{kind}Date"):
            return headers[0][f"{kind}Date"].value, headers[0].get(f"{kind}Time") or None
    return None, None


def _segmentation(headers: tuple[Dataset, ...], array: NDArray[np.uint8], names: Mapping[int, str]) -> Dataset:
    """The SEG of a mask (rows, columns, slices), without what would differ the next time."""
    import highdicom

    series, instance, dimensions = derived_uids(headers, array, names, "SEG")
    date, time = date_and_time(headers)
    segmentation = highdicom.seg.Segmentation(
        source_images=[_source(header) for header in headers],
        pixel_array=np.ascontiguousarray(array.transpose(2, 0, 1)),
        segmentation_type="BINARY",
        segment_descriptions=[_segment(number, names[number]) for number in sorted(names)],
        series_instance_uid=series,
        series_number=series_number(headers),
        sop_instance_uid=instance,
        instance_number=1,
        manufacturer=SOFTWARE,
        manufacturer_model_name=SOFTWARE,
        software_versions=__version__,
        device_serial_number=__version__,
        content_label="SEGMENTATION",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=UNICODE,
        content_date=date,
        content_time=time or ("000000" if date else None),
        series_date=date,
        series_time=time,
    )
    segmentation.update(patient_and_study(headers[0]))
    del segmentation.InstanceCreationDate, segmentation.InstanceCreationTime
    for item in segmentation.ContributingEquipmentSequence:
        del item.ContributionDateTime
    for item in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions
    return segmentation


def _source(header: Dataset) -> Dataset:
    """The part of a slice's header that a segmentation takes over or refers to."""
    source = patient_and_study(Dataset())  # highdicom is strict with what archives have in the real ones
    for name in (*IDENTITY, "Modality", *PLANE):
        if header.get(name) is not None:
            setattr(source, name, header.get(name))
    return source


def _segment(number: int, name: str) -> Any:
    """A segment of the most general category, since a class is known by its name alone."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription

    return SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=SOFTWARE, family=codes.DCM.ArtificialIntelligence, version=__version__
        ),
    )


def _group(segmentation: Dataset, frame: int, name: str, where: str | Path) -> Dataset:
    """A functional group of a frame, its own or the one that all share."""
    own, shared = segmentation.PerFrameFunctionalGroupsSequence[frame], segmentation.SharedFunctionalGroupsSequence[0]
    for groups in (own, shared):
        if groups.get(name):
            return groups[name].value[0]  # type: ignore[no-any-return]
    raise InvalidSampleError(where, f"no {name} for frame {frame}", "a segmentation that says where and what it is")


def _frame_slices(segmentation: Dataset, grid: Volume, where: str | Path) -> NDArray[np.int64]:
    """Slice of the grid on which each frame lies.

    Raises:
        InvalidSampleError: for frames that do not cover the pixels of a slice.
    """
    size = (int(segmentation.Rows), int(segmentation.Columns))
    to_voxels, count = np.linalg.inv(grid.affine), int(segmentation.NumberOfFrames)
    steps, starts = np.empty((count, 3, 2)), np.empty((count, 3))
    for f in range(count):
        cosines = _group(segmentation, f, "PlaneOrientationSequence", where).ImageOrientationPatient
        height, width = _group(segmentation, f, "PixelMeasuresSequence", where).PixelSpacing
        place = _group(segmentation, f, "PlanePositionSequence", where).ImagePositionPatient
        along_row, along_column = np.asarray(cosines, float).reshape(2, 3)
        steps[f] = to_voxels[:3, :3] @ TO_RAS @ np.stack([along_column * float(height), along_row * float(width)], 1)
        starts[f] = to_voxels[:3, :3] @ TO_RAS @ np.asarray(place, float) + to_voxels[:3, 3]
    slices = np.round(starts[:, 2]).astype(np.int64)
    drift = np.abs(steps - np.eye(3)[:, :2]).max(initial=0) * max(grid.shape)
    off = np.abs(starts - np.stack([0 * slices, 0 * slices, slices], 1)).max(initial=0)
    if size != grid.shape[:2] or max(drift, off) > OFF_GRID or slices.min() < 0 or slices.max() >= grid.shape[2]:
        raise InvalidSampleError(
            where,
            f"frames of {size} pixels on slices {slices.min()} to {slices.max()}, {max(drift, off):.3g} voxels off",
            f"frames on the pixels of the image, {grid.shape[:2]}, on slices 0 to {grid.shape[2] - 1}",
        )
    return slices
