"""Masks of cases that are DICOM objects: structures (RTSTRUCT) or segments (SEG), chosen by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.misc import is_dicom as has_preamble
from pydicom.uid import RTStructureSetStorage, SegmentationStorage

from fairdiff_lightning.data.dicom_seg import open_object, read_segmentation
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.grid import Volume
from fairdiff_lightning.data.rtstruct import read_structures
from fairdiff_lightning.data.volumes import NIFTI

SUFFIXES = (".dcm", ".dicom")
EXPECTED = "a DICOM structure set (RTSTRUCT) or segmentation (SEG)"


def is_dicom(file: str | Path) -> bool:
    """Whether a file is DICOM by its name, or by what it begins with: exports often name files by UID alone."""
    path = Path(file)
    if path.name.endswith(NIFTI):
        return False
    return path.suffix.lower() in SUFFIXES or (path.is_file() and has_preamble(path))


def is_structure_set(file: str | Path) -> bool:
    """Whether a file is an RTSTRUCT.

    Raises:
        InvalidSampleError: for a DICOM object that is no mask at all.
    """
    return is_dicom(file) and bool(_open(file).SOPClassUID == RTStructureSetStorage)


def read_dicom_mask(
    file: str | Path, image: Volume, classes: Sequence[str], structures: Sequence[str], joined: bool
) -> Volume:
    """Read an RTSTRUCT or a binary SEG as a mask on the grid of its image.

    Args:
        file: of the mask.
        image: the DICOM series that it belongs to.
        classes: names of the mask's values, background first; a segment with the name of one is of this class.
        structures: regular expressions of the whole names of the structures that are joined, and of the segments.
        joined: whether a SEG is read as one target too, of the segments that match or have the target's name; else
            every segment is a class by its name. Names match in capitals or not.

    Returns:
        uint8 of class indices; of an RTSTRUCT {0, 1}.

    Raises:
        InvalidSampleError: for another object, names that do not match, and what
            :func:`~fairdiff_lightning.data.rtstruct.read_structures` and
            :func:`~fairdiff_lightning.data.dicom_seg.read_segmentation` refuse.
    """
    found = _open(file)
    if found.SOPClassUID == RTStructureSetStorage:
        return read_structures(file, image, structures)
    segments = found.get("SegmentSequence") or []
    labels = {int(segment.SegmentNumber): str(segment.get("SegmentLabel") or "").strip() for segment in segments}
    return read_segmentation(file, image, _classes_of(labels, classes, structures if joined else None, file))


def _open(file: str | Path) -> Dataset:
    return open_object(file, (RTStructureSetStorage, SegmentationStorage), EXPECTED)


def _classes_of(
    labels: Mapping[int, str], classes: Sequence[str], structures: Sequence[str] | None, where: str | Path
) -> dict[int, int]:
    """Segment -> class; those that belong to no joined target are left out."""
    named = {name.casefold(): index for index, name in enumerate(classes) if index}
    chosen = {number: named[label.casefold()] for number, label in labels.items() if label.casefold() in named}
    for number, label in labels.items():
        if any(re.fullmatch(pattern, label, re.IGNORECASE) for pattern in structures or ()):
            chosen[number] = 1
    if not chosen or (structures is None and len(chosen) < len(labels)):
        others = "" if structures is None else f", or one that matches {list(structures)}"
        raise InvalidSampleError(where, f"segments {sorted(labels.values())}", f"{list(classes[1:])}{others}")
    return chosen
