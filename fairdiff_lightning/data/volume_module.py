"""The data module of volumes: resampling, blocks, mirroring, and lesions to be put into healthy scans."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from fairdiff_lightning.data.augmentation import RandomMirror
from fairdiff_lightning.data.batch_augmentation import Classical
from fairdiff_lightning.data.cache import Storage
from fairdiff_lightning.data.classical_augmentation import ClassicalAugmentation
from fairdiff_lightning.data.dataset import SegmentationDataset
from fairdiff_lightning.data.frames import VolumeFrame
from fairdiff_lightning.data.native import Record
from fairdiff_lightning.data.native_module import NativeDataModule
from fairdiff_lightning.data.patches import PatchSampler
from fairdiff_lightning.data.requests import HEALTHY, TRAINING, Request, RequestReader
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.data.samplers import SequentialShards
from fairdiff_lightning.data.scan_list import SCAN, list_scans, named_cases
from fairdiff_lightning.data.scans import LesionReader
from fairdiff_lightning.data.volume_dataset import VolumeDataset

Sides = tuple[int, int, int]
STRETCH = 256
"""Requests, or a few more that fill a batch, within which whole scans come one after the other."""


class VolumeDataModule(NativeDataModule):
    """Splits, mixes, caches and loads a native data set of volumes; subclasses add its constants and defaults.

    Args:
        dataset: reads and writes the files.
        root: folder in the owner's layout; None writes a phantom into the cache folder and uses it.
        attributes: attributes that a sample carries; the first is the one that ``balance`` and the sampler balance.
        image_size: height, width and depth of a sample, voxels, cropped or padded; None keeps each volume's own.
        batch_size: samples in a batch, on each device; when not training 1 where volumes may differ in size.
        num_workers: loader processes.
        spacing: of the voxels that volumes are resampled to, mm; None resamples nothing.
        crop_foreground: crop to the box in which the image is above the window's low end first.
        patch_size: height, width and depth of the block of each volume that training sees, drawn anew each time.
        positive: share of these blocks that lie around a voxel of the foreground.
        augment: random changes of the training batch: mirroring and the change of intensity that is asked for.
        augmentation: a row of :class:`~fairdiff_lightning.data.classical_augmentation.ClassicalAugmentation` instead of
            these, or one with arguments of its own.
        mirror: mirror along the axes that the data set says; without, augmentation changes the intensity alone.
        intensity: largest relative change of scale, and absolute one of level, that augmentation makes; 0 for none.
        predict_on: what ``predict`` segments: ``new``, the cases without a mask, and the test split where there are
            none; or ``test``, the test split.
        **kwargs: arguments of :class:`~fairdiff_lightning.data.native_module.NativeDataModule`.

    Raises:
        ValueError: for a patch larger than the image, sizes that are no numbers of voxels, and a spacing that is not
            above 0; in ``train_dataloader``, for volumes of unequal size that are to make a batch.
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
        augmentation: Classical | ClassicalAugmentation | None = None,
        mirror: bool = True,
        intensity: float = 0.0,
        predict_on: Literal["new", "test"] = "new",
        **kwargs: Any,
    ) -> None:
        _check_positive("image_size", image_size, whole=True)
        _check_positive("patch_size", patch_size, whole=True)
        _check_positive("spacing", spacing)
        if predict_on not in ("new", "test"):
            raise ValueError(f"predict_on={predict_on!r}; expected is 'new' or 'test'.")
        if image_size and patch_size and any(p > n for p, n in zip(patch_size, image_size, strict=True)):
            raise ValueError(f"patch_size={patch_size} is larger than image_size={image_size}.")
        frame = VolumeFrame(_sides(image_size), spacing, crop_foreground, _sides(patch_size))
        if isinstance(augmentation, str):
            augmentation = ClassicalAugmentation(augmentation)
        plain = RandomMirror(dataset.flip_axes if mirror else (), intensity=intensity)
        kwargs["augmentation"] = (augmentation or plain) if augment else None
        super().__init__(dataset, frame, root, attributes, batch_size, num_workers, **kwargs)
        self.predict_on, size = predict_on, _sides(patch_size)
        self.patch = None if size is None else PatchSampler(size, positive, self.seed)

    @cached_property
    def new_cases(self) -> list[Record]:
        """The cases without a mask that the filters keep; they are predicted, never trained, validated or tested on.

        Raises:
            InvalidSampleError: for one that could not be listed, unless errors are skipped.
            ValueError: when there are some, but none is left.
        """
        index = self.dataset.unlabelled(self.folder)
        if not index.records and not index.errors:
            return []
        found = self._select(self.folder, index, {"new": index.records})["new"]
        rank_zero_info(f"{len(found)} cases under '{self.folder}' have no mask: `predict` segments them.")
        return found

    def setup(self, stage: str | None = None) -> None:
        """Index, split, filter, mix and check; to predict new cases, nothing but these is needed."""
        if stage == "predict" and self._predicts_new_cases():
            self.allow_zero_length_dataloader_with_multiple_devices = True  # one patient may be fewer than devices
        else:
            super().setup(stage)

    def on_before_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Check the batch against the contract when asked to; of new cases, what there is of it."""
        keys = set(batch)
        if "image" not in keys or "mask" in keys:
            return super().on_before_batch_transfer(batch, dataloader_idx)
        super().on_before_batch_transfer({**batch, "mask": torch.zeros_like(batch["image"][:, :1]).long()}, 0)
        return batch

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled, or balanced by the first attribute.

        Raises:
            ValueError: for volumes of unequal size, of which no batch can be made; see also the base class.
        """
        if self.batch_size > 1 and self.patch is None and self.frame.size is None:
            self._check_equal_sizes()
        return super().train_dataloader()

    def predict_dataloader(self) -> DataLoader[Sample]:
        """The requests of ``generate``; or the new cases, or else the test split, with the grids of their files."""
        if not self._predicts_new_cases():
            return super().predict_dataloader()
        data = self.make_dataset(self.new_cases, native_mask=True)
        return self._loader(data, SequentialShards(data, *self._ranks()))

    def make_dataset(
        self, records: Sequence[Record], native_mask: bool = False, cache: Storage = "none", training: bool = False
    ) -> SegmentationDataset:
        """Records as samples; blocks of them in training."""
        patch, partners = (self.patch, self.partners) if training else (None, None)
        frame = replace(self.frame, keep_native=True) if native_mask else self.frame
        settings = (list(self.attribute_groups), frame, native_mask, cache)
        return SegmentationDataset(self.dataset, records, *settings, patch=patch, partners=partners)

    @property
    def evaluation_batch_size(self) -> int:
        """Samples in a batch when not training; volumes of unequal size do not stack."""
        return 1 if self.frame.size is None else self.batch_size

    def backgrounds(self) -> list[Record] | None:
        """The scans that ``generate`` wants lesions put into, of no held-out case; None when it wants none.

        A whole scan of a case with a mask shows the lesions of that case, and is left out too.

        Raises:
            ValueError: when there is none.
        """
        wanted = self.generate.backgrounds if self.generate is not None else None
        if wanted is None:
            return None
        if wanted == TRAINING:
            return self._real
        healthy = self.dataset.backgrounds(self.folder)
        found = healthy if wanted == HEALTHY else self.scans(Path(wanted))
        free = self._left(found, self._held_out, "are of validation or test cases")
        if wanted == HEALTHY:
            place, remedy = str(self.folder), "Give backgrounds='train', or a folder of scans."
        else:
            names = {record.id for record in healthy}
            ill = {self.dataset.case_key(record.id) for record in self._indexed if record.id not in names}
            free = self._left(free, ill, "show lesions of their case, which would have no label,")
            place, remedy = wanted, "Give scans of other patients."
        if not free:
            raise ValueError(
                f"generate: backgrounds={wanted!r}, but '{place}' has no scan without a lesion whose case is not held "
                f"out, of {len(found)}. {remedy}"
            )
        return free

    def requests(self) -> list[Request]:
        """What ``generate`` asks for, all of it.

        Whole scans come one after the other within stretches of the plan, so that each is read once there. A stretch
        is of whole batches: a plan that grows at its end changes no batch of those that were full.

        Raises:
            ValueError: for textures with groups that are textures themselves; see also the base class.
        """
        asked = super().requests()
        self._refuse_two_textures()
        length = -(-STRETCH // self.batch_size) * self.batch_size
        stretches = (asked[start : start + length] for start in range(0, len(asked), length))
        return [request for stretch in stretches for request in _scan_after_scan(stretch)]

    @property
    def reading(self) -> dict[str, str]:
        """How files become samples, and which masks tell the place of a lesion."""
        organs = self.generate.organs if self.generate is not None else None
        return super().reading | ({} if organs is None else {"organs": organs})

    def request_reader(self) -> RequestReader:
        """Reads masks, and the scans that lesions are put into."""
        return LesionReader(self.dataset, self.frame)

    def write_mask(self, directory: Path, sample_id: str, mask: torch.Tensor | NDArray[np.uint8]) -> Path:
        """Store a predicted mask (1, H, W, D) or (H, W, D) of class indices on the grid of its image.

        Raises:
            ValueError: for an id of no case that is predicted, which has no image to tell the grid.
        """
        array = np.asarray(mask, dtype=np.uint8).reshape(mask.shape[-3:])
        cases = [*(self.new_cases if self._predicts_new_cases() else ()), *self.splits.get("test", ())]
        record = next((record for record in cases if record.id == sample_id), None)
        if record is None:
            raise ValueError(
                f"'{sample_id}' is none of the {len(cases)} cases of '{self.folder}' that can be predicted; expected "
                f"is one of {', '.join(case.id for case in cases[:5])}, ... whose image tells the mask's grid."
            )
        return self.dataset.write_prediction(Path(directory), record, array)

    def write_sample(self, directory: Path, sample: Mapping[str, Any]) -> Path:
        """Store a generated sample in the data set's own layout; one without an image as a mask."""
        if "image" in sample:
            return super().write_sample(directory, sample)
        mask = np.asarray(sample["mask"][0], dtype=np.uint8)
        affine = np.asarray(sample["affine"], np.float64) if "affine" in sample else None
        return self.dataset.write_mask(Path(directory), sample["id"], mask, affine)

    def scans(self, path: Path) -> list[Record]:
        """Whole scans; one that its path or header tells to be of a case of this data set has it as its source."""
        scans = list_scans(path, None if self.generate is None else self.generate.organs)
        key_of = self.dataset.case_key
        cases = {key_of(record.id) for record in self._indexed}
        named = named_cases(scans, cases)
        unknown = [key_of(scan.id) not in cases for scan in scans]
        found = zip(scans, named, unknown, strict=True)
        return [replace(scan, source=case) if case and other else scan for scan, case, other in found]

    @cached_property
    def _indexed(self) -> list[Record]:
        """The real samples with a mask, before any split or filter."""
        return [record for record in self.dataset.index(self.folder).records if not record.synthetic]

    def _left(self, scans: Sequence[Record], cases: Collection[str], reason: str) -> list[Record]:
        """The scans of other cases."""
        left = [scan for scan in scans if self.dataset.case_key(scan.source or scan.id) not in cases]
        if len(left) < len(scans):
            rank_zero_info(f"{len(scans) - len(left)} scans {reason} and are left out.")
        return left

    def _refuse_two_textures(self) -> None:
        plan, first = self.generate, next(iter(self.attribute_groups), None)
        if plan is not None and plan.textures and first in self.dataset.lesion_attributes:
            raise ValueError(
                f"generate: textures={list(plan.textures)} for groups of '{first}', which the samples get as a label: "
                "two say what a lesion looks like. Ask for no groups (--data.attributes=[]), or for no textures."
            )

    def _predicts_new_cases(self) -> bool:
        return self.generate is None and self.predict_on == "new" and bool(self.new_cases)

    def _check_equal_sizes(self) -> None:
        """Compare the sizes of training samples, by the headers of their files."""
        remedy = (
            f"and batch_size={self.batch_size} needs one size. Give patch_size, blocks of which training sees one of "
            "each volume, or image_size, to which all are cropped or padded, or batch_size=1."
        )
        if self.frame.foreground:
            raise ValueError(f"crop_foreground=True gives each volume a size of its own, {remedy}")
        first: tuple[str, Sides] | None = None
        for record in self.splits["train"]:
            sides = self.frame.sides(self.dataset.read_grid(record))
            first = first or (record.id, sides)
            if sides != first[1]:
                raise ValueError(f"'{first[0]}' gives samples of {first[1]} voxels, '{record.id}' of {sides}, {remedy}")


def _check_positive(name: str, values: Sequence[float] | None, whole: bool = False) -> None:
    if values is None:
        return
    fits = all(isfinite(value) and value > 0 and not (whole and value % 1) for value in values)
    if len(values) != 3 or not fits:
        unit = "numbers of voxels" if whole else "sizes of a voxel, mm,"
        raise ValueError(f"{name}={tuple(values)}; expected are three {unit} above 0, or None.")


def _scan_of(request: Request) -> str:
    """The file of the whole scan that a lesion goes into; empty for all others."""
    return "" if request.background is None else request.background.files.get(SCAN, "")


def _scan_after_scan(requests: Sequence[Request]) -> list[Request]:
    """Requests with those of one whole scan together, in the order in which the scans are met."""
    places: dict[str, int] = {}
    for request in requests:
        places.setdefault(_scan_of(request), len(places))
    return sorted(requests, key=lambda request: places[_scan_of(request)])


def _sides(size: Sequence[int] | None) -> Sides | None:
    return None if size is None else (size[0], size[1], size[2])
