"""Scans that lesions are put into: a data set's own blocks, and whole scans with a place in their lungs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
from fairdiff_lightning.data.volumes import NIFTI, RAS, Size, Volume

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
            return volume_tensors(
                *place_in_scan(background, lesion, size, request.seed, self.dataset, self.frame.spacing)
            )
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
            others = "scans with the contours of their organ" if anatomy else "masks='train', or generated ones"
            raise ValueError(f"generate: masks='own', but '{condition.id}' has none. Give {others}.")
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
    roi = extract_rois(whole, whole.with_array(mask), size, fill=dataset.window.low)[0]
    if np.count_nonzero(roi.mask.array) < np.count_nonzero(mask):
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


def _stem(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix() if path != root else path.name
    return name.split(".nii")[0].replace("/", "-")
