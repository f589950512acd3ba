"""The data module of volumes: resampling, blocks, mirroring, and lesions to be put into healthy scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from fairdiff_lightning.data.augmentation import RandomMirror
from fairdiff_lightning.data.batch_augmentation import Classical
from fairdiff_lightning.data.cache import Storage
from fairdiff_lightning.data.classical_augmentation import ClassicalAugmentation
from fairdiff_lightning.data.dataset import SegmentationDataset
from fairdiff_lightning.data.frames import VolumeFrame
from fairdiff_lightning.data.native import Record
from fairdiff_lightning.data.native_module import NativeDataModule
from fairdiff_lightning.data.patches import PatchSampler
from fairdiff_lightning.data.requests import HEALTHY, TRAINING, RequestReader
from fairdiff_lightning.data.scans import LesionReader, list_scans
from fairdiff_lightning.data.volume_dataset import VolumeDataset

Sides = tuple[int, int, int]


class VolumeDataModule(NativeDataModule):
    """Splits, mixes, caches and loads a native data set of volumes; subclasses add its constants and defaults.

    Args:
        dataset: reads and writes the files.
        root: folder in the owner's layout; None writes a phantom into the cache folder and uses it.
        attributes: attributes that a sample carries; the first is the one that ``balance`` and the sampler balance.
        image_size: height, width and depth of a sample, voxels, cropped or padded; None keeps each volume's own.
        batch_size: samples in a batch, on each device; when not training 1 where volumes differ in size.
        num_workers: loader processes.
        spacing: of the voxels that volumes are resampled to, mm; None resamples nothing.
        crop_foreground: crop to the box in which the image is above the window's low end first.
        patch_size: height, width and depth of the block of each volume that training sees, drawn anew each time.
        positive: share of these blocks that lie around a voxel of the foreground.
        augment: random mirroring of the training batch, and the change of intensity that is asked for.
        augmentation: a row of :class:`~fairdiff_lightning.data.classical_augmentation.ClassicalAugmentation` instead.
        intensity: largest relative change of scale, and absolute one of level, that augmentation makes; 0 for none.
        **kwargs: arguments of :class:`~fairdiff_lightning.data.native_module.NativeDataModule`.

    Raises:
        ValueError: for a patch larger than the image.
    """

    dataset: VolumeDataset
    frame: VolumeFrame

    def __init__(
        self,
        dataset: VolumeDataset,
        root: str | None = None,
        attributes: Sequence[str] = (),
        image_size: Sides | None = None,
        batch_size: int = 2,
        num_workers: int = 0,
        spacing: tuple[float, float, float] | None = None,
        crop_foreground: bool = False,
        patch_size: Sides | None = None,
        positive: float = 0.5,
        augment: bool = True,
        augmentation: Classical | None = None,
        intensity: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if image_size and patch_size and any(p > n for p, n in zip(patch_size, image_size, strict=True)):
            raise ValueError(f"patch_size={patch_size} is larger than image_size={image_size}.")
        frame = VolumeFrame(_sides(image_size), spacing, crop_foreground, _sides(patch_size))
        mirror = RandomMirror(dataset.flip_axes, intensity=intensity) if augmentation is None else None
        change = (mirror or ClassicalAugmentation(cast(Classical, augmentation))) if augment else None
        super().__init__(dataset, frame, root, attributes, batch_size, num_workers, augmentation=change, **kwargs)
        size = _sides(patch_size)
        self.patch = None if size is None else PatchSampler(size, positive, self.seed)

    def make_dataset(
        self, records: Sequence[Record], native_mask: bool = False, cache: Storage = "none", training: bool = False
    ) -> SegmentationDataset:
        """Records as samples; blocks of them in training."""
        patch, partners = (self.patch, self.partners) if training else (None, None)
        settings = (list(self.attribute_groups), self.frame, native_mask, cache)
        return SegmentationDataset(self.dataset, records, *settings, patch=patch, partners=partners)

    @property
    def evaluation_batch_size(self) -> int:
        """Samples in a batch when not training; volumes of unequal size do not stack."""
        return 1 if self.frame.size is None else self.batch_size

    def backgrounds(self) -> list[Record] | None:
        """The scans that ``generate`` wants lesions put into, of no held-out case; None when it wants none.

        Raises:
            ValueError: when there is none.
        """
        wanted = self.generate.backgrounds if self.generate is not None else None
        if wanted is None:
            return None
        if wanted == TRAINING:
            return self._real
        found = self.dataset.backgrounds(self.folder) if wanted == HEALTHY else list_scans(Path(wanted))
        free = [scan for scan in found if self.dataset.case_key(scan.id) not in self._held_out]
        if len(free) < len(found):
            rank_zero_info(f"{len(found) - len(free)} healthy scans are of validation or test cases and are left out.")
        if not free:
            raise ValueError(
                f"generate: backgrounds={wanted!r}, but '{self.folder}' has no scan without a lesion whose case "
                "is not held out. Give backgrounds='train', or a folder of scans."
            )
        return free

    def request_reader(self) -> RequestReader:
        """Reads masks, and the scans that lesions are put into."""
        return LesionReader(self.dataset, self.frame)

    def write_mask(self, directory: Path, sample_id: str, mask: torch.Tensor | NDArray[np.uint8]) -> Path:
        """Store a predicted mask (1, H, W, D) or (H, W, D) of class indices on the grid of its image."""
        array = np.asarray(mask, dtype=np.uint8).reshape(mask.shape[-3:])
        record = next(record for record in self.splits["test"] if record.id == sample_id)
        return self.dataset.write_prediction(Path(directory), record, array)

    def write_sample(self, directory: Path, sample: Mapping[str, Any]) -> Path:
        """Store a generated sample in the data set's own layout; one without an image as a mask."""
        if "image" in sample:
            return super().write_sample(directory, sample)
        mask = np.asarray(sample["mask"][0], dtype=np.uint8)
        affine = np.asarray(sample["affine"], np.float64) if "affine" in sample else None
        return self.dataset.write_mask(Path(directory), sample["id"], mask, affine)


def _sides(size: Sequence[int] | None) -> Sides | None:
    return None if size is None else (size[0], size[1], size[2])
