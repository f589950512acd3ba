"""2-D slices of volumes: their names, their intensities, their frame, and the way back to the volume."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fairdiff_lightning.data.cache import Arrays, Layout
from fairdiff_lightning.data.edge_frame import EdgeFrame
from fairdiff_lightning.data.edges import UNREADABLE
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.frames import PictureFrame, Tensors
from fairdiff_lightning.data.native import NativeDataset, Record, atomic_path, check_classes, visible_files
from fairdiff_lightning.data.resize import centre_region, resize_image
from fairdiff_lightning.data.volumes import Array, Volume, Window

Plane = tuple[int, int]
"""Height and width, pixels."""
Missing = Literal["error", "background", "stretch"]
SLICES, MASKS, ARCHIVE = "slices", "masks", ".npz"
PERCENTILES = (0.5, 99.5)
"""Of a slice, that are 0 and 1."""
FLOOR = -256.0
"""Nothing below it is 0: air would take most of the range of a slice of CT, HU."""
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
            resized = _spline(self._shown(image), self.size)
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


def by_case(slices: Mapping[str, Array]) -> dict[str, dict[int, Array]]:
    """Slices by their names as case -> z -> slice.

    Raises:
        ValueError: for a name that is no slice's.
    """
    cases: dict[str, dict[int, Array]] = {}
    for name, values in slices.items():
        case, z = parse_slice_id(name)
        cases.setdefault(case, {})[z] = values
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


def resized_affine(affine: NDArray[np.float64], size: Plane, new: Plane) -> NDArray[np.float64]:
    """Affine of a slice that is resized, so that its corners stay where they are."""
    factors = np.asarray(size) / np.asarray(new)
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :2] @ ((factors - 1) / 2)
    moved[:3, :2] *= factors
    return moved


def stack_slices(slices: Mapping[int, Array], depth: int, missing: Missing = "error") -> Array:
    """Put slices (..., H, W) of one case back to their z, (..., H, W, depth).

    Args:
        slices: z -> slice, all of one size.
        depth: slices of the volume.
        missing: what is done about slices that are not given: ``error``; ``background``, they are 0; or ``stretch``,
            the given ones are repeated over the whole depth as DiffBoost's code does, which moves them away from
            their z and makes distances wrong.

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
    if absent and missing == "error":
        raise ValueError(
            f"{len(absent)} of {depth} slices are missing, z = {absent[:5]}; give all, or missing='background'."
        )
    found = np.stack([slices[z] for z in order], axis=-1)
    if missing == "stretch":
        nearest = ((np.arange(depth) + 0.5) * len(order) / depth).astype(np.intp)
        return found[..., nearest]
    volume = np.zeros((*found.shape[:-1], depth), found.dtype)
    volume[..., order] = found
    return volume


def volume_scores(prediction: Array, truth: Volume, classes: Sequence[str]) -> dict[str, float]:
    """Scores of one case as a volume, in mm, by ``<score>/<class>``: dice, hausdorff95 and assd.

    Args:
        prediction: class indices (H, W, D).
        truth: the same, with its place in the patient.
        classes: their names, background first; a class that neither has scores NaN.
    """
    from fairdiff_lightning.metrics.functional import dice_score
    from fairdiff_lightning.metrics.surface import surface_scores

    pred, true = (torch.from_numpy(mask.astype(np.int64))[None, None] for mask in (prediction, truth.array))
    surfaces = surface_scores(pred, true, len(classes), truth.spacing.tolist())
    found = {
        "dice": dice_score(pred, true, len(classes)),
        "hausdorff95": surfaces.hausdorff95,
        "assd": surfaces.symmetric_distance,
    }
    names = classes[1:]
    return {f"{score}/{name}": float(values[0, k]) for score, values in found.items() for k, name in enumerate(names)}


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


def read_predictions(directory: str | Path) -> dict[str, Array]:
    """Masks (H, W) of slices that `predict` stored below a folder, by id.

    Raises:
        FileNotFoundError: when there is none.
    """
    files = visible_files(Path(directory), f"{MASKS}/*{ARCHIVE}")
    if not files:
        raise FileNotFoundError(f"no {MASKS}/*{ARCHIVE} below '{directory}'; expected is what `predict` wrote.")
    return {file.stem: load_arrays(file, "mask")["mask"] for file in files}


def _spline(image: Array, size: Plane | None) -> Array:
    from skimage.transform import resize

    if size is None:
        return image
    return np.stack([resize(channel, size, order=1, preserve_range=True) for channel in image])  # type: ignore[no-untyped-call]
