"""The images below a folder as a few arrays on disk: listed once, mapped into memory, shared by all processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from fairdiff_lightning.data.edges import UNREADABLE
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import atomic_path, make_directory_once

VERSION = 1
"""Part of the folder's name: raised when the arrays change."""
SUFFIX = ".png"
FOLDERS, STARTS, NAMES, ENDS = "folders.json", "starts.npy", "names.npy", "ends.npy"


class Listing(NamedTuple):
    """What one folder holds, as its time of change (ns) says."""

    changed: int
    images: list[str]
    folders: list[str]


class ImageIndex:
    """Paths of images, by row: folder after folder, in each by name, numbers in names by value.

    The arrays are mapped, so that a million rows load at once and are in memory once however many processes read them;
    pickled, an index is the path of its folder.

    Args:
        folder: what :func:`build_index` has written.

    Attributes:
        root: folder of the images.
        folders: paths below the root of the folders that hold images.
        starts: int64 (folders + 1,), first row of each folder, and the number of rows.

    Raises:
        InvalidSampleError: when the arrays cannot be read or do not fit each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            facts: dict[str, Any] = json.loads((folder / FOLDERS).read_text())
            self.starts: NDArray[np.int64] = np.load(folder / STARTS, allow_pickle=False)
            self._names: NDArray[np.uint8] = np.load(folder / NAMES, mmap_mode="r", allow_pickle=False)
            self._ends: NDArray[np.int64] = np.load(folder / ENDS, mmap_mode="r", allow_pickle=False)
            self.root, self.folders = Path(facts["root"]), [str(path) for path in facts["folders"]]
            self._changed: dict[str, int] = facts["changed"]
            if len(self.folders) + 1 != len(self.starts):
                raise ValueError(f"{len(self.folders)} folders, {len(self.starts)} starts")
            if self.starts[-1] != len(self._ends) or (len(self._ends) and self._ends[-1] != len(self._names)):
                raise ValueError(f"{self.starts[-1]} rows, {len(self._ends)} ends, {len(self._names)} bytes of names")
        except UNREADABLE as error:
            raise InvalidSampleError(
                folder, f"unreadable ({error})", "a whole index; delete this folder to have it built anew"
            ) from error

    def __len__(self) -> int:
        return len(self._ends)

    def __reduce__(self) -> tuple[type[ImageIndex], tuple[Path]]:
        return type(self), (self.folder,)

    def folder_of(self, row: int) -> int:
        """Number of the folder that holds the image of a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def path(self, row: int) -> str:
        """Path of the image of a row, below the root, with ``/``.

        Raises:
            IndexError: when there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of the index '{self.folder}'; it has the rows 0 to {len(self) - 1}.")
        begin = int(self._ends[row - 1]) if row else 0
        name = os.fsdecode(self._names[begin : int(self._ends[row]) - 1].tobytes())
        return _below(self.folders[self.folder_of(row)], name)

    def names(self, folder: int) -> list[str]:
        """Names of the images of a folder, in order."""
        first, last = int(self.starts[folder]), int(self.starts[folder + 1])
        begin = int(self._ends[first - 1]) if first else 0
        return _unpack(self._names[begin : int(self._ends[last - 1])])

    def check(self) -> None:
        """Compare with the tree: one look at each folder, and a listing of those that have changed.

        Images and folders that came later are not in the index; it warns of them.

        Raises:
            InvalidSampleError: when images are gone, naming the first and how many they are.
        """
        gone: list[str] = []
        added, numbers = 0, {folder: number for number, folder in enumerate(self.folders)}
        for folder, changed in self._changed.items():
            now = _listing(self.root / folder, changed)
            if now is not None:
                known = self.names(numbers[folder]) if folder in numbers else []
                found = set(now.images)
                gone += [_below(folder, name) for name in known if name not in found]
                added += len(found.difference(known))
                added += sum(_below(folder, name) not in self._changed for name in now.folders)
        if gone:
            raise InvalidSampleError(
                self.root / gone[0],
                f"gone, and it is the first of {len(gone)} such images of the {len(self)} in the index '{self.folder}'",
                "every image that was listed; put them back, or delete the folder of the index to list what is there",
            )
        if added:
            rank_zero_warn(
                f"{added} images or folders came to '{self.root}' after it was listed and are not used. Delete "
                f"'{self.folder}' to list the tree anew."
            )


class RowRanges(Sequence[int]):
    """Rows as ranges one after another, so that most of a million rows are a few numbers.

    Args:
        begins: first row of each range.
        lengths: rows of each range, may be 0.
    """

    def __init__(self, begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self.begins, self.offsets = begins, np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, place: Any) -> Any:
        """The row at a place, or the rows at an array of places.

        Raises:
            IndexError: beyond the last row.
        """
        if np.any(np.asarray(place) >= len(self)):
            raise IndexError(f"place {place} of {len(self)} rows.")
        number = np.searchsorted(self.offsets, place, side="right") - 1
        return self.begins[number] + place - self.offsets[number]


def hold_out(starts: NDArray[np.int64], fraction: float, seed: int) -> tuple[RowRanges, RowRanges]:
    """Rows to train on and rows held out: of each folder a run of neighbours, at a place that the seed draws.

    Args:
        starts: first row of each folder, and the number of rows.
        fraction: share held out, 0 <= fraction < 1; over all folders it is exact to half an image.
        seed: of the places.
    """
    counts = np.diff(np.floor(starts * fraction + 0.5)).astype(np.int64)
    begins = starts[:-1] + np.random.default_rng(seed).integers(0, np.diff(starts) - counts + 1)
    ends = begins + counts
    around = np.stack([starts[:-1], ends], 1).ravel(), np.stack([begins - starts[:-1], starts[1:] - ends], 1).ravel()
    return RowRanges(*around), RowRanges(begins, counts)


def build_index(root: Path, folder: Path) -> ImageIndex:
    """List the images (:data:`SUFFIX`) below a root, unless that was done; what is hidden is left out.

    Each folder's listing is kept as soon as it is there, so that a process that was killed is followed by one that goes
    on; the index appears whole or not at all.

    Args:
        root: folder of the images.
        folder: where the index is or will be.

    Returns:
        The index; it may have no rows.
    """
    if not folder.is_dir():
        parts = folder.with_name(f"{folder.name}.parts")
        make_directory_once(folder, lambda path: _write(path, root, _walk(root, "", parts)))
        shutil.rmtree(parts, ignore_errors=True)
    return ImageIndex(folder)


def index_name(root: Path) -> str:
    """A name for the index of a root: the same for the same place."""
    return f"{root.resolve().name}-{hashlib.sha256(f'{VERSION}{root.resolve()}'.encode()).hexdigest()[:16]}"


def _write(target: Path, root: Path, listings: Iterator[tuple[str, Listing]]) -> None:
    """Write the arrays of an index."""
    folders, changed, counts, names = [], {}, [0], []
    for path, listing in listings:
        changed[path] = listing.changed
        if listing.images:
            folders.append(path)
            counts.append(len(listing.images))
            names.append(_pack(listing.images))
    joined = np.concatenate([np.empty(0, np.uint8), *names])
    np.save(target / NAMES, joined, allow_pickle=False)
    np.save(target / ENDS, np.flatnonzero(joined == 0) + 1, allow_pickle=False)
    np.save(target / STARTS, np.cumsum(counts, dtype=np.int64), allow_pickle=False)
    facts = {"root": str(root.resolve()), "folders": folders, "changed": changed}
    (target / FOLDERS).write_text(json.dumps(facts))


def _walk(root: Path, path: str, parts: Path) -> Iterator[tuple[str, Listing]]:
    """Folders below a root and what they hold, by name; a listing that is kept is not made again."""
    kept = parts / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.npz"
    listing = _kept_listing(kept, (root / path).stat().st_mtime_ns)
    if listing is None:
        listing = _listing(root / path)
        assert listing is not None, "nothing is known of the folder, so it is listed"
        with suppress(OSError), atomic_path(kept) as temporary, temporary.open("wb") as stream:  # another is done first
            np.savez(
                stream,
                changed=np.int64(listing.changed),
                images=_pack(listing.images),
                folders=_pack(listing.folders),
            )
    yield path, listing
    for folder in listing.folders:
        yield from _walk(root, _below(path, folder), parts)


def _kept_listing(file: Path, changed: int) -> Listing | None:
    """The listing in a file when it is whole and the folder has not changed since."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            listing = Listing(int(kept["changed"]), _unpack(kept["images"]), _unpack(kept["folders"]))
    except UNREADABLE:
        return None
    return listing if listing.changed == changed else None


def _listing(folder: Path, known: int | None = None) -> Listing | None:
    """What a folder holds now, nothing when it is gone; None when it is as it was at the time ``known``."""
    images, folders = [], []
    try:
        changed = folder.stat().st_mtime_ns  # before it is listed: what comes meanwhile makes it a changed one
        if changed == known:
            return None
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(SUFFIX):  # by name: asking what it is may cost a look at each file
                    images.append(entry.name)
                elif entry.is_dir():
                    folders.append(entry.name)
    except FileNotFoundError:
        return Listing(0, [], [])
    return Listing(changed, sorted(images, key=_natural), sorted(folders, key=_natural))


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts ``a2`` before ``a10``."""
    parts = re.split(r"([0-9]+)", name)  # words and numbers take turns
    return [(int(part), "") if number % 2 else (-1, part) for number, part in enumerate(parts)], name


def _pack(names: Sequence[str]) -> NDArray[np.uint8]:
    """Names as bytes, each ended by a zero, which no name holds."""
    return np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), np.uint8)


def _unpack(packed: NDArray[np.uint8]) -> list[str]:
    return [os.fsdecode(name) for name in packed.tobytes().split(b"\0")[:-1]]
