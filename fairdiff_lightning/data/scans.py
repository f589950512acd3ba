"""Lesions put into scans: into a data set's own blocks, and into whole scans with a place in their lungs or organ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from fairdiff_lightning.data.blocks import place_back, shares_grid
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.frames import VolumeFrame, volume_tensors
from fairdiff_lightning.data.native import Record
from fairdiff_lightning.data.requests import MaskReader, Request
from fairdiff_lightning.data.resample import to_spacing
from fairdiff_lightning.data.rois import block_around, candidate_places, deep_inside, lung_mask
from fairdiff_lightning.data.scan_list import ORGAN, SCAN
from fairdiff_lightning.data.volume_dataset import VolumeDataset, on_grid
from fairdiff_lightning.data.volumes import RAS, Size, Volume, Window, check_same_grid, read_volume

MARGIN = 2.0
"""Least distance of a lesion from the border of the lung or organ, mm."""


@dataclass
class LesionReader:
    """Reads the scan that a lesion is put into and the mask that it follows; keeps the last whole scan.

    Args:
        dataset: reads the files.
        frame: what part of them is given.
    """

    dataset: VolumeDataset
    frame: VolumeFrame
    _last: tuple[Record, tuple[Volume, Volume]] | None = field(default=None, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """All but the last scan, which a loader process has no use for."""
        return self.__dict__ | {"_last": None}

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
            self._refuse_anatomy(condition, background)
            lesion = self.dataset.read_labels(condition)
            size = self.frame.size or lesion.shape
            return volume_tensors(
                *place_in_scan(*self._whole(background), lesion, size, request.seed, self.dataset.window)
            )
        image = self.frame.background(self.dataset, background)
        found = volume_tensors(image)
        return found if condition is None else {**found, "mask": self._mask(condition, background, image)}

    def _whole(self, scan: Record) -> tuple[Volume, Volume]:
        if self._last is None or self._last[0] != scan:
            self._last = None  # so that two scans are never held at once
            self._last = scan, read_room(scan, self.dataset, self.frame.spacing)
        return self._last[1]

    def _mask(self, condition: Record, background: Record, image: Volume) -> Tensor:
        """The mask to follow: in its place in its own scan, in the middle of another, as lesions are of their blocks.

        Args:
            condition: whose mask it is.
            background: the scan that it goes into.
            image: the block of that scan.
        """
        anatomy = self._refuse_anatomy(condition, background)
        if "mask" not in {role.split("/")[0] for role in condition.files}:
            others = "scans with the contours of their organ" if anatomy else "masks='train', or generated ones"
            raise ValueError(f"generate: masks='own', but '{condition.id}' has none. Give {others}.")
        if condition.id == background.id:
            grid, labels = self.dataset.read_grid(background), self.dataset.read_labels(condition)
            check_same_grid(grid, labels, _mask_file(condition))
        mask = self.frame.condition(self.dataset, condition)
        own = background.id in (condition.id, condition.source)
        return _in_place(mask, image, condition) if own else mask["mask"]

    def _refuse_anatomy(self, condition: Record, background: Record) -> set[int]:
        """The classes that are anatomy; a mask with them belongs to the scan that it was drawn in."""
        anatomy = set(range(1, len(self.dataset.classes))) - set(self.dataset.lesions)
        if anatomy and background.id not in (condition.id, condition.source):
            raise ValueError(
                f"generate: the mask of '{condition.id}' has the anatomy of that case, not of '{background.id}'. Give "
                "masks='own', or masks that LesionMaskDiffusion made for these backgrounds."
            )
        return anatomy


def read_room(scan: Record, dataset: VolumeDataset, spacing: Sequence[float] | None = None) -> tuple[Volume, Volume]:
    """Read a whole scan and tell where in it a lesion may lie, with axes as those of the data set.

    Args:
        scan: record of a whole scan, with the mask of the organ, or of chest CT in HU.
        dataset: reads it, and tells how its axes run.
        spacing: of the voxels that it is resampled to, mm; None leaves them.

    Returns:
        The scan in the unit of the data set's window, and the inside of its lungs or organ, {0, 1}.

    Raises:
        InvalidSampleError: for values that are no HU, a scan without lungs, and an organ mask on another grid.
    """
    whole, organ = dataset.read_scan(scan.files[SCAN]), scan.files.get(ORGAN)
    given = None if organ is None else _organ(whole, organ)
    if spacing is not None:
        whole = to_spacing(whole.reoriented(dataset.axes), spacing, "bilinear").reoriented(RAS)
        given = given and to_spacing(given.reoriented(dataset.axes), spacing, "nearest")
    room = deep_inside(given or lung_mask(whole), MARGIN)
    return whole.reoriented(dataset.axes), room.reoriented(dataset.axes)


def place_in_scan(
    whole: Volume, room: Volume, lesion: Volume, size: Size, seed: int, window: Window
) -> tuple[Volume, Volume]:
    """Cut a block out of a scan at a place in the lungs, or in the given organ, that holds a lesion as a whole.

    Args:
        whole: the scan, from :func:`read_room`.
        room: where the lesion may lie, from there too.
        lesion: mask of class indices from another case, with axes as those of the scan, of any spacing.
        size: of the block, (H, W, D), voxels.
        seed: of the place.
        window: intensities that become [0, 1].

    Returns:
        The block in [0, 1] and the mask of the lesion to come, both in their place in the patient.

    Raises:
        InvalidSampleError: for lungs without room for the lesion, or a lesion that does not fit into the block.
    """
    shape = to_spacing(lesion, whole.spacing.tolist(), "nearest").array
    (start,) = candidate_places(room, shape, 1, seed)
    mask = np.zeros(whole.shape, np.uint8)
    mask[tuple((np.argwhere(shape) + start).T)] = shape[shape != 0]
    (box,) = ndimage.find_objects((mask != 0).astype(np.uint8))
    roi = block_around(whole, whole.with_array(mask), box, size, window.low)
    if roi.is_cut:
        raise InvalidSampleError(
            "lesion",
            f"{np.count_nonzero(mask)} voxels of {whole.spacing.round(2).tolist()} mm",
            f"one that fits into the block, {tuple(size)}; give a larger image_size",
        )
    return roi.image.with_array(window.to_unit(roi.image.array)), roi.mask


def _organ(scan: Volume, file: str) -> Volume:
    """The mask {0, 1} of an organ on the grid of its scan."""
    mask = on_grid(scan, read_volume(file), file)
    if not mask.array.any():
        raise InvalidSampleError(file, "a mask without a voxel of the organ", "values other than 0 where the organ is")
    return mask.with_array((mask.array != 0).astype(np.uint8))


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
