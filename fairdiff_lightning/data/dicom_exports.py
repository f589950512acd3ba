"""Radiotherapy exports as planning systems write them: a folder for each patient, whose files tell what they are.

Which series a structure set (RTSTRUCT) or segmentation (SEG) belongs to is said by its references, never by its name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pydicom
from lightning.pytorch.utilities import rank_zero_warn
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import RTStructureSetStorage, SegmentationStorage

from fairdiff_lightning.data.case_folders import Cases
from fairdiff_lightning.data.dicom_masks import SUFFIXES
from fairdiff_lightning.data.dicom_series import NO_SLICES
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import visible_files
from fairdiff_lightning.data.scan_list import patient_id

TAGS = [
    "SOPClassUID",
    "Modality",
    "Rows",
    "PatientID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "ReferencedFrameOfReferenceSequence",
    "ReferencedSeriesSequence",
    "StructureSetROISequence",
]
"""All that is read of a file: no pixels, and no contours."""


@dataclass
class Series:
    """Slices of one SeriesInstanceUID.

    Args:
        uid: of the series.
        modality: ``CT`` for what is planned on.
        frame: of reference.
        patient: PatientID; empty where it tells nobody.
        folders: that hold slices of it, in order.
    """

    uid: str
    modality: str
    frame: str
    patient: str = ""
    folders: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Mask:
    """A structure set or segmentation, and the SeriesInstanceUIDs and frames of reference that it names."""

    path: Path
    series: frozenset[str]
    frames: frozenset[str]


def find_exports(root: Path, modality: str = "CT") -> Cases:
    """Find the series in each folder below ``root``, and the structure set or segmentation of each.

    A case has the name of its folder as its id; where a folder has several cases, their SeriesInstanceUIDs follow. The
    patient is the PatientID, or the folder where that tells nobody; folders that share one are warned of. What lies
    deeper, and what files are called, does not matter.

    Args:
        root: folder of the patients.
        modality: of the series that are taken.

    Returns:
        Rows with ``id``, ``image`` (a folder), ``mask`` (nothing for a series without one, if it is the folder's only
        one), ``folder`` (its name), ``patient`` and ``series``. Errors are masks of a series that is not there, or of
        several, two masks of one series, several series without a mask, a series in several folders, and cases of
        several patients in one folder.
    """
    cases, left_out = Cases(), Counter[str]()
    for folder in (path for path in visible_files(root, "*") if not path.is_file()):
        try:
            series, masks = _read_headers(folder)
            paired = _pair(masks, series, modality)
            rows = _rows(folder, {uid: s for uid, s in series.items() if s.modality == modality}, paired)
        except InvalidSampleError as error:
            cases.errors.append(error)
            continue
        left_out["folders without a series of images"] += not series
        cases.rows |= {f"{row['image']}, series {row['series']}": row for row in rows}
        left_out[f"series that are no {modality}"] += sum(s.modality != modality for s in series.values())
        left_out["series without a mask beside one that has it"] += sum(
            s.modality == modality for s in series.values()
        ) - len(rows)
    cases.left_out = {reason: count for reason, count in left_out.items() if count}
    _warn_of_shared(root, cases.rows.values())
    return cases


def _read_headers(folder: Path) -> tuple[dict[str, Series], list[Mask]]:
    """The series below a patient's folder, by SeriesInstanceUID, and the masks."""
    series: dict[str, Series] = {}
    masks = []
    for path, header in _headers(folder):
        if header.get("SOPClassUID") in (RTStructureSetStorage, SegmentationStorage):
            masks.append(Mask(path, *_references(header)))
        elif "Rows" in header and header.get("SOPClassUID") not in NO_SLICES and header.get("SeriesInstanceUID"):
            uid, frame = str(header.SeriesInstanceUID), str(header.get("FrameOfReferenceUID") or "")
            found = series.setdefault(uid, Series(uid, str(header.get("Modality") or ""), frame))
            found.patient = found.patient or patient_id(header)
            if path.parent not in found.folders:
                found.folders.append(path.parent)
    return series, masks


def _headers(folder: Path) -> Iterator[tuple[Path, Dataset]]:
    for path in visible_files(folder, "**/*"):
        if path.is_dir():
            continue
        try:
            yield path, pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
        except (InvalidDicomError, OSError, EOFError, ValueError) as error:
            if path.suffix.lower() in SUFFIXES or not isinstance(error, InvalidDicomError):
                raise InvalidSampleError(path, f"unreadable ({error})", "a DICOM file; fetch it again") from error


def _references(header: Dataset) -> tuple[frozenset[str], frozenset[str]]:
    """SeriesInstanceUIDs and frames of reference that a structure set or a segmentation names."""
    frames = list(header.get("ReferencedFrameOfReferenceSequence") or [])
    studies = [study for frame in frames for study in frame.get("RTReferencedStudySequence") or []]
    series = [item for study in studies for item in study.get("RTReferencedSeriesSequence") or []]
    series += list(header.get("ReferencedSeriesSequence") or [])
    named = {str(item.get("SeriesInstanceUID") or "") for item in series}
    own = {str(item.get("FrameOfReferenceUID") or "") for item in (header, *frames)}
    own |= {str(roi.get("ReferencedFrameOfReferenceUID") or "") for roi in header.get("StructureSetROISequence") or []}
    return frozenset(named - {""}), frozenset(own - {""})


def _pair(masks: list[Mask], series: dict[str, Series], modality: str) -> dict[str, Path]:
    """SeriesInstanceUID -> its mask."""
    paired: dict[str, Path] = {}
    for mask in masks:
        uid = _series_of(mask, series, modality)
        if uid in paired:
            raise InvalidSampleError(
                mask.path,
                f"a second mask of the series {uid}, beside '{paired[uid]}'",
                "one for each series; move the other elsewhere, or name the one in cases.csv",
            )
        paired[uid] = mask.path
    return paired


def _series_of(mask: Mask, series: dict[str, Series], modality: str) -> str:
    """The series that a mask names; where it names none, the only one in its frame of reference.

    A PET shares the frame of its CT: of several series, the only one of the modality is taken.
    """
    found = [s.uid for s in series.values() if (s.uid in mask.series if mask.series else s.frame in mask.frames)]
    found = [uid for uid in found if series[uid].modality == modality] or found
    if len(found) != 1:
        named = f"series {sorted(mask.series)}" if mask.series else f"frames {sorted(mask.frames)}"
        there = {s.uid: f"{s.modality} in frame {s.frame}" for s in series.values()}
        raise InvalidSampleError(
            mask.path,
            f"{len(found)} series that it may be of, by the {named} that it names; there are {there}",
            "one; name image and mask of each case in cases.csv",
        )
    return found[0]


def _rows(folder: Path, series: dict[str, Series], paired: dict[str, Path]) -> list[dict[str, str]]:
    """The cases of a folder: the series with a mask, or the only one without."""
    chosen = [s for uid, s in series.items() if uid in paired] or list(series.values())
    if len(chosen) > 1 and not paired.keys() & series.keys():
        raise InvalidSampleError(
            folder, f"{len(chosen)} series {sorted(series)} and a mask of none", "one to be segmented for each patient"
        )
    for one in chosen:
        if len(one.folders) > 1:
            raise InvalidSampleError(folder, f"slices of the series {one.uid} in {len(one.folders)} folders", "one")
    patient = _patient(folder, chosen)
    return [
        {
            "id": folder.name if len(chosen) == 1 else f"{folder.name}-{one.uid}",
            "image": str(one.folders[0].absolute()),
            "mask": str(paired[one.uid].absolute()) if one.uid in paired else "",
            "folder": folder.name,
            "patient": patient,
            "series": one.uid,
        }
        for one in chosen
    ]


def _patient(folder: Path, chosen: Iterable[Series]) -> str:
    """Whose the cases of a folder are: as they say, or the folder's name where they tell nobody."""
    told = {one.patient for one in chosen} - {""}
    if len(told) > 1:
        raise InvalidSampleError(
            folder, f"series of the patients {sorted(told)}", "those of one; give each a folder of his own"
        )
    return told.pop() if told else folder.name


def _warn_of_shared(root: Path, rows: Iterable[Mapping[str, str]]) -> None:
    folders: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        folders[row["patient"]].add(row["folder"])
    for shared in (sorted(names) for names in folders.values() if len(names) > 1):
        rank_zero_warn(
            f"{root}: the folders {', '.join(shared)} are of one patient, by their PatientID, and no split parts them; "
            "where that is wrong, say so in the column `patient` of a table."
        )
