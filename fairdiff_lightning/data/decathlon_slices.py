"""Slices of the volumes of a Medical Segmentation Decathlon task read as 2-D samples, and written back."""

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

from fairdiff_lightning.data.cache import Arrays, fingerprint, open_file_cache
from fairdiff_lightning.data.decathlon import CT, Decathlon
from fairdiff_lightning.data.decathlon_task import IMAGES, TASK, Task, list_cases
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import Index, Record, check_classes, visible_files
from fairdiff_lightning.data.nifti import check_finite, read_nifti_channels
from fairdiff_lightning.data.resize import resize_mask
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.data.slice_stack import (
    ARCHIVE,
    ID,
    MASKS,
    SLICES,
    Plane,
    is_archive,
    load_arrays,
    parse_slice_id,
    region_of,
    resize_slice,
    save_arrays,
    scale,
    slice_affine,
    slice_id,
    slice_window,
    spline,
    unscale,
)
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
    :meth:`write_case` turns generated slices into a volume of the owner's layout, :meth:`write_prediction` masks.

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
    mask_folder: ClassVar[str | None] = None  # an archive holds image and mask
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
        found = read_nifti_channels(file)
        if len(found) not in (len(self.file_modalities), self.channels):
            raise InvalidSampleError(file, f"{len(found)} volumes", f"those of {TASK}, {self.file_modalities}")
        picked = [found[k] for k in self.picked] if len(found) == len(self.file_modalities) else found
        return tuple(self._turned(channel.with_array(check_finite(channel.array, file))) for channel in picked)

    def read_labels(self, record: Record) -> Volume:
        """Read the mask (H, W, D) of a slice's whole volume, slices last."""
        return self._turned(super().read_labels(record))

    def read_arrays(self, record: Record) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Read one slice: image (C, H, W) in the unit of the file, or in [0, 1] of a generated one, and mask (H, W)."""
        if is_archive(record):
            found = load_arrays(record.files["image"], "image", "mask")
            mask = check_classes(found["mask"], len(self.classes), record.files["mask"])
            return found["image"].astype(np.float32), mask
        images, masks, _ = self.unpacked(record)
        z = parse_slice_id(record.id)[1]
        return np.array(images[z], np.float32), np.array(masks[z])

    def read_mask(self, record: Record) -> NDArray[np.uint8]:
        """Read the mask (H, W) of one slice alone."""
        if is_archive(record):
            file = record.files["mask"]
            return check_classes(load_arrays(file, "mask")["mask"], len(self.classes), file)
        return np.array(self.unpacked(record)[1][parse_slice_id(record.id)[1]])

    def read_affine(self, record: Record) -> NDArray[np.float64] | None:
        """Affine (4, 4) of a slice, whose third index is 0; None of a generated one without a place."""
        if is_archive(record):
            return load_arrays(record.files["mask"]).get("affine")
        return slice_affine(self.unpacked(record)[2], parse_slice_id(record.id)[1])

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

    def write_case(self, directory: Path, record: Record, name: str, slices: Mapping[int, Record]) -> Path:
        """Store generated slices of a case as a volume with the geometry of its scan, and the scan's own labels.

        Each slice is put where its affine says. Intensities are those of the scan again, by the windows of its slices;
        what lies outside of a slice, and slices that are not given, stay the scan's own. CT is rounded to int16.

        Args:
            directory: folder of a task, which is made or added to.
            record: any slice of the case.
            name: id of the volume.
            slices: z -> a slice that :meth:`write` stored.

        Raises:
            InvalidSampleError: for a slice that lies elsewhere than in the case at its z, or does not say where.
        """
        channels, labels = self.read_aligned(record)
        scan, dtype = channels[0], np.dtype(np.int16 if self.modalities[0] == CT else np.float32)
        values = np.stack([channel.array for channel in channels])  # (C, H, W, D)
        for z, made in slices.items():
            self._paint(values[..., z], slice_affine(scan.affine, z), made)
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

    def unpacked(self, record: Record) -> Arrays:
        """Images (D, C, H, W), masks (D, H, W) and affine (4, 4) of a slice's whole volume, mapped from the cache."""
        settings = (__name__, self.version, self.picked, self.legacy, self.ignore_mask_affine, len(self.classes))
        key = fingerprint(sorted(record.files.values()), *settings)
        return open_file_cache("disk", [key]).get(0, lambda _: self._unpack(record))

    def _paint(self, values: Array, affine: NDArray[np.float64], made: Record) -> None:
        """Put a generated slice into the scan's own (C, H, W), whose affine is given."""
        image, file = self.read_arrays(made)[0], made.files["image"]
        place, size, shape = (
            self.read_affine(made),
            (image.shape[1], image.shape[2]),
            (values.shape[1], values.shape[2]),
        )
        region = None if place is None else region_of(place, size, affine, shape)
        if region is None or len(image) != len(values):
            found = f"image {image.shape} " + (
                "without a place" if place is None else f"with the affine {place.tolist()}"
            )
            expected = (
                f"{len(values)} channels of a crop of '{made.source}', {shape}, whose affine is {affine.tolist()}"
            )
            raise InvalidSampleError(file, found, expected)
        top, left, height, width = region
        inside = values[:, top : top + height, left : left + width]
        scaled = spline(inside, size) if self.legacy else values
        inside[...] = unscale(resize_slice(image, (height, width)), [slice_window(channel) for channel in scaled])

    def _places(self, case: Record) -> Iterator[int]:
        """Which slices of a case are used, z."""
        if ID.fullmatch(case.id):
            raise InvalidSampleError(case.files["image"], f"a case named {case.id!r}", "no name that ends as a slice's")
        depth = self.depth(case)
        if not self.legacy:
            yield from range(depth)
            return
        masks = self.unpacked(case)[1]
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

    def _unpack(self, record: Record) -> Arrays:
        channels, mask = self.read_aligned(record)
        images = np.stack([channel.array for channel in channels]).transpose(3, 0, 1, 2)
        return _compact(images), np.ascontiguousarray(mask.array.transpose(2, 0, 1)), channels[0].affine


def _compact(values: Array) -> Array:
    """The same values as int16 where these are whole numbers that it holds."""
    limits = np.iinfo(np.int16)
    fits = values.min() >= limits.min and values.max() <= limits.max and np.array_equal(values, np.round(values))
    return np.ascontiguousarray(values, np.int16 if fits else np.float32)
