from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.data import DatasetNotFoundError, FairSeg, InvalidSampleError
from fairdiff_lightning.data.fairseg import IMAGE_KEYS, MASK_KEYS


def write(path: Path, image_key="slo_fundus", mask_key="disc_cup_mask", size=(20, 26), **changes):
    height, width = size
    mask = np.zeros(size, dtype=np.int8)
    mask[5:15, 5:15], mask[8:12, 8:12] = -1, -2
    arrays = {image_key: np.arange(height * width).reshape(size) % 256, mask_key: mask, "race": 1, "gender": 0}
    arrays |= changes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


@pytest.mark.parametrize(("image_key", "mask_key"), list(zip(IMAGE_KEYS, MASK_KEYS, strict=True)))
@pytest.mark.parametrize("size", [(512, 664), (664, 798)])
def test_every_key_generation_and_size_reads(tmp_path, image_key, mask_key, size):
    write(tmp_path / "data_00001.npz", image_key, mask_key, size)
    (record,) = FairSeg().index(tmp_path).records
    image, mask = FairSeg().read_arrays(record)
    assert image.shape == mask.shape == size
    assert image.dtype == np.uint8
    assert image[0, 300] == 300 % 256
    assert np.bincount(mask.ravel()).tolist() == [size[0] * size[1] - 100, 84, 16]


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float64])
def test_signed_masks_of_any_type_read(tmp_path, dtype):
    write(
        tmp_path / "data_00001.npz", disc_cup_mask=np.array([[0, -1], [-2, 0]], dtype=dtype), slo_fundus=np.ones((2, 2))
    )
    (record,) = FairSeg().index(tmp_path).records
    assert FairSeg().read_arrays(record)[1].tolist() == [[0, 1], [2, 0]]


def races(root, **arguments):
    return [r.attributes["race"] for r in FairSeg(**arguments).index(root).records]


@pytest.mark.parametrize(
    ("codes", "groups"), [((0, 1, 2), [0, 1, 2]), ((2, 3, 7), [0, 1, 2]), ((1, 2, -1), [1, 2, -1])]
)
def test_race_codes_are_told_from_the_whole_folder(tmp_path, codes, groups):
    for i, code in enumerate(codes):
        write(tmp_path / f"data_{i:05d}.npz", race=code)
    assert races(tmp_path) == groups


def test_race_codes_that_cannot_be_told_ask_for_their_name(tmp_path):
    write(tmp_path / "data_00001.npz", race=2)
    with pytest.raises(InvalidSampleError, match=r"race codes \[2\] fit both"):
        races(tmp_path)
    assert races(tmp_path, race_codes="public") == [2]
    assert races(tmp_path, race_codes="fairdiff") == [0]
    write(tmp_path / "data_00002.npz", race=7)
    write(tmp_path / "data_00003.npz", race=1)
    with pytest.raises(InvalidSampleError, match=r"\[1, 2, 7\] fit no code set"):
        races(tmp_path)


def test_other_attributes_and_ages(tmp_path):
    write(tmp_path / "data_00001.npz", hispanic=1, language=-1, maritalstatus=4, age=45.0 * 365.25)
    write(tmp_path / "data_00002.npz", ethnicity=0, language=2, age=float("nan"))
    first, second = (r.attributes for r in FairSeg(age_bins=(40, 60)).index(tmp_path).records)
    assert first == {"race": 1, "gender": 0, "ethnicity": 1, "language": -1, "maritalstatus": 4, "age": 1}
    assert second == {"race": 1, "gender": 0, "ethnicity": 0, "language": 2, "maritalstatus": -1, "age": -1}
    write(tmp_path / "years" / "data_00001.npz", age=61)
    assert FairSeg().index(tmp_path / "years").records[0].attributes["age"] == 1
    assert FairSeg(age_bins=(40, 60)).attributes["age"].groups == ("<40", "40-59", ">=60")


def test_impossible_attributes_are_unknown_and_counted(tmp_path):
    write(tmp_path / "data_00001.npz", gender=5, age=-1)
    index = FairSeg().index(tmp_path)
    assert (index.records[0].attributes["gender"], index.records[0].attributes["age"]) == (-1, -1)
    assert index.left_out == {"values of 'gender' beyond its codes 0 to 1, taken as unknown": 1}


def test_files_that_the_official_lists_lack_are_left_out_and_counted(tmp_path):
    for number in (1, 2, 3):
        write(tmp_path / f"data_{number:05d}.npz")
    (tmp_path / "test.txt").write_text("data_00002.npz")
    index = FairSeg().index(tmp_path)
    assert [r.id for r in index.records] == ["data_00002"]
    assert index.left_out == {"files that neither train.txt nor test.txt lists": 2}
    (tmp_path / "test.txt").write_text("other.npz")
    with pytest.raises(DatasetNotFoundError, match="3 files, none of which"):
        FairSeg().index(tmp_path)


def test_official_lists_are_read_whatever_their_padding(tmp_path):
    for number in (1, 2, 30):
        write(tmp_path / f"data_{number:06d}.npz")
    (tmp_path / "train.txt").write_text("/somewhere/data_00001.npz\ndata_00030.npz")
    (tmp_path / "test.txt").write_text("data_00002.npz\n")
    assert [r.split for r in FairSeg().index(tmp_path).records] == ["train", "test", "train"]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_written_sample_reads_back(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("fairseg")
    height, width = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    dataset = FairSeg(age_bins=(40, 60))
    groups = {
        name: torch.tensor(data.draw(st.integers(-1, len(spec) - 1))) for name, spec in dataset.attributes.items()
    }
    sample = {
        "image": torch.from_numpy(random.integers(0, 256, (1, height, width))).float() / 255,
        "mask": torch.from_numpy(random.integers(0, 3, (1, height, width))),
        "attributes": groups,
        "id": "data_00007",
        "synthetic": torch.tensor(data.draw(st.booleans())),
        "source": "data_00003",
    }
    dataset.write(root, sample)
    again = FairSeg(age_bins=(40, 60), race_codes="fairdiff")  # what we write says its own code set
    (record,) = again.index(root).records
    read = again.read(record)
    assert record.source == "data_00003"
    assert np.array_equal(again.read_mask(record), again.read_arrays(record)[1])
    torch.testing.assert_close(read["image"], sample["image"])
    assert torch.equal(read["mask"], sample["mask"])
    assert {k: int(v) for k, v in read["attributes"].items()} == {k: int(v) for k, v in groups.items()}
    assert (read["id"], bool(read["synthetic"])) == (sample["id"], bool(sample["synthetic"]))
    assert [p.name for p in root.iterdir()] == ["data_00007.npz"], "no temporary file is left"


def test_missing_and_wrong_trees_say_what_is_expected(tmp_path):
    with pytest.raises(DatasetNotFoundError, match="no such folder") as error:
        FairSeg().index(tmp_path / "nowhere")
    assert all(word in str(error.value) for word in ("slo_fundus", "CC BY-NC-ND", "phantom"))
    (tmp_path / "readme.md").touch()
    with pytest.raises(DatasetNotFoundError, match=r"readme\.md"):
        FairSeg().index(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slo_fundus": None}, "one of slo_fundus, fundus_slo, fundus"),
        ({"disc_cup_mask": None}, "one of disc_cup_mask"),
        ({"slo_fundus": np.full((20, 26), np.nan)}, "NaN"),
        ({"slo_fundus": np.full((20, 26), 256.0)}, "256"),
        ({"slo_fundus": np.full((20, 26), -3)}, "-3"),
        ({"slo_fundus": np.zeros((20, 26, 3))}, r"\(20, 26, 3\)"),
        ({"slo_fundus": np.zeros((21, 26))}, r"\(21, 26\)"),
        ({"disc_cup_mask": np.full((20, 26), -3)}, r"\[-3\]"),
        ({"disc_cup_mask": np.full((20, 26), 255, dtype=np.uint8)}, "signed"),
        ({"slo_fundus": np.array([None] * 3)}, "pickl"),
    ],
)
def test_bad_arrays_name_file_key_and_value(tmp_path, changes, message):
    file = tmp_path / "data_00001.npz"
    write(file, **changes)
    (record,) = FairSeg().index(tmp_path).records
    with pytest.raises(InvalidSampleError, match=message) as error:
        FairSeg().read_arrays(record)
    assert str(file) in str(error.value)


def unreadable(root):
    index = FairSeg().index(root)
    assert not index.records
    (error,) = index.errors
    assert str(root) in str(error)
    return str(error)


def test_pickled_attributes_and_vectors_are_refused(tmp_path):
    write(tmp_path / "data_00001.npz", race=np.array({"race": 1}, dtype=object))
    assert "pickl" in unreadable(tmp_path)
    write(tmp_path / "data_00001.npz", race=np.arange(2))
    assert "[race]: an array of shape (2,)" in unreadable(tmp_path)
    write(tmp_path / "data_00001.npz", gender="F")
    assert "[gender]: 'F'. Expected a number" in unreadable(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.95])
def test_truncated_files_are_named(tmp_path, keep):
    file = tmp_path / "data_00001.npz"
    write(file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    assert "data_00001.npz: unreadable" in unreadable(tmp_path)


def test_predicted_masks_are_written_signed(tmp_path):
    path = FairSeg().write_mask(tmp_path, "data_00001", np.array([[0, 1, 2]], dtype=np.uint8))
    with np.load(path) as archive:
        assert archive["disc_cup_mask"].tolist() == [[0, -1, -2]]
