"""Decoded and framed samples, kept in memory or on disk."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal, Protocol

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from fairdiff_lightning.data.native import make_directory_once

Storage = Literal["none", "memory", "disk"]
Arrays = tuple[NDArray[Any], ...]
Layout = Mapping[str, tuple[tuple[int, ...], Any]]
VERSION = 2
"""Part of every key: raised when what is stored for the same files and settings changes."""
MARK = 4096
"""Bytes of the beginning and of the end of a file that mark its content: of a gzip or zip, the end has check sums."""


def cache_root() -> Path:
    """The folder for phantoms, indices and decoded samples: ``FAIRDIFF_CACHE`` or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fairdiff_lightning"
    return Path(os.environ.get("FAIRDIFF_CACHE", default))


def fingerprint(files: Sequence[str | Path], *settings: object) -> str:
    """Key of the files (path, size, time of change, both ends), of those in folders, and of what they are read with."""
    digest = hashlib.sha256(repr((VERSION, settings)).encode())
    listed = (sorted(Path(file).iterdir()) if os.path.isdir(file) else [file] for file in files)
    for file in chain.from_iterable(listed):
        stat = os.stat(file)
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        if S_ISREG(stat.st_mode):
            with open(file, "rb", buffering=0) as stream:
                digest.update(stream.read(MARK))
                stream.seek(max(stat.st_size - MARK, 0))
                digest.update(stream.read(MARK))
    return digest.hexdigest()[:32]


class SampleCache(Protocol):
    """Keeps the arrays that ``decode`` returns for an index."""

    def get(self, index: int, decode: Callable[[int], Arrays]) -> Arrays:
        """The arrays of a sample, decoded at the first call."""


class NoCache:
    """Decodes at every call."""

    def get(self, index: int, decode: Callable[[int], Arrays]) -> Arrays:
        """Decode the sample."""
        return decode(index)


class ArrayCache:
    """One buffer for each kind of array and a flag for each sample that is set last.

    A process that dies while it stores a sample leaves the flag unset, so nothing half-written is ever read.

    Args:
        allocate: makes a zeroed buffer of a number of bytes that other processes can share, under a name.
        length: number of samples.
        layout: kind (images, masks) -> shape and type of one sample's array, in the order that ``decode`` returns them.
    """

    def __init__(self, allocate: Callable[[str, int], Any], length: int, layout: Layout) -> None:
        self._arguments = (allocate, length, layout)

        def array(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
            size = int(np.prod(shape)) * dtype.itemsize
            return np.frombuffer(allocate(name, size), dtype=dtype).reshape(shape)

        self.arrays = [array(name, (length, *shape), np.dtype(dtype)) for name, (shape, dtype) in layout.items()]
        self.filled = array("filled", (length,), np.dtype(np.uint8))

    def get(self, index: int, decode: Callable[[int], Arrays]) -> Arrays:
        """The arrays of a sample, decoded and stored at the first call."""
        if not self.filled[index]:
            for array, value in zip(self.arrays, decode(index), strict=True):
                array[index] = value
            self.filled[index] = 1
        return tuple(array[index] for array in self.arrays)

    def __reduce__(self) -> tuple[type[ArrayCache], tuple[Any, ...]]:
        """A spawned process opens the same files on disk; memory it starts anew."""
        return type(self), self._arguments


class FileCache:
    """Samples of any size, each in a folder of its own, mapped into memory so that a block costs no more than itself.

    Where a sample cannot be stored (a full disk), it and those that come after it are decoded at every call, with one
    warning of each process.

    Args:
        folders: of each sample; one that is there is whole.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self._stores = True

    def get(self, index: int, decode: Callable[[int], Arrays]) -> Arrays:
        """The arrays of a sample, decoded and stored at the first call."""
        folder = self.folders[index]
        if not folder.is_dir():
            arrays = decode(index)
            if not (self._stores and self._store(folder, arrays)):
                return arrays
        files = sorted(folder.glob("*.npy"))
        return tuple(np.load(file, mmap_mode="r", allow_pickle=False) for file in files)

    def _store(self, folder: Path, arrays: Arrays) -> bool:
        try:
            make_directory_once(folder, lambda path: _save(path, arrays))
        except OSError as error:
            self._stores = False
            _warn("keep samples in", "disk", error)
        return self._stores


class ProcessCache:
    """Samples of any size in the memory of each loader process."""

    def __init__(self) -> None:
        self._samples: dict[int, Arrays] = {}

    def get(self, index: int, decode: Callable[[int], Arrays]) -> Arrays:
        """The arrays of a sample, decoded at the first call of this process."""
        if index not in self._samples:
            self._samples[index] = decode(index)
        return self._samples[index]


def open_file_cache(storage: Storage, keys: Sequence[str]) -> SampleCache:
    """A cache for samples that differ in size.

    Args:
        storage: ``memory`` is each process's own; ``disk`` outlives the run and serves sets larger than memory.
        keys: :func:`fingerprint` of each sample's files and settings.
    """
    return ProcessCache() if storage == "memory" else FileCache([cache_root() / "volumes" / key for key in keys])


def open_cache(storage: Storage, key: str, length: int, layout: Layout) -> SampleCache:
    """A cache for ``length`` samples; reading goes on uncached, with one warning, when there is no room.

    Args:
        storage: ``memory`` is shared by forked loader processes; ``disk`` outlives the run.
        key: :func:`fingerprint` of the files and settings, names the folder on disk.
        length: number of samples.
        layout: see :class:`ArrayCache`.
    """
    if storage == "none" or not length:
        return NoCache()
    allocate = allocate_in_memory if storage == "memory" else DiskAllocator(cache_root() / "samples" / key)
    try:
        return ArrayCache(allocate, length, layout)
    except (OSError, ValueError, AttributeError) as error:  # no room, a file of another size, no fallocate (macOS)
        _warn("make", storage, error)
        return NoCache()


def allocate_in_memory(name: str, size: int) -> mmap.mmap:
    """Anonymous memory that forked processes share; pages are taken when they are first written."""
    return mmap.mmap(-1, size)


class DiskAllocator:
    """Files of a fixed size below a folder, mapped into memory.

    The room is reserved at once: a disk that fills up later cannot kill a run that writes through the map.

    Args:
        folder: where the files lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, size: int) -> mmap.mmap:
        """Map the file ``name``, made with ``size`` zero bytes when it is not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        if not path.exists():
            temporary = path.with_suffix(f".{os.getpid()}")
            try:
                with temporary.open("wb") as stream:
                    os.posix_fallocate(stream.fileno(), 0, size)
                os.link(temporary, path)
            except FileExistsError:
                pass  # another process made it in the meantime
            finally:
                temporary.unlink(missing_ok=True)
        with path.open("r+b") as stream:
            return mmap.mmap(stream.fileno(), size)


def _save(folder: Path, arrays: Arrays) -> None:
    for number, array in enumerate(arrays):
        np.save(folder / f"{number}.npy", array, allow_pickle=False)


def _warn(action: str, storage: Storage, error: Exception) -> None:
    rank_zero_warn(
        f"cannot {action} the {storage} cache ({error}); samples are decoded each time instead. "
        f"Free some room, set FAIRDIFF_CACHE to another folder, or choose cache='none'."
    )
