"""The data module of pictures: centre crop, resize, patches, rotations and flips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from fairdiff_lightning.data.augmentation import random_patch
from fairdiff_lightning.data.batch_augmentation import AugmentationArgument, picture_augmentation
from fairdiff_lightning.data.cache import Storage
from fairdiff_lightning.data.captions import Caption, CaptionReader
from fairdiff_lightning.data.dataset import SegmentationDataset
from fairdiff_lightning.data.edges import DetectorArgument
from fairdiff_lightning.data.frames import PictureFrame
from fairdiff_lightning.data.native import NativeDataset, Record
from fairdiff_lightning.data.native_module import NativeDataModule
from fairdiff_lightning.data.requests import RequestReader
from fairdiff_lightning.data.resize import Resize
from fairdiff_lightning.data.sample import Sample


class SegmentationDataModule(NativeDataModule):
    """Splits, mixes, caches and loads a native data set of pictures; subclasses add its constants and defaults.

    Args:
        dataset: reads and writes the files.
        root: folder in the owner's layout; None writes a phantom into the cache folder and uses it.
        attributes: attributes that a sample carries; the first is the one that ``balance`` and the sampler balance.
        image_size: side, or height and width, of a sample, pixels; None keeps the crop as it is.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        crop: side of the centre crop that is taken first, pixels.
        resize: ``area`` (no aliasing, stays in [0, 1]) or ``zoom``, the reference's cubic spline.
        num_points: outline points of the mask that every sample carries, for generators of masks; without augmentation
            and patches, which would move the mask and not them.
        patch_size: side of the random patch, the same place for a whole batch, that training sees, pixels; for networks
            that predict larger images by sliding windows.
        augment: change the training batch at random, on its device.
        augmentation: how, see :func:`~fairdiff_lightning.data.batch_augmentation.picture_augmentation`; by default
            rotations and flips, for samples with edges zooms and rotations.
        edges: detector of edges that every sample carries; of these and the others, see the base class.
        prompt: text that every sample and request carries, in which ``{attribute}`` names its group.
        **kwargs: arguments of :class:`~fairdiff_lightning.data.native_module.NativeDataModule`.
    """

    def __init__(
        self,
        dataset: NativeDataset,
        root: str | None = None,
        attributes: Sequence[str] = (),
        image_size: int | tuple[int, int] | None = 224,
        batch_size: int = 16,
        num_workers: int = 0,
        crop: int | None = None,
        resize: Resize = "area",
        num_points: int | None = None,
        patch_size: int | None = None,
        augment: bool = True,
        augmentation: AugmentationArgument | None = None,
        edges: DetectorArgument | None = None,
        prompt: str | None = None,
        **kwargs: Any,
    ) -> None:
        if num_points is not None and patch_size is not None:
            raise ValueError(f"num_points={num_points} with patch_size={patch_size}: outlines are of whole masks.")
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        change = picture_augmentation(augmentation, edges is not None) if augment else None
        super().__init__(
            dataset,
            PictureFrame(size, crop, resize),
            root,
            attributes,
            batch_size,
            num_workers,
            edges=edges,
            augmentation=None if num_points is not None else change,  # it moves pixels, not points
            **kwargs,
        )
        self.resize, self.num_points, self.patch_size = resize, num_points, patch_size
        self.caption = None if prompt is None else Caption(prompt, self.attribute_specs)

    @property
    def intensity_range(self) -> tuple[float, float]:
        """Smallest and largest value of the image; the reference's cubic spline leaves [0, 1] a little."""
        return (0.0, 1.0) if self.resize == "area" else (-0.5, 1.5)

    def augment(self, batch: Sample, draws: torch.Generator) -> Sample:
        """Cut a patch, then rotate and flip."""
        if self.patch_size is not None:
            rows, columns = random_patch(batch["image"].shape[-2:], self.patch_size, draws)
            shown = {key: batch[key] for key in ("image", "mask", "edge", "partner") if key in batch}
            batch = cast(Sample, {**batch, **{key: value[..., rows, columns] for key, value in shown.items()}})
        return super().augment(batch, draws)

    @property
    def prompts(self) -> list[str]:
        """The distinct texts that samples and requests can carry; none when they carry none."""
        return [] if self.caption is None else self.caption.texts

    @property
    def reading(self) -> dict[str, str]:
        """How files become samples, and the prompt that goes with them."""
        return {**super().reading, "prompt": repr(self.caption)}

    def make_dataset(
        self, records: Sequence[Record], native_mask: bool = False, cache: Storage = "none", training: bool = False
    ) -> SegmentationDataset:
        """Records as samples, with the outlines, edges, texts and partners that are asked for."""
        settings = (list(self.attribute_groups), self.frame, native_mask, cache, self.num_points)
        partners = self.partners if training else None
        return SegmentationDataset(self.dataset, records, *settings, partners=partners, caption=self.caption)

    def request_reader(self) -> RequestReader:
        """Reads masks, edges and texts."""
        read = super().request_reader()
        return read if self.caption is None else CaptionReader(read, self.caption)
