"""Frames: how the image of a file becomes a sample, and what tells the way back to the file's own grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairdiff_lightning.data.cache import Arrays, Layout
from fairdiff_lightning.data.native import NativeDataset, Record, check_classes
from fairdiff_lightning.data.resample import to_spacing
from fairdiff_lightning.data.resize import Resize, centre_region, crop_to, resize_image, resize_mask
from fairdiff_lightning.data.volume_dataset import VolumeDataset, has_mask
from fairdiff_lightning.data.volumes import Size, Volume, block_of, crop_or_pad

Tensors = dict[str, Tensor]


class Frame(Protocol):
    """What part of a file a sample shows, and on which grid; frames that are equal have the same ``repr``."""

    @property
    def size(self) -> tuple[int, ...] | None:
        """Sides of every sample; None where each has its own."""

    def decode(self, dataset: NativeDataset, record: Record) -> Arrays:
        """Arrays of a sample, the image first and the mask second.

        Raises:
            InvalidSampleError: naming the file and what is wrong with it.
        """

    def layout(self, channels: int) -> Layout | None:
        """Shapes and types of the arrays, for a cache; None where samples differ in size."""

    def tensors(self, arrays: Arrays) -> Tensors:
        """What the arrays are in a sample."""

    def native(self, dataset: NativeDataset, record: Record, arrays: Arrays) -> Tensors:
        """The mask at the file's own size, and where in the file the sample lies."""

    def condition(self, dataset: NativeDataset, record: Record) -> Tensors:
        """The mask alone, for generators that follow it."""


@dataclass(frozen=True)
class PictureFrame:
    """A centre crop of a picture, resized.

    Args:
        size: height and width of a sample, pixels; None keeps the crop as it is.
        crop: side of the centre crop that is taken first, pixels.
        resize: how, see :func:`~fairdiff_lightning.data.resize.resize_image`.
    """

    size: tuple[int, int] | None = None
    crop: int | None = None
    resize: Resize = "area"

    def decode(self, dataset: NativeDataset, record: Record) -> Arrays:
        """Image (C, H, W) and mask (H, W)."""
        image, mask = dataset.read_arrays(record)
        check_classes(mask, len(dataset.classes), str(record.files))
        cropped = crop_to(image, centre_region(mask.shape, self.crop))
        return resize_image(cropped, self.size, self.resize), self._framed(mask)

    def layout(self, channels: int) -> Layout | None:
        """Bytes, or the reference's spline in float32."""
        if self.size is None:
            return None
        dtype = np.dtype(np.uint8 if self.resize == "area" else np.float32)
        return {"images": ((channels, *self.size), dtype), "masks": (self.size, np.uint8)}

    def tensors(self, arrays: Arrays) -> Tensors:
        """``image`` in [0, 1] and ``mask``."""
        image = torch.from_numpy(np.array(arrays[0]))
        return {"image": image.float().div_(255) if image.dtype == torch.uint8 else image, "mask": _indices(arrays[1])}

    def native(self, dataset: NativeDataset, record: Record, arrays: Arrays) -> Tensors:
        """``native_mask``, and ``region`` and ``native_size`` in pixels."""
        mask = dataset.read_mask(record)
        region = torch.tensor(centre_region(mask.shape, self.crop))
        return {"native_mask": _indices(mask), "region": region, "native_size": torch.tensor(mask.shape)}

    def condition(self, dataset: NativeDataset, record: Record) -> Tensors:
        """``mask``, cropped and resized as training sees it."""
        mask = dataset.read_mask(record)
        check_classes(mask, len(dataset.classes), str(record.files))
        return {"mask": _indices(self._framed(mask))}

    def _framed(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return resize_mask(crop_to(mask, centre_region(mask.shape, self.crop)), self.size, self.resize)


@dataclass(frozen=True)
class VolumeFrame:
    """A block of a volume, resampled, windowed to [0, 1], and cropped or padded with 0 about its centre.

    Args:
        size: height, width and depth of a sample, voxels; None keeps each volume's own.
        spacing: of the voxels that it is resampled to, mm; None resamples nothing.
        foreground: crop to the box in which the image is above the window's low end first.
        at_least: sides that a smaller volume is padded to where ``size`` is None, voxels.
        keep_native: keep the mask at the file's own size among the arrays too, so that a cache holds it.
    """

    size: Size | None = None
    spacing: tuple[float, float, float] | None = None
    foreground: bool = False
    at_least: Size | None = None
    keep_native: bool = False

    def decode(self, dataset: NativeDataset, record: Record) -> Arrays:
        """Image (C, H, W, D) float32 in [0, 1], mask (H, W, D), affine (4, 4), and affine (4, 4) and size of the file.

        A record without a mask has an empty one.
        """
        volumes = cast(VolumeDataset, dataset)
        channels, mask = volumes.read_aligned(record) if has_mask(record) else (volumes.read_channels(record), None)
        images = [self._windowed(channel, volumes) for channel in channels]
        box = _box(np.any([image.array > 0 for image in images], axis=0)) if self.foreground else None

        def framed(volume: Volume) -> Volume:
            part = volume if box is None else block_of(volume, *box, 0)
            return crop_or_pad(part, self._size(part.shape), 0)

        native: list[NDArray[Any]] = [channels[0].affine, np.array(channels[0].shape)]
        labels: NDArray[Any] = np.zeros((0, 0, 0), np.uint8)
        if mask is not None:
            check_classes(mask.array, len(dataset.classes), str(record.files))
            labels = framed(self._resampled(mask)).array
            native += [mask.array] if self.keep_native else []
        shown = [framed(image) for image in images]
        return np.stack([image.array for image in shown]), labels, shown[0].affine, *native

    def layout(self, channels: int) -> Layout | None:
        """Float32 for the image: CT has more levels than a byte."""
        if self.size is None or self.keep_native:
            return None
        affine = ((4, 4), np.float64)
        return {
            "images": ((channels, *self.size), np.float32),
            "masks": (self.size, np.uint8),
            "affines": affine,
            "native_affines": affine,
            "native_sizes": ((3,), np.int64),
        }

    def tensors(self, arrays: Arrays) -> Tensors:
        """``image``, ``mask`` where there is one, ``affine`` and ``spacing``."""
        image, mask, affine = (np.array(array) for array in arrays[:3])
        found = {"image": torch.from_numpy(image), **_place(affine)}
        return {**found, "mask": _indices(mask)} if mask.size else found

    def native(self, dataset: NativeDataset, record: Record, arrays: Arrays) -> Tensors:
        """``native_mask`` where there is one, and ``native_affine`` and ``native_size`` of the file's grid."""
        affine, size = (torch.from_numpy(np.array(array)) for array in arrays[3:5])
        place = {"native_affine": affine, "native_size": size}
        if not has_mask(record):
            return place
        mask = np.array(arrays[5]) if self.keep_native else dataset.read_mask(record)
        return {**place, "native_mask": _indices(mask)}

    def cut(self, arrays: Arrays, block: tuple[slice, ...]) -> Arrays:
        """A block of the arrays, in its place in the patient."""
        image, mask, affine, *native = arrays
        moved = np.array(affine)
        moved[:3, 3] += moved[:3, :3] @ [side.start for side in block]
        return image[(slice(None), *block)], mask[block], moved, *native

    def condition(self, dataset: NativeDataset, record: Record) -> Tensors:
        """``mask``, ``affine`` and ``spacing``."""
        if self.foreground:
            raise ValueError("masks alone have no foreground to crop to; generate without `crop_foreground`.")
        mask = cast(VolumeDataset, dataset).read_labels(record)
        check_classes(mask.array, len(dataset.classes), str(record.files))
        mask = self._resampled(mask)
        mask = crop_or_pad(mask, self._size(mask.shape), 0)
        return {"mask": _indices(mask.array), **_place(mask.affine)}

    def sides(self, grid: Volume) -> Size:
        """Sides of the sample of a volume on a grid, where nothing is cropped to the foreground."""
        return self._size(grid.shape if self.spacing is None else _shape_at(grid, self.spacing))

    def background(self, dataset: VolumeDataset, record: Record) -> Volume:
        """The image alone (H, W, D) in [0, 1], of a record that may have no mask, at its place in the patient."""
        image = self._windowed(dataset.read_image(record), dataset)
        return crop_or_pad(image, self._size(image.shape), 0)

    def _resampled(self, mask: Volume) -> Volume:
        return mask if self.spacing is None else to_spacing(mask, self.spacing, "nearest")

    def _windowed(self, image: Volume, dataset: VolumeDataset) -> Volume:
        if self.spacing is not None:
            image = to_spacing(image, self.spacing, "bilinear")
        return image.with_array(dataset.window.to_unit(image.array))

    def _size(self, shape: Size) -> Size:
        if self.size is not None:
            return self.size
        height, width, depth = (max(pair) for pair in zip(shape, self.at_least or shape, strict=True))
        return height, width, depth


def volume_tensors(image: Volume, mask: Volume | None = None) -> Tensors:
    """A block (H, W, D) in [0, 1], its place, and its mask, as parts of a sample."""
    found = {"image": torch.from_numpy(image.array)[None], **_place(image.affine)}
    return found if mask is None else {**found, "mask": _indices(mask.array)}


def _indices(mask: NDArray[Any]) -> Tensor:
    return torch.from_numpy(mask.astype(np.int64))[None]


def _place(affine: NDArray[np.float64]) -> Tensors:
    spacing = np.linalg.norm(affine[:3, :3], axis=0).astype(np.float32)
    return {"affine": torch.from_numpy(affine), "spacing": torch.from_numpy(spacing)}


def _shape_at(grid: Volume, spacing: tuple[float, float, float]) -> Size:
    """What :func:`to_spacing` makes of a grid's shape."""
    from monai.data.utils import compute_shape_offset, zoom_affine

    if np.allclose(grid.spacing, spacing, atol=1e-3):
        return grid.shape
    affine = zoom_affine(grid.affine, spacing, diagonal=False)
    height, width, depth = compute_shape_offset(grid.shape, grid.affine, affine)[0].tolist()
    return height, width, depth


def _box(inside: NDArray[np.bool_]) -> tuple[list[int], Size]:
    """First voxel and sides of the box that holds all of ``inside``; of everything where nothing is inside."""
    from monai.transforms.utils import generate_spatial_bounding_box

    first, beyond = generate_spatial_bounding_box(inside[None])
    ends = beyond if any(beyond) else inside.shape
    height, width, depth = (int(end - start) for start, end in zip(first, ends, strict=True))
    return [int(start) for start in first], (height, width, depth)
