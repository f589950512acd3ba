"""2-D slices of volumes: their names, their intensities, their frame, and the way back to the volume."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fairdiff_lightning.data.cache import Arrays, Layout
from fairdiff_lightning.data.edge_frame import EdgeFrame
from fairdiff_lightning.data.edges import UNREADABLE
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.frames import PictureFrame, Tensors
from fairdiff_lightning.data.native import NativeDataset, Record, atomic_path, check_classes
from fairdiff_lightning.data.resize import Region, centre_region, resize_image
from fairdiff_lightning.data.volumes import Array, Window

if TYPE_CHECKING:
    from fairdiff_lightning.metrics.functional import EmptyPolicy

Plane = tuple[int, int]
"""Height and width, pixels."""
SLICES, MASKS, ARCHIVE = "slices", "masks", ".npz"
PERCENTILES = (0.5, 99.5)
"""Of a slice, that are 0 and 1."""
FLOOR = -256.0
"""Nothing below it is 0: air would take most of the range of a slice of CT, HU."""
TOLERANCE = 0.01
"""Of the place of a crop in its slice, pixels."""
ID = re.compile(r"(?P<case>.+)_z(?P<z>\d{3,})")


class SliceReader(Protocol):
    """What a frame of slices needs of a data set beyond its files."""

    def windows(self, record: Record, image: Array) -> list[Window]:
        """Intensities that are [0, 1], of each channel of an image (C, H, W)."""

    def read_affine(self, record: Record) -> NDArray[np.float64] | None:
        """Affine (4, 4) of a slice, whose third index is 0; None where its place is not known."""


@dataclass(frozen=True)
class SliceFrame(PictureFrame):
    """A slice scaled to [0, 1] by its own percentiles, cropped and resized, in float32.

    Args:
        legacy: resize by scikit-image's smoothed spline of first order, and scale what comes out of it, as DiffBoost's
            code does; else the file's own slice is scaled, whatever the size, and then resized by area.
    """

    legacy: bool = False

    def decode(self, dataset: NativeDataset, record: Record) -> Arrays:
        """Image (C, H, W) float32 in [0, 1] and mask (H, W)."""
        image, mask = dataset.read_arrays(record)
        check_classes(mask, len(dataset.classes), str(record.files))
        reader = cast(SliceReader, dataset)
        if self.legacy:
            resized = spline(self._shown(image), self.size)
            return scale(resized, reader.windows(record, resized)), self._framed(mask)
        scaled = scale(image, reader.windows(record, image))
        return resize_slice(self._shown(scaled), self.size), self._framed(mask)

    def layout(self, channels: int) -> Layout | None:
        """Float32 for the image: CT and MRI have more levels than a byte."""
        if self.size is None:
            return None
        return {"images": ((channels, *self.size), np.float32), "masks": (self.size, np.uint8)}

    def condition(self, dataset: NativeDataset, record: Record) -> Tensors:
        """``mask``, and ``affine`` where the slice has a place in a patient."""
        return {**super().condition(dataset, record), **self.place(dataset, record)}

    def place(self, dataset: NativeDataset, record: Record) -> Tensors:
        """``affine`` of the sample, whose third index is 0; nothing where it is not known."""
        affine = cast(SliceReader, dataset).read_affine(record)
        if affine is None:
            return {}
        top, left, height, width = centre_region(dataset.read_mask(record).shape, self.crop)
        affine[:3, 3] += affine[:3, :2] @ (top, left)
        return {"affine": torch.from_numpy(resized_affine(affine, (height, width), self.size or (height, width)))}

    def _shown(self, image: Array) -> Array:
        top, left, height, width = centre_region((image.shape[1], image.shape[2]), self.crop)
        return image[:, top : top + height, left : left + width]


@dataclass(frozen=True, repr=False)
class EdgeSliceFrame(EdgeFrame):
    """A frame of slices that also gives ``edge``."""

    frame: SliceFrame

    def condition(self, dataset: NativeDataset, record: Record) -> Tensors:
        """``mask``, ``edge``, and ``affine`` where the slice has a place in a patient."""
        return {**super().condition(dataset, record), **self.frame.place(dataset, record)}


def slice_id(case: str, z: int) -> str:
    """Name of a slice, ``spleen_12_z007``."""
    return f"{case}_z{z:03d}"


def parse_slice_id(name: str) -> tuple[str, int]:
    """Case and z of :func:`slice_id`.

    Raises:
        ValueError: for another name.
    """
    found = ID.fullmatch(name)
    if found is None:
        raise ValueError(f"'{name}' is no slice; expected is a name as 'spleen_12_z007', case and z.")
    return found["case"], int(found["z"])


def by_case(names: Iterable[str]) -> dict[str, dict[int, str]]:
    """Names of slices as case -> z -> name.

    Raises:
        ValueError: for a name that is no slice's.
    """
    cases: dict[str, dict[int, str]] = {}
    for name in names:
        case, z = parse_slice_id(name)
        cases.setdefault(case, {})[z] = name
    return cases


def slice_window(values: Array) -> Window:
    """Intensities of one slice that are [0, 1]: its 0.5 and 99.5 percentiles, the lower one -256 at least.

    Where the two are one, as in a constant slice or in air, the window ends one above the largest value: the slice is
    0, but for what rises above the rest.
    """
    low, high = np.percentile(values, PERCENTILES).tolist()
    low = max(low, FLOOR)
    return Window(low, high if high > low else max(float(values.max()), low) + 1)


def scale(image: Array, windows: Sequence[Window]) -> NDArray[np.float32]:
    """Channels (C, H, W) in [0, 1], each by its window."""
    return np.stack([window.to_unit(channel) for channel, window in zip(image, windows, strict=True)])


def unscale(image: Array, windows: Sequence[Window]) -> NDArray[np.float32]:
    """Intensities of channels (C, H, W) in [0, 1]; what :func:`scale` clipped does not come back."""
    return np.stack([window.from_unit(channel) for channel, window in zip(image, windows, strict=True)])


def resize_slice(image: Array, size: Plane | None) -> Array:
    """Resize (C, H, W): averages when it shrinks, interpolates linearly when it enlarges."""
    return resize_image(np.ascontiguousarray(image.transpose(1, 2, 0)), size, "area")


def slice_affine(affine: NDArray[np.float64], z: int) -> NDArray[np.float64]:
    """Affine of a slice, whose third index is 0, of a volume with slices along the last axis."""
    moved = np.array(affine)
    moved[:3, 3] += moved[:3, 2] * z
    return moved


def resized_affine(affine: NDArray[np.float64], size: Plane, new: Plane) -> NDArray[np.float64]:
    """Affine of a slice that is resized, so that its corners stay where they are."""
    factors = np.asarray(size) / np.asarray(new)
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :2] @ ((factors - 1) / 2)
    moved[:3, :2] *= factors
    return moved


def region_of(affine: NDArray[np.float64], size: Plane, whole: NDArray[np.float64], shape: Plane) -> Region | None:
    """Where in a slice a resized crop of it lies: top, left, height and width, pixels; None where it does not.

    Args:
        affine: (4, 4) of the crop, as :meth:`SliceFrame.place` gives it.
        size: height and width of the crop.
        whole: (4, 4) of the slice, whose third index is 0.
        shape: height and width of the slice.
    """
    move = np.linalg.inv(whole) @ affine
    factors = np.diag(move)[:2]
    corners = np.concatenate([move[:2, 3] + (1 - factors) / 2, factors * size])
    top, left, height, width = np.rint(corners).astype(int).tolist()
    upright = move[:, :3].copy()
    upright[[0, 1], [0, 1]] = upright[2, 2] = 0
    fits = np.abs(corners - np.rint(corners)).max() < TOLERANCE and np.abs(upright).max() < TOLERANCE
    inside = min(top, left) >= 0 and min(height, width) > 0 and top + height <= shape[0] and left + width <= shape[1]
    return (top, left, height, width) if fits and inside and abs(move[2, 3]) < TOLERANCE else None


def stack_slices(slices: Mapping[int, Array], depth: int, stretch: bool = False) -> Array:
    """Put slices (..., H, W) of one case back to their z, (..., H, W, depth).

    Args:
        slices: z -> slice, all of one size.
        depth: slices of the volume.
        stretch: repeat the given ones over the whole depth as DiffBoost's code does, which moves them away from their z
            and makes distances wrong; else all must be given.

    Raises:
        ValueError: for slices outside of the volume, of several sizes, or missing ones, naming them.
    """
    order = sorted(slices)
    if not order or order[0] < 0 or order[-1] >= depth:
        raise ValueError(f"slices {order[:1]} to {order[-1:]}; expected z from 0 to {depth - 1}.")
    shapes = {slices[z].shape for z in order}
    if len(shapes) > 1:
        raise ValueError(f"slices of one case with the shapes {sorted(shapes)}; resize them to the file's own first.")
    absent = sorted(set(range(depth)) - set(order))
    if absent and not stretch:
        raise ValueError(f"{len(absent)} of {depth} slices are missing, z = {absent[:5]}; give all of them.")
    found = np.stack([slices[z] for z in order], axis=-1)
    nearest = ((np.arange(depth) + 0.5) * len(order) / depth).astype(np.intp)
    return found[..., nearest] if absent else found


def volume_scores(
    prediction: torch.Tensor,
    truth: torch.Tensor,
    num_classes: int,
    spacing: Sequence[float] | None = None,
    empty: EmptyPolicy = "skip",
) -> dict[str, torch.Tensor]:
    """Scores (B, num_classes - 1) of volumes: ``dice`` and ``iou``, and with a spacing ``hd95`` and ``assd`` in mm.

    Args:
        prediction: class indices (B, 1, H, W, D).
        truth: the same.
        num_classes: number of classes, the background included.
        spacing: of the voxels, mm; None measures no distances.
        empty: what a class that the truth lacks scores.
    """
    from fairdiff_lightning.metrics.functional import dice_score
    from fairdiff_lightning.metrics.surface import surface_scores

    dice = dice_score(prediction, truth, num_classes, empty)
    scores = {"dice": dice, "iou": dice / (2 - dice)}
    if spacing is not None:
        policy: Literal["skip", "reference"] = "reference" if empty == "reference" else "skip"
        surfaces = surface_scores(prediction, truth, num_classes, spacing, empty=policy)
        scores |= {"hd95": surfaces.hausdorff95, "assd": surfaces.symmetric_distance}
    return scores


def is_archive(record: Record) -> bool:
    """Whether a record is a slice that :func:`save_arrays` stored, not one of a volume."""
    return record.files["mask"].endswith(ARCHIVE)


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> Path:
    """Store the arrays of a slice in a compressed archive, atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    return path


def load_arrays(path: str | Path, *required: str) -> dict[str, Array]:
    """Read an archive's arrays: those that are asked for, or all.

    Raises:
        InvalidSampleError: for one that cannot be read, or lacks an array.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in required if key not in archive.files]
            if not missing:
                return {key: archive[key] for key in required or archive.files}
    except UNREADABLE as error:
        raise InvalidSampleError(path, f"unreadable ({error})", "a whole .npz; make it again") from error
    raise InvalidSampleError(path, f"no {', '.join(missing)}", "the keys image, mask and notes")


def read_predictions(directory: str | Path, names: Iterable[str]) -> dict[str, Array]:
    """Masks (H, W) of slices that `predict` stored below a folder, by id.

    Raises:
        InvalidSampleError: for one that cannot be read.
    """
    return {name: load_arrays(Path(directory) / MASKS / f"{name}{ARCHIVE}", "mask")["mask"] for name in names}


def spline(image: Array, size: Plane | None) -> Array:
    """Resize (C, H, W) by a smoothed spline of first order, as DiffBoost's code does."""
    from skimage.transform import resize

    if size is None:
        return image
    return np.stack([resize(channel, size, order=1, preserve_range=True) for channel in image])  # type: ignore[no-untyped-call]
