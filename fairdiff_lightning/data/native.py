"""A data set as its owner ships it: index the tree, read a record, write a sample back."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.sample import AttributeSpec, Sample


@dataclass(frozen=True)
class Record:
    """Where one sample lies and what is known of it before it is decoded.

    Args:
        id: unique within the data set.
        files: role (image, mask) -> path.
        attributes: attribute -> group index, -1 when unknown.
        unit: patient or lesion; a split never cuts it.
        split: ``train``, ``val`` or ``test`` when the owner publishes a split, else None.
        synthetic: whether a generator made it.
        source: id of the real case that a synthetic one was derived from.
        digest: of how a synthetic one was made; tells it from another of the same id, empty when unknown.
    """

    id: str
    files: dict[str, str]
    attributes: dict[str, int]
    unit: str
    split: str | None = None
    synthetic: bool = False
    source: str | None = None
    digest: str = ""


@dataclass
class Index:
    """The records of a tree, what was left out of it, counted by reason, and the files that could not be read."""

    records: list[Record]
    left_out: dict[str, int] = field(default_factory=dict)
    errors: list[InvalidSampleError] = field(default_factory=list)


class NativeDataset(ABC):
    """Reads and writes one data set in its owner's layout.

    Subclasses say what the classes and attributes are and how a file is read and written;
    splits, resizing, caching and mixing are not theirs.
    """

    name: ClassVar[str]
    expected_tree: ClassVar[str]
    source: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    channels: ClassVar[int]
    ndim: ClassVar[int] = 2
    """Axes of an image."""
    mask_folder: ClassVar[str | None] = None
    """Where written masks lie under the names of their images, beside the images' folder; None for no such folder."""
    unit: ClassVar[str] = "patient"
    """What a split must not cut."""
    drawn_over: ClassVar[str | None] = None
    """Attribute that is known of every unit in the published split: these units are drawn first, by themselves."""
    version: ClassVar[int] = 1
    """Raised when the same files are read differently: decoded samples on disk are then made anew."""

    @property
    @abstractmethod
    def attributes(self) -> dict[str, AttributeSpec]:
        """Every attribute that the data set has."""

    @abstractmethod
    def index(self, root: Path) -> Index:
        """List the records below ``root``, and the files of which not even the attributes can be read.

        Raises:
            DatasetNotFoundError: when the tree is missing or another one.
            InvalidSampleError: when a table cannot be read.
        """

    @abstractmethod
    def read_arrays(self, record: Record) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Decode a record at its own size: image (H, W) or (H, W, C) and mask (H, W) of class indices.

        Raises:
            InvalidSampleError: naming the file, the key and the value found.
        """

    def case_key(self, record_id: str) -> str:
        """What tells two cases apart: ids of one key, however they are spelled, are of one case."""
        return record_id

    def read_mask(self, record: Record) -> NDArray[np.uint8]:
        """Decode the mask alone."""
        return self.read_arrays(record)[1]

    @abstractmethod
    def write(self, directory: Path, sample: Sample) -> Path:
        """Store a sample (image in [0, 1]) in the native layout below ``directory``, atomically."""

    @abstractmethod
    def write_mask(self, directory: Path, sample_id: str, mask: NDArray[np.uint8]) -> Path:
        """Store a mask (H, W) of class indices in the native format below ``directory``, atomically."""

    def mask_file(self, written: Path) -> Path:
        """The file that holds the mask of what :meth:`write` or :meth:`write_mask` stored at ``written``."""
        return written if self.mask_folder is None else written.parents[1] / self.mask_folder / written.name

    @abstractmethod
    def write_phantom(self, root: Path, seed: int) -> None:
        """Write a small procedural data set in the native layout."""

    def read(self, record: Record) -> Sample:
        """Read a record as a sample of the contract at its own size, image in [0, 1]."""
        image, mask = self.read_arrays(record)
        return {
            "image": to_image_tensor(image),
            "mask": torch.from_numpy(mask.astype(np.int64))[None],
            "attributes": {name: torch.tensor(group) for name, group in record.attributes.items()},
            "id": record.id,
            "synthetic": torch.tensor(record.synthetic),
        }

    def not_found(self, root: Path, found: str = "") -> DatasetNotFoundError:
        """The error for a tree that is missing or another one."""
        return DatasetNotFoundError(self.name, root, self.expected_tree, self.source, found)


def to_image_tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    """Turn (H, W) or (H, W, C) uint8 into float32 (C, H, W) in [0, 1]."""
    channels_first = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(channels_first)).float().div_(255)


def to_uint8_image(image: torch.Tensor) -> NDArray[np.uint8]:
    """Turn float (C, H, W) in [0, 1] into uint8 (H, W) for one channel or (H, W, C)."""
    array = image.detach().cpu().clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return np.ascontiguousarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))


def check_classes(mask: NDArray[np.generic], num_classes: int, where: str) -> NDArray[np.uint8]:
    """Check that a mask holds class indices only.

    Raises:
        InvalidSampleError: with the values that were found.
    """
    found = np.unique(mask)
    if not np.isin(found, np.arange(num_classes)).all():
        raise InvalidSampleError(where, f"mask values {found[:8].tolist()}", f"classes 0 to {num_classes - 1}")
    return mask.astype(np.uint8)


def check_same_size(image: NDArray[np.uint8], mask: NDArray[np.uint8], where: str) -> None:
    """Check that an image and its mask cover the same pixels.

    Raises:
        InvalidSampleError: with both sizes.
    """
    if image.shape[:2] != mask.shape:
        raise InvalidSampleError(where, f"mask of size {mask.shape} for an image of size {image.shape[:2]}", "one size")


def bin_index(value: float, edges: Sequence[float]) -> int:
    """Group index of a value among bins that begin at the edges; NaN is unknown."""
    return -1 if np.isnan(value) else int(np.searchsorted(np.asarray(edges), value, side="right"))


def bin_names(edges: Sequence[float]) -> tuple[str, ...]:
    """Names of the bins: ``<20``, ``20-39``, ``>=40``."""
    inner = [f"{low:g}-{high - 1:g}" for low, high in pairwise(edges)]
    return (f"<{edges[0]:g}", *inner, f">={edges[-1]:g}")


def bin_centre(index: int, edges: Sequence[float]) -> float:
    """A value that falls into the bin; NaN for an unknown one."""
    if index < 0:
        return float("nan")
    padded = [max(edges[0] - 20, 0), *edges, edges[-1] + 10]
    return float(np.floor((padded[index] + padded[index + 1]) / 2))


def visible_files(root: Path, pattern: str) -> list[Path]:
    """The files below ``root`` that match, sorted; hidden ones are no samples, nor are those in hidden folders.

    Args:
        root: folder.
        pattern: of :meth:`pathlib.Path.glob`; one that begins with ``**/`` looks into linked folders too.
    """
    folders = _folders(root) if pattern.startswith("**/") else [root]
    found = (path for folder in folders for path in folder.glob(pattern.removeprefix("**/")))
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends well.

    Its suffix is no data file's, so that what a killed process leaves is never read; a writer that tells the format
    from the name has to be told it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left of :func:`atomic_path` below a folder that nobody writes into now."""
    for leftover in folder.rglob(".*.????????.part"):
        leftover.unlink(missing_ok=True)


def make_directory_once(path: Path, fill: Callable[[Path], None]) -> None:
    """Create a directory whole or not at all: ``fill`` works in a temporary one that is then renamed."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as work:
        content = Path(work) / "content"
        content.mkdir()
        fill(content)
        try:
            os.rename(content, path)
        except OSError:  # another process was first
            if not path.is_dir():
                raise


def _folders(root: Path) -> Iterator[Path]:
    """A folder and the visible ones below it, linked ones too, but for links back to a folder on the way down."""
    for path, names, _ in os.walk(root, followlinks=True):
        folder = Path(path)
        way = (folder, *folder.parents[: len(folder.relative_to(root).parts)])
        names[:] = [n for n in names if not n.startswith(".") and not any(p.samefile(folder / n) for p in way)]
        yield folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
