import errno
import gzip
import os
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fairdiff_lightning.data import HAM10000, PictureFrame, SegmentationDataset, collate
from fairdiff_lightning.data.cache import (
    ArrayCache,
    DiskAllocator,
    FileCache,
    NoCache,
    allocate_in_memory,
    fingerprint,
)
from fairdiff_lightning.data.native import Record

LAYOUT = {"images": ((1, 2, 2), np.uint8), "masks": ((2, 2), np.uint8)}


class Counting(HAM10000):
    """Counts how often a file is decoded."""

    decoded = 0

    def read_arrays(self, record):
        type(self).decoded += 1
        return super().read_arrays(record)


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path / "cache"))
    Counting.decoded = 0
    for i in range(5):
        image = torch.full((3, 20, 30), i / 10)
        HAM10000().write(
            tmp_path / "data", {"image": image, "mask": torch.ones(1, 20, 30), "attributes": {}, "id": f"ISIC_{i}"}
        )
    return HAM10000().index(tmp_path / "data").records


def dataset(records, cache, size=(8, 12)):
    return SegmentationDataset(Counting(), records, ["age"], PictureFrame(size), cache=cache)


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
def test_cached_samples_equal_decoded_ones(records, cache):
    plain, cached = dataset(records, "none"), dataset(records, cache)
    for _ in range(2):
        for a, b in zip(plain, cached, strict=True):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["mask"], b["mask"])


def test_a_file_is_decoded_once_even_when_its_record_is_repeated(records):
    data = dataset([*records, *records], "memory")
    first, second = [s["image"] for s in data][::5]
    assert Counting.decoded == 5
    assert torch.equal(first, second)


def test_changing_a_sample_does_not_change_the_cache(records):
    data = dataset(records, "memory")
    data[0]["image"].zero_()
    assert data[0]["image"].max() >= 0
    data[1]["image"].zero_()
    assert data[1]["image"].max() > 0


def test_loader_processes_share_memory(records):
    data = dataset(records, "memory")
    for _ in DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate):
        pass
    assert data._cache.filled.all()


def test_the_disk_cache_outlives_the_run_and_knows_content_and_settings(records):
    list(dataset(records, "disk"))
    assert Counting.decoded == 5
    list(dataset(records, "disk"))
    assert Counting.decoded == 5
    list(dataset(records, "disk", size=(6, 6)))
    assert Counting.decoded == 10
    os.utime(records[0].files["image"], ns=(1, 1))
    list(dataset(records, "disk"))
    assert Counting.decoded == 15


class Sliced(HAM10000):
    """Samples that share a file and show another part of it, which their id says."""

    def read_arrays(self, record):
        image, mask = super().read_arrays(record)
        return np.full_like(image, int(record.id)), mask


@pytest.mark.parametrize("storage", ["disk", "memory"])
def test_samples_of_one_file_are_kept_apart(records, storage):
    for chosen in ([1, 2], [2, 3], [3]):
        several = [replace(records[0], id=str(40 * k)) for k in chosen]
        data = SegmentationDataset(Sliced(), several, [], frame=PictureFrame((8, 8)), cache=storage)
        assert [round(float(sample["image"].max() * 255)) for sample in data] == [40 * k for k in chosen]


@dataclass(frozen=True)
class Part(Record):
    """A record that says itself which part of its file is read."""

    grey: int = 0


class Parted(HAM10000):
    def read_arrays(self, record):
        image, mask = super().read_arrays(record)
        return np.full_like(image, record.grey), mask


def test_what_a_record_says_of_its_reading_is_in_the_key(records):
    """As the series of a DICOM folder, which a table may change."""
    for size in ((8, 8), None):
        for grey in (40, 120):
            part = Part(**vars(records[0]), grey=grey)
            data = SegmentationDataset(Parted(), [part], [], frame=PictureFrame(size), cache="disk")
            assert round(float(data[0]["image"].max() * 255)) == grey


def test_the_key_names_files_and_settings(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    keys = {fingerprint([file], 1), fingerprint([file], 2), fingerprint([file, file], 1)}
    file.write_text("three")
    assert len(keys | {fingerprint([file], 1)}) == 4


@pytest.mark.parametrize("suffix", [".bin", ".gz"])
def test_the_key_knows_a_file_that_was_replaced_with_its_old_size_and_time(tmp_path, suffix):
    content = np.random.default_rng(0).bytes(100_000)
    middle = content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:]
    files = [content, middle] if suffix == ".gz" else [content, b"new" + content[3:], content[:-3] + b"new"]
    keys = set()
    for data in files:
        (tmp_path / f"a{suffix}").write_bytes(gzip.compress(data, 0, mtime=0) if suffix == ".gz" else data)
        os.utime(tmp_path / f"a{suffix}", ns=(1, 1))
        keys.add(fingerprint([tmp_path / f"a{suffix}"]))
    sizes = {len(gzip.compress(data, 0)) for data in files}
    assert len(sizes) == 1
    assert len(keys) == len(files)


def test_a_folder_of_slices_may_hold_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "empty").touch()
    assert fingerprint([tmp_path]) == fingerprint([tmp_path])


def test_a_sample_that_was_half_written_is_never_read(tmp_path):
    def dies(_):
        raise KeyboardInterrupt

    cache = ArrayCache(DiskAllocator(tmp_path), 2, LAYOUT)
    with pytest.raises(KeyboardInterrupt):
        cache.get(0, dies)
    whole = (np.ones((1, 2, 2), np.uint8), np.ones((2, 2), np.uint8))
    again = ArrayCache(DiskAllocator(tmp_path), 2, LAYOUT)
    assert again.get(0, lambda _: whole)[0].all()


def test_a_full_disk_costs_the_cache_not_the_run(records, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.warns(UserWarning, match="No space left on device.*FAIRDIFF_CACHE") as caught:
        data = dataset(records, "disk")
    assert len(caught) == 1
    assert isinstance(data._cache, NoCache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(data)) == 5


def test_a_disk_that_fills_up_costs_the_cache_of_volumes_not_the_run(tmp_path, monkeypatch):
    save, decoded = np.save, []

    def full(file, array, **options):
        if file.parent.parent.name.startswith(".0"):
            return save(file, array, **options)
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def decode(index):
        decoded.append(index)
        return np.full((2, 3, 4), index), np.eye(4)

    monkeypatch.setattr(np, "save", full)
    cache = FileCache([tmp_path / "volumes" / f"{k}" for k in range(3)])
    with pytest.warns(UserWarning, match="No space left on device.*FAIRDIFF_CACHE") as caught:
        found = [cache.get(index, decode) for index in (0, 1, 2, 0, 1, 2)]
    assert len(caught) == 1
    for index, (volume, affine) in zip((0, 1, 2, 0, 1, 2), found, strict=True):
        assert (volume == index).all()
        assert np.array_equal(affine, np.eye(4))
    assert decoded == [0, 1, 2, 1, 2], "what was stored before is still read"
    assert [path.name for path in (tmp_path / "volumes").iterdir()] == ["0"], "nothing half-written is left"
    with pytest.raises(FileNotFoundError, match="gone"):  # a file that is not there is no full disk
        FileCache([tmp_path / "volumes" / "3"]).get(0, lambda _: np.load("gone.npy"))


def test_a_pickled_memory_cache_starts_anew():
    import pickle

    cache = ArrayCache(allocate_in_memory, 3, LAYOUT)
    cache.get(1, lambda _: (np.full((1, 2, 2), 5), np.ones((2, 2))))
    copy = pickle.loads(pickle.dumps(cache))
    assert (cache.filled.tolist(), copy.filled.tolist()) == ([0, 1, 0], [0, 0, 0])
