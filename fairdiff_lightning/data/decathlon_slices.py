"""Slices of the volumes of a Medical Segmentation Decathlon task as 2-D samples, evaluated as volumes."""

# nibabel's functions carry no annotations
# mypy: allow-untyped-calls
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import io_orientation
from numpy.typing import NDArray
from torch.utils.data import DataLoader, DistributedSampler

from fairdiff_lightning.data.cache import Arrays, Storage, fingerprint, open_file_cache
from fairdiff_lightning.data.decathlon import CT, Decathlon, _finite, _read_volumes
from fairdiff_lightning.data.decathlon_task import IMAGES, TASK, Task, list_cases
from fairdiff_lightning.data.edge_frame import EdgeFrame
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.folds import fold_records
from fairdiff_lightning.data.native import Index, Record, check_classes, visible_files
from fairdiff_lightning.data.resize import resize_mask
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.data.samplers import EpochSampler
from fairdiff_lightning.data.segmentation import SegmentationDataModule
from fairdiff_lightning.data.slice_stack import (
    ARCHIVE,
    ID,
    MASKS,
    SLICES,
    EdgeSliceFrame,
    Plane,
    SliceFrame,
    by_case,
    is_archive,
    load_arrays,
    parse_slice_id,
    resize_slice,
    save_arrays,
    scale,
    slice_id,
    slice_window,
    stack_slices,
    unscale,
    volume_scores,
)
from fairdiff_lightning.data.splits import Splits
from fairdiff_lightning.data.volume_dataset import group_index
from fairdiff_lightning.data.volumes import Array, Volume, Window, check_affine, write_nifti

SliceProtocol = Literal["strict", "legacy"]
UPRIGHT = ("P", "L", "S")
"""Rows run to the back and columns to the left, as radiologists see a slice; z counts from the feet."""
SMALLEST = 20
"""Sum of the labels that a slice must exceed in the authors' protocol."""


class DecathlonSlices(Decathlon):
    """Every slice of every volume of a task as a picture, named ``<case>_z<number>``; a case is never cut.

    Intensities are scaled slice by slice, see :func:`~fairdiff_lightning.data.slice_stack.slice_window`. Volumes are
    unpacked once into the cache folder, 2 bytes a voxel where all values are whole numbers, so that slices can be read
    in any order.

    The owner's layout has volumes only. :meth:`write` therefore stores a slice as ``slices/<id>.npz``, with ``image``
    float32 (C, H, W) in [0, 1], ``mask`` uint8 (H, W), ``affine`` (4, 4) where it is known and ``notes`` (JSON:
    synthetic, source, groups), beside or without the volumes; predicted masks alone go to ``masks/<id>.npz``.
    :meth:`write_case` and :meth:`write_prediction` turn slices into volumes of the owner's layout.

    ==============  ==============================================  ================================================
    ``protocol``    ``strict``                                      ``legacy``, as DiffBoost's code
    ==============  ==============================================  ================================================
    slices          all, axial and upright                          along the file's last axis, as it is stored,
                                                                    with a label sum above 20
    percentiles     of the file's own slice                         of the resized slice
    ==============  ==============================================  ================================================

    Args:
        root: folder of the task; None is the phantom.
        channel: number of the one modality to read; None reads all of them as channels.
        columns: columns of ``attributes.csv`` that are attributes -> names of their groups.
        ignore_mask_affine: take the image's affine for its mask too.
        protocol: see the table.
        image_size: at which ``legacy`` sums the labels, pixels.
    """

    ndim: ClassVar[int] = 2
    unit: ClassVar[str] = "case"

    def __init__(
        self,
        root: str | Path | None = None,
        channel: int | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
        ignore_mask_affine: bool = False,
        protocol: SliceProtocol = "strict",
        image_size: Plane | None = None,
    ) -> None:
        if protocol not in ("strict", "legacy"):
            raise ValueError(f"protocol={protocol!r}; expected is 'strict' or 'legacy'.")
        super().__init__(root, channel, None, columns, ignore_mask_affine)
        self.legacy, self.image_size = protocol == "legacy", image_size

    @property
    def prompt(self) -> str:
        """Organ and modality, ``Spleen, CT`` or ``Prostate, MRI``."""
        return f"{self.task_name.capitalize()}, {CT if self.modalities[0] == CT else 'MRI'}"

    def index(self, root: Path) -> Index:
        """List the slices of the training cases, from the headers alone, and the generated slices.

        ``legacy`` reads the labels too.

        Raises:
            DatasetNotFoundError: for a root with neither.
            InvalidSampleError: see :meth:`Decathlon.index`.
            ValueError: when ``legacy`` leaves no slice.
        """
        archives = visible_files(root, f"{SLICES}/*{ARCHIVE}")
        index = super().index(root) if (root / TASK).is_file() or not archives else Index([])
        records = []
        for case in index.records:
            try:
                records += [replace(case, id=slice_id(case.id, z)) for z in self._places(case)]
            except InvalidSampleError as error:
                index.errors.append(error)
        if index.records and not records and not index.errors:
            raise ValueError(
                f"no slice of '{root}' has labels that sum to more than {SMALLEST} at image_size={self.image_size}, as "
                "protocol='legacy' wants. Take a larger size, or protocol='strict'."
            )
        for archive in archives:
            try:
                records.append(self._archived(archive))
            except InvalidSampleError as error:
                index.errors.append(error)
        return Index(records, index.left_out, index.errors)

    def case_key(self, record_id: str) -> str:
        """The case of a slice."""
        found = ID.fullmatch(record_id)
        return found["case"] if found else record_id

    def read_channels(self, record: Record) -> tuple[Volume, ...]:
        """Read every channel (H, W, D) of a slice's whole volume in the unit of the file, float32, slices last."""
        file = record.files["image"]
        found = _read_volumes(file)
        if len(found) not in (len(self.file_modalities), self.channels):
            raise InvalidSampleError(file, f"{len(found)} volumes", f"those of {TASK}, {self.file_modalities}")
        picked = [found[k] for k in self.picked] if len(found) == len(self.file_modalities) else found
        return tuple(self._turned(channel.with_array(_finite(channel.array, file))) for channel in picked)

    def read_labels(self, record: Record) -> Volume:
        """Read the mask (H, W, D) of a slice's whole volume, slices last."""
        return self._turned(super().read_labels(record))

    def read_arrays(self, record: Record) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Read one slice: image (C, H, W) in the unit of the file, or in [0, 1] of a generated one, and mask (H, W)."""
        if is_archive(record):
            found = load_arrays(record.files["image"], "image", "mask")
            mask = check_classes(found["mask"], len(self.classes), record.files["mask"])
            return found["image"].astype(np.float32), mask
        images, masks, _ = self._unpacked(record)
        z = parse_slice_id(record.id)[1]
        return np.array(images[z], np.float32), np.array(masks[z])

    def read_mask(self, record: Record) -> NDArray[np.uint8]:
        """Read the mask (H, W) of one slice alone."""
        if is_archive(record):
            file = record.files["mask"]
            return check_classes(load_arrays(file, "mask")["mask"], len(self.classes), file)
        return np.array(self._unpacked(record)[1][parse_slice_id(record.id)[1]])

    def read_affine(self, record: Record) -> NDArray[np.float64] | None:
        """Affine (4, 4) of a slice, whose third index is 0; None of a generated one without a place."""
        if is_archive(record):
            return load_arrays(record.files["mask"]).get("affine")
        affine = np.array(self._unpacked(record)[2])
        affine[:3, 3] += affine[:3, 2] * parse_slice_id(record.id)[1]
        return affine

    def depth(self, record: Record) -> int:
        """Number of slices of a slice's whole volume, from the header."""
        image: Any = nib.load(record.files["image"])
        axes = io_orientation(check_affine(image.affine, record.files["image"]))[:, 0]
        return int(image.shape[2 if self.legacy else int(np.flatnonzero(axes == 2)[0])])

    def windows(self, record: Record, image: Array) -> list[Window]:
        """Intensities that are [0, 1], of each channel of a slice (C, H, W)."""
        return [Window(0, 1) if is_archive(record) else slice_window(channel) for channel in image]

    def read(self, record: Record) -> Sample:
        """Read a slice as a sample at its own size, image in [0, 1]."""
        image, mask = self.read_arrays(record)
        sample: Sample = {
            "image": torch.from_numpy(scale(image, self.windows(record, image))),
            "mask": torch.from_numpy(mask.astype(np.int64))[None],
            "attributes": {name: torch.tensor(group) for name, group in record.attributes.items()},
            "id": record.id,
            "synthetic": torch.tensor(record.synthetic),
            "prompt": self.prompt,
        }
        affine = self.read_affine(record)
        return sample if affine is None else {**sample, "affine": torch.from_numpy(affine)}

    def write(self, directory: Path, sample: Sample) -> Path:
        """Store a slice (image in [0, 1]) as ``slices/<id>.npz``.

        Raises:
            ValueError: for another number of channels than the task's.
        """
        image = sample["image"].detach().cpu().float().clamp(0, 1).numpy()
        if image.ndim != 3 or len(image) != self.channels:
            raise ValueError(f"{sample['id']}: image {image.shape}; expected ({self.channels}, H, W), a slice.")
        notes = self._group_names({name: int(group) for name, group in sample["attributes"].items()})
        notes |= {"synthetic": bool(sample.get("synthetic", False)), "source": sample.get("source") or None}
        arrays = {"image": image, "mask": sample["mask"][0].cpu().numpy().astype(np.uint8)}
        if "affine" in sample:
            arrays["affine"] = np.asarray(sample["affine"], np.float64)
        return save_arrays(
            directory / SLICES / f"{sample['id']}{ARCHIVE}", {**arrays, "notes": np.array(json.dumps(notes))}
        )

    def write_mask(
        self, directory: Path, sample_id: str, mask: NDArray[np.uint8], affine: NDArray[np.float64] | None = None
    ) -> Path:
        """Store the mask (H, W) of a slice as ``masks/<id>.npz``; :func:`read_predictions` reads all of them."""
        placed = {} if affine is None else {"affine": affine}
        return save_arrays(directory / MASKS / f"{sample_id}{ARCHIVE}", {"mask": mask.astype(np.uint8), **placed})

    def write_case(self, directory: Path, record: Record, name: str, images: Mapping[int, Array]) -> Path:
        """Store generated slices of a case as a volume with the geometry of its scan, and the scan's own labels.

        Intensities are those of the scan again, by the windows of its slices; slices that are not given stay the
        scan's own. CT is rounded to int16.

        Args:
            directory: folder of a task, which is made or added to.
            record: any slice of the case.
            name: id of the volume.
            images: z -> image (C, H, W) in [0, 1], resized to the scan's own grid where it has another.
        """
        channels, labels = self.read_aligned(record)
        values = np.stack([channel.array for channel in channels])  # (C, H, W, D)
        for z, image in images.items():
            windows = self.windows(record, values[..., z])
            values[..., z] = unscale(resize_slice(image, (values.shape[1], values.shape[2])), windows)
        scan, dtype = channels[0], np.dtype(np.int16 if self.modalities[0] == CT else np.float32)
        native = replace(scan.native, dtype=dtype, slope=1.0, intercept=0.0) if scan.native else None
        stored = values[0] if self.channels == 1 else np.moveaxis(values, 0, -1)
        notes = {"id": name, "modalities": self.modalities, "synthetic": True, "source": record.unit}
        self.write_prediction(directory, replace(record, id=name, unit=name), labels.array)
        path = write_nifti(directory / IMAGES / f"{name}.nii.gz", Volume(stored, scan.affine, native), notes)
        list_cases(directory, Task(self.task_name, self.modalities, self.classes))
        return path

    def write_prediction(self, directory: Path, record: Record, mask: NDArray[np.uint8]) -> Path:
        """Store a predicted mask (H, W, D) of a slice's case as ``labelsTr/<case>.nii.gz``, as the image's file."""
        return super().write_prediction(directory, replace(record, id=record.unit), mask)

    def _places(self, case: Record) -> Iterator[int]:
        """Which slices of a case are used, z."""
        if ID.fullmatch(case.id):
            raise InvalidSampleError(case.files["image"], f"a case named {case.id!r}", "no name that ends as a slice's")
        depth = self.depth(case)
        if not self.legacy:
            yield from range(depth)
            return
        masks = self._unpacked(case)[1]
        yield from (z for z in range(depth) if resize_mask(masks[z], self.image_size, "area").sum() > SMALLEST)

    def _archived(self, path: Path) -> Record:
        written = str(load_arrays(path, "notes")["notes"])
        try:
            notes = json.loads(written)
            groups = {key: group_index(spec, notes.get(key)) for key, spec in self.attributes.items()}
        except (ValueError, AttributeError) as error:
            raise InvalidSampleError(f"{path}[notes]", f"unreadable ({error})", "JSON that `write` stored") from error
        files = {"image": str(path), "mask": str(path)}
        synthetic, source = bool(notes.get("synthetic")), notes.get("source")
        return Record(path.stem, files, groups, self.case_key(path.stem), None, synthetic, source)

    def _turned(self, volume: Volume) -> Volume:
        """The volume with its slices along the last axis, never resampled."""
        if not self.legacy or volume.native is None:
            return volume.reoriented(UPRIGHT)
        columns, rows, slices = volume.native.axes
        return volume.reoriented((rows, columns, slices))

    def _unpacked(self, record: Record) -> Arrays:
        """Images (D, C, H, W), masks (D, H, W) and affine (4, 4) of a volume, mapped from the cache folder."""
        settings = (__name__, self.version, self.picked, self.legacy, self.ignore_mask_affine, len(self.classes))
        key = fingerprint(sorted(record.files.values()), *settings)
        return open_file_cache("disk", [key]).get(0, lambda _: self._unpack(record))

    def _unpack(self, record: Record) -> Arrays:
        channels, mask = self.read_aligned(record)
        images = np.stack([channel.array for channel in channels]).transpose(3, 0, 1, 2)
        return _compact(images), np.ascontiguousarray(mask.array.transpose(2, 0, 1)), channels[0].affine


class DecathlonSliceDataModule(SegmentationDataModule):
    """Slices of a task of the Decathlon, in folds by case; predictions are scored and written as volumes.

    ``predict`` stores the mask of each slice; ``volume_scores(read_predictions(folder))`` and
    ``write_volumes(out, read_predictions(folder))`` put them together, see
    :func:`~fairdiff_lightning.data.slice_stack.read_predictions`.

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
        evaluate_at: grid of the scores of val and test; None takes the protocol's.
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
        frame = SliceFrame(None if size is None else (size[0], size[1]), kwargs.get("crop"), legacy=dataset.legacy)
        self.frame = EdgeSliceFrame(frame, self.frame.edges) if isinstance(self.frame, EdgeFrame) else frame

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled, or balanced by the first attribute; in order by ``legacy``."""
        if not self.dataset.legacy or self.sampler != "shuffle":
            return super().train_dataloader()
        data = self._data("train")
        sampler: DistributedSampler[Any] = DistributedSampler(data, *self._ranks(), shuffle=False)
        return self._loader(data, EpochSampler(sampler), self.batch_size)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Of the validation cases; ``legacy`` validates on the test fold."""
        return self.test_dataloader() if self.dataset.legacy else super().val_dataloader()

    def join(self, predictions: Mapping[str, Array | torch.Tensor]) -> Iterator[tuple[Record, dict[int, Array], Array]]:
        """Predicted masks of test slices as volumes: a record of each case, its slices by z, and (H, W, D).

        Args:
            predictions: id -> class indices (H, W) or (1, H, W) on the file's own grid, as ``predict`` gives them.

        Raises:
            ValueError: for a slice that is not of the test set; by ``strict``, for one that is missing.
        """
        records = {record.unit: record for record in self.splits["test"]}
        slices = {name: np.asarray(mask, np.uint8).reshape(mask.shape[-2:]) for name, mask in predictions.items()}
        for case, found in by_case(slices).items():
            if case not in records:
                raise ValueError(f"'{case}' is no case of the test set; expected is one of {', '.join(records)}.")
            depth = self.dataset.depth(records[case])
            yield records[case], found, stack_slices(found, depth, "stretch" if self.dataset.legacy else "error")

    def volume_scores(self, predictions: Mapping[str, Array | torch.Tensor]) -> dict[str, dict[str, float]]:
        """Case -> :func:`~fairdiff_lightning.data.slice_stack.volume_scores` of it; arguments as :meth:`join`.

        The truth is the file's; by ``legacy`` it goes through the sample's size and the stretching too.
        """
        scores = {}
        for record, found, prediction in self.join(predictions):
            truth = self.dataset.read_labels(record)
            if self.dataset.legacy:
                seen = {z: self._resampled(truth.array[..., z]) for z in found}
                truth = truth.with_array(stack_slices(seen, truth.shape[2], "stretch"))
            scores[record.unit] = volume_scores(prediction, truth, self.classes)
        return scores

    def write_volumes(self, directory: Path, predictions: Mapping[str, Array | torch.Tensor]) -> list[Path]:
        """Store predicted masks as volumes, ``labelsTr/<case>.nii.gz``; arguments as :meth:`join`."""
        found = self.join(predictions)
        return [self.dataset.write_prediction(Path(directory), record, mask) for record, _, mask in found]

    def _split(self, real: Sequence[Record]) -> Splits:
        if not self.dataset.legacy or self.fold is None:
            return super()._split(real)
        return fold_records(real, self.fold, self.num_folds, val=0, seed=None)

    def _resampled(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A mask that went to the sample's size and back."""
        return resize_mask(resize_mask(mask, self.dataset.image_size, "area"), (mask.shape[0], mask.shape[1]), "area")


def _compact(values: Array) -> Array:
    """The same values as int16 where these are whole numbers that it holds."""
    limits = np.iinfo(np.int16)
    fits = values.min() >= limits.min and values.max() <= limits.max and np.array_equal(values, np.round(values))
    return np.ascontiguousarray(values, np.int16 if fits else np.float32)
