"""What data sets of volumes share: reading pairs on one grid, and writing samples back into the unit of the files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import Index, NativeDataset, Record
from fairdiff_lightning.data.nifti import nifti_grid
from fairdiff_lightning.data.sample import UNKNOWN, AttributeSpec, Sample
from fairdiff_lightning.data.volumes import NIFTI, RAS, Array, Volume, Window, check_same_grid, read_volume


class VolumeDataset(NativeDataset):
    """Reads and writes one data set of volumes in its owner's layout."""

    ndim: ClassVar[int] = 3
    version: ClassVar[int] = 2
    channels: ClassVar[int] = 1
    window: ClassVar[Window]
    """Intensities, in the unit of :meth:`read_volumes`, that are [0, 1] in a sample; its low end is what pads."""

    lesions: ClassVar[tuple[int, ...]] = ()
    """Classes that a generator of lesions makes; the others are anatomy."""
    lesion_attributes: ClassVar[tuple[str, ...]] = ()
    """Attributes of a lesion and not of its patient: whoever makes another lesion changes them."""
    axes: ClassVar[tuple[str, str, str]] = RAS
    """Directions that the axes of its arrays run to, as far as they are known."""
    flip_axes: ClassVar[tuple[int, ...]] = (0,)
    """Axes along which training may mirror a volume."""
    ignore_mask_affine: bool = False
    """Whether a mask is taken to lie voxel for voxel where its image's file does, whatever its own file says."""

    @abstractmethod
    def read_image(self, record: Record) -> Volume:
        """Read the image (H, W, D) float32 alone, of a record that may have no mask.

        Raises:
            InvalidSampleError: naming the file and what is wrong with it.
        """

    @abstractmethod
    def read_labels(self, record: Record) -> Volume:
        """Read the mask (H, W, D) uint8 of class indices alone.

        Raises:
            InvalidSampleError: naming the file and what is wrong with it.
        """

    def read_volumes(self, record: Record) -> tuple[Volume, Volume]:
        """Read image and mask, on one grid."""
        image, mask = self.read_image(record), self.read_labels(record)
        return image, on_grid(image, mask, record.files.get("mask", f"mask of {record.id}"))

    def read_channels(self, record: Record) -> tuple[Volume, ...]:
        """Read every channel of the image, (H, W, D) each."""
        return (self.read_image(record),)

    def read_aligned(self, record: Record) -> tuple[tuple[Volume, ...], Volume]:
        """Read every channel of the image and the mask, on one grid."""
        image, mask = self.read_volumes(record)
        return (image,), mask

    def read_grid(self, record: Record) -> Volume:
        """The grid of the image, in the order of its axes; of a NIfTI file the header alone is read."""
        file = record.files.get("image", "")
        return nifti_grid(file) if file.endswith(NIFTI) else self.read_channels(record)[0]

    def read_mask_file(self, record: Record, axes: Sequence[str] | None = RAS) -> Volume:
        """Read the file of a mask, at the place of its image's file where ``ignore_mask_affine`` says so.

        Args:
            record: of files of whole volumes.
            axes: directions that the axes are turned to run to, by the affine that holds; None turns nothing.

        Raises:
            InvalidSampleError: naming the file and what is wrong with it; for another shape than that of the image
                whose place it takes.
        """
        file = record.files["mask"]
        mask = read_volume(file, None)
        if self.ignore_mask_affine:
            mask = _placed(mask, _file_grid(record.files["image"]), file)
        return mask if axes is None else mask.reoriented(axes)

    def unlabelled(self, root: Path) -> Index:
        """List the images without a mask, which nothing but a prediction can be made of; none where there are none."""
        return Index([])

    def backgrounds(self, root: Path) -> list[Record]:
        """List the healthy images that a lesion can be put into; none where the layout marks none."""
        return []

    def read_scan(self, file: str) -> Volume:
        """Read a whole scan, in the unit of ``window`` and RAS order.

        Raises:
            InvalidSampleError: naming the file and what is wrong with it.
        """
        return read_volume(file)

    @abstractmethod
    def write_volumes(self, directory: Path, sample_id: str, image: Volume, mask: Volume, **notes: Any) -> Path:
        """Store an image, in the unit of :meth:`read_volumes`, and its mask in the native layout, each atomically.

        Args:
            directory: root of the tree.
            sample_id: what the record's id will be.
            image: with its place in the patient.
            mask: class indices on the same grid.
            **notes: ``synthetic``, ``source``, and names of groups by attribute.
        """

    @abstractmethod
    def write_mask(
        self, directory: Path, sample_id: str, mask: NDArray[np.uint8], affine: NDArray[np.float64] | None = None
    ) -> Path:
        """Store a mask (H, W, D) in the native format, at its place in the patient where it is given, atomically."""

    def write_prediction(self, directory: Path, record: Record, mask: NDArray[np.uint8]) -> Path:
        """Store a predicted mask (H, W, D) on the grid of its image, as the image's own file has it."""
        return self.write_mask(directory, record.id, mask, self.read_grid(record).affine)

    def read_arrays(self, record: Record) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Read image (H, W, D), or (C, H, W, D) of several channels, in the unit of ``window``, and mask (H, W, D)."""
        channels, mask = self.read_aligned(record)
        return channels[0].array if len(channels) == 1 else np.stack([c.array for c in channels]), mask.array

    def read_mask(self, record: Record) -> NDArray[np.uint8]:
        """Read the mask (H, W, D) alone."""
        return self.read_labels(record).array

    def read(self, record: Record) -> Sample:
        """Read a record as a sample at its own size, image in [0, 1], with its affine and spacing."""
        channels, mask = self.read_aligned(record)
        return {
            "image": torch.stack([torch.from_numpy(self.window.to_unit(channel.array)) for channel in channels]),
            "mask": torch.from_numpy(mask.array.astype(np.int64))[None],
            "attributes": {name: torch.tensor(group) for name, group in record.attributes.items()},
            "id": record.id,
            "synthetic": torch.tensor(record.synthetic),
            "affine": torch.from_numpy(channels[0].affine),
            "spacing": torch.from_numpy(channels[0].spacing.astype(np.float32)),
        }

    def write(self, directory: Path, sample: Sample) -> Path:
        """Store a sample (image in [0, 1]) in the unit of the files; without ``affine`` at 1 mm from the origin."""
        affine = np.asarray(sample["affine"], np.float64) if "affine" in sample else np.eye(4)
        image = self.window.from_unit(sample["image"][0].detach().cpu().numpy())
        mask = sample["mask"][0].cpu().numpy().astype(np.uint8)
        notes = self._group_names({name: int(group) for name, group in sample["attributes"].items()})
        if bool(sample.get("synthetic", False)):
            notes |= {"synthetic": True}
        if sample.get("source"):
            notes |= {"source": sample["source"]}
        return self.write_volumes(directory, sample["id"], Volume(image, affine), Volume(mask, affine), **notes)

    def _group_names(self, groups: Mapping[str, int]) -> dict[str, Any]:
        return {name: self.attributes[name].groups[g] for name, g in groups.items() if g != UNKNOWN}


def group_index(spec: AttributeSpec, name: object) -> int:
    """Index of a group by its name; -1 for one that the attribute does not have."""
    return spec.groups.index(str(name)) if name in spec.groups else UNKNOWN


def has_mask(record: Record) -> bool:
    """Whether a mask, or slices of one, is among a record's files."""
    return any(role.split("/")[0] == "mask" for role in record.files)


def on_grid(image: Volume, mask: Volume, where: str | Path) -> Volume:
    """The mask with the very affine of its image, from which its own may differ by a rounding of the file.

    Raises:
        InvalidSampleError: for a mask on another grid.
    """
    check_same_grid(image, mask, where)
    return replace(mask, affine=image.affine)


def check_id(name: str, where: str | Path) -> str:
    """Check that an id can be the name of a file.

    Raises:
        InvalidSampleError: for one that leads into another folder, or to a hidden file.
    """
    if not name or name.startswith(".") or any(sign in name for sign in "/\\\0"):
        raise InvalidSampleError(where, f"the id {name!r}", "the name of a file, without a slash or a leading dot")
    return name


def depth_first(volume: Volume) -> Volume:
    """The volume with its last axis first, at the same place in the patient."""
    return _permuted(volume, (2, 0, 1))


def depth_last(volume: Volume) -> Volume:
    """The volume with its first axis last, at the same place in the patient."""
    return _permuted(volume, (1, 2, 0))


def _file_grid(path: str) -> Volume:
    """The grid of an image's file, its axes as they are stored."""
    return nifti_grid(path, None) if path.endswith(NIFTI) else read_volume(path, None)


def _placed(mask: Volume, grid: Volume, where: str) -> Volume:
    if mask.shape != grid.shape:
        raise InvalidSampleError(where, f"mask of {mask.shape} voxels for an image of {grid.shape}", "one shape")
    native = None if mask.native is None else replace(mask.native, axes=grid.axes)
    return replace(mask, affine=grid.affine, native=native)


def _permuted(volume: Volume, order: tuple[int, int, int]) -> Volume:
    array: Array = np.ascontiguousarray(volume.array.transpose(order))
    return Volume(array, volume.affine[:, [*order, 3]])
