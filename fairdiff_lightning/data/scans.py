"""Scans that lesions are put into: a data set's own blocks, and whole scans with a place in their lungs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from fairdiff_lightning.data.blocks import place_back, shares_grid
from fairdiff_lightning.data.dicom_masks import is_dicom
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.frames import VolumeFrame, volume_tensors
from fairdiff_lightning.data.native import Record, visible_files
from fairdiff_lightning.data.requests import MaskReader, Request
from fairdiff_lightning.data.resample import to_spacing
from fairdiff_lightning.data.rois import block_around, candidate_places, lung_mask
from fairdiff_lightning.data.volume_dataset import VolumeDataset
from fairdiff_lightning.data.volumes import NIFTI, RAS, Size, Volume, check_same_grid

SCAN = "scan"
"""Role of the file of a whole scan."""
PATIENT = re.compile(r"LIDC-IDRI-\d{4}")
"""A patient of LIDC-IDRI, as the names of folders and files tell him."""
MARGIN = 2.0
"""Least distance of a lesion from the border of the lung, mm."""


@dataclass(frozen=True)
class LesionReader:
    """Reads the scan that a lesion is put into and the mask that it follows.

    Args:
        dataset: reads the files.
        frame: what part of them is given.
    """

    dataset: VolumeDataset
    frame: VolumeFrame

    def __call__(self, request: Request) -> Mapping[str, Any]:
        """``image`` in [0, 1], ``mask``, ``affine`` and ``spacing``.

        Raises:
            InvalidSampleError: for a scan without a place for the lesion, or a mask on another grid than the scan that
                it belongs to.
            ValueError: for a mask of another case's anatomy, or where there is none.
        """
        background, condition = request.background, request.condition
        if background is None:
            return MaskReader(self.dataset, self.frame)(request)
        if SCAN in background.files:
            if condition is None or condition is background:
                raise ValueError("generate: whole scans need masks='train', or a folder of generated ones.")
            lesion = self.dataset.read_labels(condition)
            size = self.frame.size or lesion.shape
            return volume_tensors(
                *place_in_scan(background, lesion, size, request.seed, self.dataset, self.frame.spacing)
            )
        image = self.frame.background(self.dataset, background)
        found = volume_tensors(image)
        return found if condition is None else {**found, "mask": self._mask(condition, background, image)}

    def _mask(self, condition: Record, background: Record, image: Volume) -> Tensor:
        """The mask to follow: in its place in its own scan, in the middle of another, as lesions are of their blocks.

        Args:
            condition: whose mask it is.
            background: the scan that it goes into.
            image: the block of that scan.
        """
        anatomy = set(range(1, len(self.dataset.classes))) - set(self.dataset.lesions)
        if anatomy and background.id not in (condition.id, condition.source):
            raise ValueError(
                f"generate: the mask of '{condition.id}' has the anatomy of that case, not of '{background.id}'. Give "
                "masks='own', or masks that LesionMaskDiffusion made for these backgrounds."
            )
        if "mask" not in {role.split("/")[0] for role in condition.files}:
            others = "scans with the contours of their organ" if anatomy else "masks='train', or generated ones"
            raise ValueError(f"generate: masks='own', but '{condition.id}' has none. Give {others}.")
        if condition.id == background.id:
            grid, labels = self.dataset.read_grid(background), self.dataset.read_labels(condition)
            check_same_grid(grid, labels, _mask_file(condition))
        mask = self.frame.condition(self.dataset, condition)
        own = background.id in (condition.id, condition.source)
        return _in_place(mask, image, condition) if own else mask["mask"]


def list_scans(path: Path) -> list[Record]:
    """The scans below a folder: NIfTI files, and folders that hold a DICOM series; or the one scan that ``path`` is.

    The id is the path below ``path``, with the patient in front where the whole path tells him and it alone does not.

    Raises:
        InvalidSampleError: when there is none, or two would have one id.
    """
    files = [p for p in visible_files(path, "**/*") if p.is_file()] if path.is_dir() else []
    folders: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        folders[file.parent].append(file)
    series = [folder for folder, held in sorted(folders.items()) if any(map(_is_slice, held))]
    found = [*(p for p in files if p.name.endswith(NIFTI)), *series, *([path] if path.is_file() else [])]
    if not found:
        raise InvalidSampleError(path, "no scan", f"files that end in {' or '.join(NIFTI)}, or folders of DICOM files")
    scans: dict[str, Path] = {}
    for scan in found:
        name = _name(scan, path)
        if name in scans:
            raise InvalidSampleError(scan, f"the id '{name}', as of '{scans[name]}'", "another name for one of the two")
        scans[name] = scan
    return [Record(name, {SCAN: str(scan)}, {}, _patient(scan) or name) for name, scan in scans.items()]


def place_in_scan(
    scan: Record, lesion: Volume, size: Size, seed: int, dataset: VolumeDataset, spacing: Sequence[float] | None = None
) -> tuple[Volume, Volume]:
    """Cut a block out of a scan at a place in the lungs that holds a lesion as a whole.

    Args:
        scan: record of a whole scan, of chest CT in HU.
        lesion: mask of class indices from another case, whose axes run as ``dataset.axes``, of any spacing.
        size: of the block, (H, W, D), voxels.
        seed: of the place.
        dataset: tells how its axes run, and its window.
        spacing: of the block's voxels, mm; that of the scan when None.

    Returns:
        The block in [0, 1] and the mask of the lesion to come, both in their place in the patient.

    Raises:
        InvalidSampleError: for values that are no HU, a scan without lungs, lungs without room for the lesion, or a
            lesion that does not fit into the block.
    """
    whole, lungs = _whole(scan.files[SCAN], dataset, None if spacing is None else tuple(spacing))
    shape = to_spacing(lesion, whole.spacing.tolist(), "nearest").array
    (start,) = candidate_places(lungs, shape, 1, seed, MARGIN)
    mask = np.zeros(whole.shape, np.uint8)
    mask[tuple((np.argwhere(shape) + start).T)] = shape[shape != 0]
    (box,) = ndimage.find_objects((mask != 0).astype(np.uint8))
    roi = block_around(whole, whole.with_array(mask), box, size, dataset.window.low)
    if roi.is_cut:
        raise InvalidSampleError(
            "lesion",
            f"{np.count_nonzero(mask)} voxels of {whole.spacing.round(2).tolist()} mm",
            f"one that fits into the block, {tuple(size)}; give a larger image_size",
        )
    return roi.image.with_array(dataset.window.to_unit(roi.image.array)), roi.mask


@lru_cache(maxsize=2)
def _whole(file: str, dataset: VolumeDataset, spacing: tuple[float, ...] | None) -> tuple[Volume, Volume]:
    """A scan and its lungs, with axes as those of the data set."""
    scan = dataset.read_scan(file)
    if spacing is not None:
        turned = scan.reoriented(dataset.axes)
        scan = to_spacing(turned, spacing, "bilinear").reoriented(RAS)
    lungs = lung_mask(scan)
    return scan.reoriented(dataset.axes), lungs.reoriented(dataset.axes)


def _in_place(mask: Mapping[str, Tensor], block: Volume, condition: Record) -> Tensor:
    """A mask on the grid of a block, told from their affines."""
    labels = Volume(mask["mask"][0].numpy(), mask["affine"].numpy())
    if not shares_grid(labels, block):
        raise InvalidSampleError(
            _mask_file(condition),
            f"affine {labels.affine.round(4).tolist()} for a scan of {block.affine.round(4).tolist()}",
            f"the grid of '{condition.source or condition.id}', which it belongs to; make it for that scan, at its "
            "spacing",
        )
    return torch.from_numpy(place_back(labels, block.with_array(np.zeros(block.shape, np.int64))).array)[None]


def _mask_file(record: Record) -> str:
    return record.files.get("mask", f"mask of {record.id}")


def _is_slice(path: Path) -> bool:
    """Whether a file may be of a series; a DICOMDIR is the table of contents of a disc."""
    return path.name != "DICOMDIR" and is_dicom(path)


def _name(path: Path, root: Path) -> str:
    """The id of a scan; the first patient in it is the one that the scan is of."""
    name = (path.relative_to(root).as_posix() if path != root else path.resolve().name).split(".nii")[0]
    name, patient = name.replace("/", "-"), _patient(path)
    return name if patient is None or PATIENT.findall(name)[:1] == [patient] else f"{patient}-{name}"


def _patient(path: Path) -> str | None:
    """The patient whose folder or file it is: the last one that the path names, links followed where they tell one."""
    named = PATIENT.findall(str(path.resolve())) or PATIENT.findall(str(path.absolute()))
    return named[-1] if named else None
