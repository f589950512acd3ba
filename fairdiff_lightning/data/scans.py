"""Scans that lesions are put into: a data set's own blocks, and whole scans with a place in their lungs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.frames import VolumeFrame, volume_tensors
from fairdiff_lightning.data.native import Record, visible_files
from fairdiff_lightning.data.requests import MaskReader, Request
from fairdiff_lightning.data.resample import to_spacing
from fairdiff_lightning.data.rois import candidate_places, extract_rois, lung_mask
from fairdiff_lightning.data.volume_dataset import VolumeDataset
from fairdiff_lightning.data.volumes import NIFTI, Size, Volume, read_volume

SCAN = "scan"
"""Role of the file of a whole scan."""
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
            InvalidSampleError: for a scan without a place for the lesion.
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
            return volume_tensors(*place_in_scan(background, lesion, size, request.seed, self.dataset))
        image = volume_tensors(self.frame.background(self.dataset, background))
        return image if condition is None else {**image, "mask": self._mask(condition, background)}

    def _mask(self, condition: Record, background: Record) -> Tensor:
        """The mask to follow; blocks are centred on their lesions, so that one fits into another's middle."""
        anatomy = set(range(1, len(self.dataset.classes))) - set(self.dataset.lesions)
        if anatomy and background.id not in (condition.id, condition.source):
            raise ValueError(
                f"generate: the mask of '{condition.id}' has the anatomy of that case, not of '{background.id}'. Give "
                "masks='own', or masks that LesionMaskDiffusion made for these backgrounds."
            )
        if "mask" not in {role.split("/")[0] for role in condition.files}:
            raise ValueError(
                f"generate: masks='own', but '{condition.id}' has none. Give masks='train', or generated ones."
            )
        return self.frame.condition(self.dataset, condition)["mask"]


def list_scans(path: Path) -> list[Record]:
    """The scans below a folder: NIfTI files, and folders that hold a DICOM series; or the one scan that ``path`` is.

    Raises:
        InvalidSampleError: when there is none.
    """
    files = [p for p in visible_files(path, "**/*") if p.name.endswith(NIFTI)] if path.is_dir() else [path]
    series = sorted({p.parent for p in visible_files(path, "**/*.dcm")}) if path.is_dir() else []
    found = [p for p in (*files, *series) if p.exists()]
    if not found:
        raise InvalidSampleError(path, "no scan", f"files that end in {' or '.join(NIFTI)}, or folders of DICOM files")
    return [Record(_stem(p, path), {SCAN: str(p)}, {}, _stem(p, path)) for p in found]


def place_in_scan(scan: Record, lesion: Volume, size: Size, seed: int, dataset: VolumeDataset) -> tuple[Volume, Volume]:
    """Cut a block out of a scan at a place in the lungs that holds a lesion as a whole.

    Args:
        scan: record of a whole scan, of chest CT in HU.
        lesion: mask of class indices from another case, of any spacing; it is resampled to the scan's.
        size: of the block, (H, W, D), voxels of the scan.
        seed: of the place.
        dataset: tells how its axes run, and its window.

    Returns:
        The block in [0, 1] and the mask of the lesion to come, both in their place in the patient.

    Raises:
        InvalidSampleError: for values that are no HU, a scan without lungs, or lungs without room for the lesion.
    """
    whole = read_volume(scan.files[SCAN])
    lungs = lung_mask(whole)
    shape = to_spacing(lesion.reoriented(("R", "A", "S")), whole.spacing.tolist(), "nearest")
    (start,) = candidate_places(lungs, shape.array, 1, seed, MARGIN)
    mask = np.zeros(whole.shape, np.uint8)
    voxels = np.argwhere(shape.array) + start
    mask[tuple(voxels.T)] = shape.array[shape.array != 0]
    image, block = (whole.with_array(array).reoriented(dataset.axes) for array in (whole.array, mask))
    roi = extract_rois(image, block, size, fill=dataset.window.low)[0]
    return roi.image.with_array(dataset.window.to_unit(roi.image.array)), roi.mask


def _stem(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix() if path != root else path.name
    return name.split(".nii")[0].replace("/", "-")
