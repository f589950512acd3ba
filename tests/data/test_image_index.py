import os
import pickle
import shutil
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.data import image_index
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.image_index import ImageIndex, Listing, RowRanges, build_index, hold_out, index_name

NAMES = {"MR/hip/normal": ("a2.png", "a10.png", "é.PNG"), "CT/abd": ("x.png",), "CT/abd/normal": ("b1.png", "b²3.png")}


def tree(root):
    for folder, names in NAMES.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in (*names, ".hidden.png", "notes.txt"):
            (root / folder / name).touch()
    (root / "MR" / "empty").mkdir()
    (root / ".cache").mkdir()
    (root / ".cache" / "no.png").touch()
    return root


def paths(index):
    return [index.path(row) for row in range(len(index))]


EXPECTED = [
    "CT/abd/x.png",
    "CT/abd/normal/b1.png",
    "CT/abd/normal/b²3.png",
    "MR/hip/normal/a2.png",
    "MR/hip/normal/a10.png",
    "MR/hip/normal/é.PNG",
]


def test_an_index_lists_the_images_folder_after_folder(tmp_path):
    index = build_index(tree(tmp_path / "data"), tmp_path / "index")
    assert paths(index) == EXPECTED
    assert index.folders == ["CT/abd", "CT/abd/normal", "MR/hip/normal"]
    assert [index.folders[index.folder_of(row)] for row in range(6)] == [p.rpartition("/")[0] for p in EXPECTED]
    assert [index.names(n) for n in range(3)] == [["x.png"], ["b1.png", "b²3.png"], ["a2.png", "a10.png", "é.PNG"]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "index"], "nothing is left over"
    with pytest.raises(IndexError, match="rows 0 to 5"):
        index.path(6)


def test_a_root_may_hold_images_or_none(tmp_path):
    (tmp_path / "data").mkdir()
    assert len(build_index(tmp_path / "data", tmp_path / "empty")) == 0
    (tmp_path / "data" / "a.png").touch()
    assert paths(build_index(tmp_path / "data", tmp_path / "index")) == ["a.png"]


def test_it_is_built_once(tmp_path, monkeypatch):
    root = tree(tmp_path / "data")
    build_index(root, tmp_path / "index")
    monkeypatch.setattr(image_index, "_listing", lambda *_: pytest.fail("listed again"))
    assert paths(build_index(root, tmp_path / "index")) == EXPECTED


def test_nothing_is_asked_of_the_files_but_their_names(tmp_path, monkeypatch):
    real, asked = os.scandir, []

    class Entry(SimpleNamespace):
        def is_dir(self):
            asked.append(self.name)
            return self.entry.is_dir()

    @contextmanager
    def scandir(folder):
        with real(folder) as entries:
            yield (Entry(name=entry.name, entry=entry) for entry in entries)

    monkeypatch.setattr(image_index, "os", SimpleNamespace(**vars(os) | {"scandir": scandir}))
    assert paths(build_index(tree(tmp_path / "data"), tmp_path / "index")) == EXPECTED
    assert set(asked) == {"MR", "CT", "abd", "hip", "normal", "empty", "notes.txt"}


def test_a_killed_build_leaves_no_index_and_is_gone_on_with(tmp_path, monkeypatch):
    root, listed = tree(tmp_path / "data"), []
    real = image_index._listing

    def killed(folder, known=None):
        if len(listed) == 4:
            raise KeyboardInterrupt
        listed.append(folder)
        return real(folder, known)

    monkeypatch.setattr(image_index, "_listing", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(root, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    (root / "CT" / "abd" / "new.png").touch()  # this folder has changed, so it is listed again
    half = next((tmp_path / "index.parts").iterdir())
    kept = half.read_bytes()
    half.write_bytes(kept[: len(kept) // 2])  # and this listing was cut off
    again = []
    monkeypatch.setattr(image_index, "_listing", lambda folder, known=None: again.append(folder) or real(folder, known))
    index = build_index(root, tmp_path / "index")
    assert sorted(paths(index)) == sorted([*EXPECTED, "CT/abd/new.png"])
    assert 5 <= len(again) <= 6, "of the 8 folders the changed one, the one cut off and the 4 that were left"
    assert root / "CT" / "abd" in again
    assert not (tmp_path / "index.parts").exists()


def test_images_that_are_gone_are_an_error_that_counts_them(tmp_path):
    root = tree(tmp_path / "data")
    index = build_index(root, tmp_path / "index")
    index.check()
    (root / "CT" / "abd" / "normal" / "b1.png").unlink()
    shutil.rmtree(root / "MR")
    with pytest.raises(InvalidSampleError, match=r"b1\.png: gone.*first of 4 such images of the 6 .*index'.*delete"):
        index.check()


def test_images_that_came_later_are_told(tmp_path):
    root = tree(tmp_path / "data")
    index = build_index(root, tmp_path / "index")
    (root / "CT" / "abd" / "y.png").touch()
    (root / "MR" / "knee" / "normal").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"2 images or folders came to .* Delete"):
        index.check()
    assert len(index) == 6


def test_a_folder_touched_without_a_change_is_no_error(tmp_path, recwarn):
    index = build_index(tree(tmp_path / "data"), tmp_path / "index")
    os.utime(tmp_path / "data" / "CT" / "abd", ns=(1, 1))
    index.check()
    assert not recwarn.list


@pytest.mark.parametrize("name", [image_index.FOLDERS, image_index.NAMES, image_index.ENDS, image_index.STARTS])
def test_an_index_that_was_cut_off_is_an_error(tmp_path, name):
    build_index(tree(tmp_path / "data"), tmp_path / "index")
    file = tmp_path / "index" / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InvalidSampleError, match=r"unreadable .*delete this folder"):
        ImageIndex(tmp_path / "index")


def test_arrays_that_do_not_fit_are_an_error(tmp_path):
    build_index(tree(tmp_path / "data"), tmp_path / "index")
    np.save(tmp_path / "index" / image_index.ENDS, np.arange(1, 4))
    with pytest.raises(InvalidSampleError, match="6 rows, 3 ends"):
        ImageIndex(tmp_path / "index")


def test_many_rows_load_at_once_and_pickle_as_a_path(tmp_path):
    listings = [(f"MR/{k}", Listing(0, [f"{i:06d}.png" for i in range(2000)], [])) for k in range(100)]
    (tmp_path / "index").mkdir()
    image_index._write(tmp_path / "index", tmp_path, iter(listings))
    index = ImageIndex(tmp_path / "index")
    last = index.path(len(index) - 1)
    assert (len(index), last) == (200_000, "MR/99/001999.png")
    assert isinstance(index._names, np.memmap)
    assert isinstance(index._ends, np.memmap)
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).path(2001) == "MR/1/000001.png"
    train, val = hold_out(index.starts, 0.02, 0)
    assert len(pickle.dumps((train, val))) < 20_000, "rows are ranges"
    assert len(train) + len(val) == 200_000


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), fraction=st.floats(0, 0.99), seed=st.integers(0, 2**63)
)
@settings(max_examples=60)
def test_held_out_are_runs_and_every_row_is_in_one_part(sizes, fraction, seed):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    train, val = hold_out(starts, fraction, seed)
    rows, held = [int(r) for r in train], [int(r) for r in val]
    assert sorted(rows + held) == list(range(starts[-1]))
    assert rows == sorted(rows)
    assert abs(len(held) - fraction * starts[-1]) <= 0.5 + 1e-9
    for first, last in pairwise(starts):
        inside = [row for row in held if first <= row < last]
        assert inside == list(range(inside[0], inside[0] + len(inside))) if inside else True


def test_ranges_may_be_empty():
    ranges = RowRanges(np.array([5, 9, 0]), np.array([2, 0, 1]))
    assert [int(row) for row in ranges] == [5, 6, 0]
    assert ranges[np.array([2, 0])].tolist() == [0, 5]
    with pytest.raises(IndexError, match="place 3"):
        ranges[3]


def test_places_have_names_of_their_own(tmp_path):
    assert index_name(tmp_path / "a") != index_name(tmp_path / "b")
    assert index_name(tmp_path / "a") == index_name(tmp_path / "b" / ".." / "a")
