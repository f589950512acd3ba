"""The data module of slices of a Decathlon task: folds by case, and predictions put together to volumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import DataLoader, DistributedSampler

from fairdiff_lightning.data.cache import Storage
from fairdiff_lightning.data.decathlon_slices import DecathlonSlices, SliceProtocol
from fairdiff_lightning.data.edge_frame import EdgeFrame
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.folds import fold_records
from fairdiff_lightning.data.native import Record
from fairdiff_lightning.data.provenance import read_training_cases, write_training_cases
from fairdiff_lightning.data.resize import centre_region, crop_to, resize_mask
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.data.samplers import EpochSampler
from fairdiff_lightning.data.segmentation import SegmentationDataModule
from fairdiff_lightning.data.slice_stack import (
    EdgeSliceFrame,
    Plane,
    SliceFrame,
    by_case,
    is_archive,
    parse_slice_id,
    read_predictions,
    scale,
    slice_window,
    stack_slices,
)
from fairdiff_lightning.data.splits import Splits
from fairdiff_lightning.data.volumes import Array


class DecathlonSliceDataModule(SegmentationDataModule):
    """Slices of a task of the Decathlon, in folds by case; predictions are scored and written as volumes.

    :class:`~fairdiff_lightning.callbacks.FairnessReport` scores what :meth:`join` puts together, and
    :class:`~fairdiff_lightning.callbacks.PredictionWriter` stores the mask of each slice and then, by
    :meth:`write_joined`, those of whole cases. :meth:`write_generated` does so with generated slices.

    Args:
        root: folder of the task; None writes and uses a phantom.
        attributes: attributes to report and to route by, of ``columns``; the first is the one that is balanced.
        image_size: side, or height and width, of a sample, pixels; None keeps the slices' own.
        batch_size: slices in a batch, on each device.
        num_workers: loader processes.
        protocol: ``strict``: every slice, shuffled, folds of shuffled cases, validation cut from the training cases,
            scores on the files' own grid, slices at their true z. ``legacy``, as DiffBoost's code: slices with a label
            only, in order, folds in the order of ``dataset.json``, validated on the test fold, scores of resampled
            labels, slices stretched over the depth.
        fold: which part of the cases is the test set, from 0; None splits by ``fractions``.
        num_folds: number of parts.
        channel: number of the one modality to read; None reads all of them as channels.
        columns: columns of ``attributes.csv`` that are attributes -> names of their groups.
        ignore_mask_affine: take the image's affine for its mask too.
        prompt: text of every sample; None is organ and modality, ``Prostate, MRI``.
        augment: change the training batch at random; DiffBoost's baseline does not.
        cache: where resized slices are kept, beside the unpacked volumes.
        evaluate_at: grid of the slices' scores of val and test; None takes the protocol's. Volumes are always scored on
            the files' own.
        **kwargs: arguments of :class:`~fairdiff_lightning.data.segmentation.SegmentationDataModule`, but ``resize``.
    """

    dataset: DecathlonSlices

    def __init__(
        self,
        root: str | None = None,
        attributes: Sequence[str] = (),
        image_size: int | tuple[int, int] | None = 384,
        batch_size: int = 8,
        num_workers: int = 0,
        protocol: SliceProtocol = "strict",
        fold: int | None = 0,
        num_folds: int = 3,
        channel: int | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
        ignore_mask_affine: bool = False,
        prompt: str | None = None,
        augment: bool = False,
        cache: Storage = "none",
        evaluate_at: Literal["input", "native"] | None = None,
        **kwargs: Any,
    ) -> None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        dataset = DecathlonSlices(root, channel, columns, ignore_mask_affine, protocol, size)
        super().__init__(
            dataset,
            root,
            attributes,
            size,
            batch_size,
            num_workers,
            fold=fold,
            num_folds=num_folds,
            prompt=dataset.prompt if prompt is None else prompt,
            augment=augment,
            cache=cache,
            evaluate_at=evaluate_at or ("input" if dataset.legacy else "native"),
            resize="area",
            **kwargs,
        )
        self.crop: int | None = kwargs.get("crop")
        frame = SliceFrame(None if size is None else (size[0], size[1]), self.crop, legacy=dataset.legacy)
        self.frame = EdgeSliceFrame(frame, self.frame.edges) if isinstance(self.frame, EdgeFrame) else frame

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled, or balanced by the first attribute; in order by ``legacy``."""
        if not self.dataset.legacy or self.sampler != "shuffle":
            return super().train_dataloader()
        data = self._training_data()
        sampler: DistributedSampler[Any] = DistributedSampler(data, *self._ranks(), shuffle=False)
        return self._loader(data, EpochSampler(sampler), self.batch_size)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Of the validation cases, by ``legacy`` of the test fold; padded so that every rank makes as many steps."""
        if not self.dataset.legacy:
            return super().val_dataloader()
        data = self._data("test")
        return self._loader(data, DistributedSampler(data, *self._ranks(), shuffle=False))

    def join(self, predictions: Mapping[str, Array]) -> Iterator[tuple[Sample, torch.Tensor]]:
        """Predicted masks of test slices as volumes: a sample of each whole case, and its prediction (1, H, W, D).

        The truth is the file's; by ``legacy`` it goes through the sample's size, and both are stretched. Cases that
        lack slices are left out and named in a warning.

        Args:
            predictions: id -> class indices (H, W) or (1, H, W), on the grid that ``evaluate_at`` says.

        Raises:
            ValueError: for a slice that is not of the test set.
        """
        for record, names in self._complete(predictions):
            images, masks, affine = self.dataset.unpacked(record)
            shape = (masks.shape[1], masks.shape[2])
            truth = {z: self._resampled(masks[z]) if self.dataset.legacy else masks[z] for z in names}
            found = {z: self._on_file_grid(predictions[name], shape) for z, name in names.items()}
            scaled = [scale(image, [slice_window(channel) for channel in image]) for image in images]
            spacing = np.linalg.norm(affine[:3, :3], axis=0).astype(np.float32)
            sample: Sample = {
                "image": torch.from_numpy(np.stack(scaled, -1)),
                "mask": self._stacked(truth, len(masks)),
                "attributes": {name: torch.tensor(group) for name, group in record.attributes.items()},
                "id": record.unit,
                "affine": torch.from_numpy(np.array(affine)),
                "spacing": torch.from_numpy(spacing),
            }
            yield sample, self._stacked(found, len(masks))

    def write_joined(self, directory: Path, names: Iterable[str]) -> dict[str, Path]:
        """Store masks of slices, which :meth:`write_mask` stored below the folder, as ``labelsTr/<case>.nii.gz`` too.

        Args:
            directory: folder of the slices and of the volumes.
            names: ids of the slices; cases that lack some are left out and named in a warning.

        Returns:
            Case -> file.
        """
        written = {}
        for record, slices in self._complete(names):
            masks = read_predictions(directory, slices.values())
            stacked = self._stacked({z: masks[name] for z, name in slices.items()}, self.dataset.depth(record))
            written[record.unit] = self.dataset.write_prediction(directory, record, stacked[0].numpy().astype(np.uint8))
        return written

    def write_generated(self, folder: Path, output: Path) -> list[Path]:
        """Store generated slices as volumes of a task below ``output``, ``<case>_synthetic_<k>``, k from 0.

        The k-th slice that was made from each slice of a scan goes into its k-th volume, at its z, see
        :meth:`DecathlonSlices.write_case`; where there is none, the volume shows the scan.

        Args:
            folder: where a generator's slices lie, ``slices/*.npz``.
            output: folder to make or to add to.

        Raises:
            InvalidSampleError: for a slice that cannot be read, or whose source is none of this data set.
        """
        index = self.dataset.index(Path(folder))
        if index.errors:
            raise index.errors[0]
        cases = {r.unit: r for part in self.splits.values() for r in part if not is_archive(r)}
        copies: dict[tuple[str, int], dict[int, Record]] = {}
        seen = Counter[str]()
        for made in filter(is_archive, index.records):
            source = made.source or ""
            case = self.dataset.case_key(source)
            if case not in cases or case == source:
                raise InvalidSampleError(made.files["image"], f"the source {source!r}", f"a slice of '{self.folder}'")
            copies.setdefault((case, seen[source]), {})[parse_slice_id(source)[1]] = made
            seen[source] += 1
        known = read_training_cases(Path(folder)) | read_training_cases(Path(output))
        if known:
            write_training_cases(Path(output), known)
        return [
            self.dataset.write_case(Path(output), cases[case], f"{case}_synthetic_{k:03d}", slices)
            for (case, k), slices in sorted(copies.items())
        ]

    def _split(self, real: Sequence[Record]) -> Splits:
        if not self.dataset.legacy or self.fold is None:
            return super()._split(real)
        return fold_records(real, self.fold, self.num_folds, val=0, seed=None)

    def _complete(self, names: Iterable[str]) -> Iterator[tuple[Record, dict[int, str]]]:
        """Test cases of which all slices of the test set are given: a record, and z -> name."""
        records = {record.unit: record for record in self.splits["test"]}
        wanted = by_case(record.id for record in self.splits["test"])
        partial = []
        for case, slices in by_case(names).items():
            if case not in wanted:
                raise ValueError(f"'{case}' is no case of the test set; expected is one of {', '.join(wanted)}.")
            if slices.keys() == wanted[case].keys():
                yield records[case], slices
            else:
                partial.append(f"{case} ({len(slices)} of {len(wanted[case])})")
        if partial:
            rank_zero_warn(f"volumes that lack slices are left out: {', '.join(partial)}.")

    def _stacked(self, masks: Mapping[int, Array], depth: int) -> torch.Tensor:
        """Masks (1, H, W, D) of class indices."""
        return torch.from_numpy(stack_slices(masks, depth, stretch=self.dataset.legacy).astype(np.int64))[None]

    def _on_file_grid(self, mask: Array, shape: Plane) -> NDArray[np.uint8]:
        """A predicted mask as (H, W) of the file's own grid."""
        found = np.asarray(mask, np.uint8).reshape(mask.shape[-2:])
        return found if self.evaluate_at == "native" else self._restored(found, shape)

    def _restored(self, mask: NDArray[np.uint8], shape: Plane) -> NDArray[np.uint8]:
        """The mask of a sample on the file's own grid (H, W), background outside of the crop."""
        top, left, height, width = centre_region(shape, self.crop)
        whole = np.zeros(shape, np.uint8)
        whole[top : top + height, left : left + width] = resize_mask(mask, (height, width), "area")
        return whole

    def _resampled(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A mask that went to the sample's size and back."""
        shape = (mask.shape[0], mask.shape[1])
        shown = crop_to(mask, centre_region(shape, self.crop))
        return self._restored(resize_mask(shown, self.dataset.image_size, "area"), shape)
