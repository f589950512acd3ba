import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fairdiff_lightning.data import (
    HAM10000,
    DatasetNotFoundError,
    HAM10000DataModule,
    InvalidSampleError,
    Record,
    split_units,
)
from fairdiff_lightning.data.ham10000 import METADATA
from fairdiff_lightning.data.native import bin_index
from fairdiff_lightning.data.splits import split_records


def write_case(root, name="ISIC_0000001", mask=None, size=(9, 12), **row):
    for folder in ("HAM10000_images_part_1", "HAM10000_segmentations_lesion_tschandl"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(root / "HAM10000_images_part_1" / f"{name}.jpg")
    mask = np.eye(*size, dtype=np.uint8) * 255 if mask is None else mask
    Image.fromarray(mask).save(root / "HAM10000_segmentations_lesion_tschandl" / f"{name}_segmentation.png")
    values = {"lesion_id": "HAM_1", "image_id": name, "age": 45.0, "sex": "male", "localization": "back"} | row
    table = pd.DataFrame([values])
    if (root / METADATA).is_file():
        table = pd.concat([pd.read_csv(root / METADATA), table])
    table.to_csv(root / METADATA, index=False)


@pytest.mark.parametrize(
    ("drop_unknown_sex", "entry"), [(False, "split_age_known_9958"), (True, "split_age_and_sex_known_9948")]
)
def test_public_metadata_splits_as_medfair(realdata, reference, drop_unknown_sex, entry):
    expected = reference("dmoe")["K1_ham10000_counts"]
    table = HAM10000().read_table(realdata / "HAM10000" / METADATA)
    assert (len(table), table["lesion_id"].nunique(), int(table["age"].isna().sum())) == (
        expected["rows"],
        expected["lesions"],
        expected["age_missing"],
    )
    known = table[table["age"].notna() & ((table["sex"] != "unknown") | (not drop_unknown_sex))]
    parts = split_units(known["lesion_id"], (0.8, 0.1, 0.1), seed=0)
    groups = known["age"].map(lambda age: bin_index(age, (20, 40, 60, 80)))
    for part in ("train", "val", "test"):
        chosen = groups[known["lesion_id"].map(parts) == part]
        counts = np.bincount(chosen, minlength=5).tolist()
        assert [len(chosen), counts] == expected[entry][part]


def test_images_of_known_age_split_as_medfair_whatever_is_filtered(realdata, reference):
    table = HAM10000().read_table(realdata / "HAM10000" / METADATA)
    ages = [bin_index(age, HAM10000().age_bins) for age in table["age"]]
    records = [
        Record(name, {}, {"age": age}, lesion)
        for name, age, lesion in zip(table["image_id"], ages, table["lesion_id"], strict=True)
    ]
    splits = split_records(records, (0.8, 0.1, 0.1), seed=0, drawn_over=HAM10000.drawn_over)
    assert sum(map(len, splits.values())) == 10015
    for part, found in splits.items():
        known = [r.attributes["age"] for r in found if r.attributes["age"] >= 0]
        counts = np.bincount(known, minlength=5).tolist()
        assert [len(known), counts] == reference("dmoe")["K1_ham10000_counts"]["split_age_known_9958"][part]


def test_real_files_read_and_the_rest_is_counted(realdata):
    index = HAM10000().index(realdata / "HAM10000")
    assert len(index.records) == 3
    assert index.left_out == {"rows of the table without an image": 10007, "images without a mask": 5}
    for record in index.records:
        image, mask = HAM10000().read_arrays(record)
        assert (image.shape, mask.shape) == ((450, 600, 3), (450, 600))
        with Image.open(record.files["mask"]) as file:
            assert np.array_equal(mask, np.asarray(file) // 255)


def test_splits_never_cut_a_lesion(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path))
    data = HAM10000DataModule(image_size=32)
    data.prepare_data()
    data.setup()
    lesions = {part: {r.unit for r in records} for part, records in data.splits.items()}
    assert all(lesions.values())
    assert not lesions["train"] & lesions["val"]
    assert not lesions["train"] & lesions["test"]
    assert not lesions["val"] & lesions["test"]
    assert max(len(r) for r in data.splits.values()) > max(len(u) for u in lesions.values()), "some lesions repeat"


def test_attributes_of_a_row(tmp_path):
    write_case(tmp_path, "ISIC_1", age=19.0, sex="female", localization="foot")
    write_case(tmp_path, "ISIC_2", age=np.nan, sex="unknown", localization="unknown")
    write_case(tmp_path, "ISIC_3", age=85.0)
    found = [r.attributes for r in HAM10000().index(tmp_path).records]
    assert found[0] == {"age": 0, "sex": 0, "localization": 9}
    assert found[1] == {"age": -1, "sex": -1, "localization": -1}
    assert found[2]["age"] == 4
    assert HAM10000().attributes["age"].groups == ("<20", "20-39", "40-59", "60-79", ">=80")


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_written_sample_reads_back(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("ham")
    dataset = HAM10000()
    size = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    groups = {n: torch.tensor(data.draw(st.integers(-1, len(s) - 1))) for n, s in dataset.attributes.items()}
    grey = data.draw(st.integers(0, 255))
    sample = {
        "image": torch.full((3, *size), grey / 255),
        "mask": torch.from_numpy(np.random.default_rng(grey).integers(0, 2, (1, *size))),
        "attributes": groups,
        "id": "ISIC_7",
        "synthetic": torch.tensor(bool(grey % 2)),
        "source": "ISIC_3",
    }
    dataset.write(root, sample)
    index = dataset.index(root)
    read = dataset.read(index.records[0])
    assert index.left_out == {}
    assert (index.records[0].synthetic, index.records[0].source) == (bool(grey % 2), "ISIC_3")
    torch.testing.assert_close(read["image"], sample["image"], atol=2 / 255, rtol=0)
    assert torch.equal(read["mask"], sample["mask"])
    assert {k: int(v) for k, v in read["attributes"].items()} == {k: int(v) for k, v in groups.items()}


def test_writing_again_replaces_the_sample_and_keeps_one_row(tmp_path):
    for grey in (0.2, 0.8):
        image = torch.full((3, 4, 6), grey)
        HAM10000().write(tmp_path, {"image": image, "mask": torch.ones(1, 4, 6), "attributes": {}, "id": "ISIC_1"})
    (record,) = HAM10000().index(tmp_path).records
    assert HAM10000().read_arrays(record)[0].mean() == pytest.approx(0.8 * 255, abs=2)


def test_missing_and_wrong_trees_say_what_is_expected(tmp_path):
    with pytest.raises(DatasetNotFoundError, match="DBW86T"):
        HAM10000().index(tmp_path / "nowhere")
    with pytest.raises(DatasetNotFoundError, match=f"no {METADATA}"):
        HAM10000().index(tmp_path)
    write_case(tmp_path)
    (tmp_path / "HAM10000_images_part_1").rename(tmp_path / "pictures")
    with pytest.raises(DatasetNotFoundError, match="1 rows, 0 images and 1 masks"):
        HAM10000().index(tmp_path)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"mask": np.full((9, 12), 7, np.uint8)}, r"mask values \[7\]"),
        ({"mask": np.zeros((8, 12), np.uint8)}, r"\(8, 12\).*\(9, 12\)"),
    ],
)
def test_bad_masks_are_named(tmp_path, case, message):
    write_case(tmp_path, **case)
    (record,) = HAM10000().index(tmp_path).records
    with pytest.raises(InvalidSampleError, match=message):
        HAM10000().read_arrays(record)


def test_truncated_images_are_named(tmp_path):
    write_case(tmp_path, size=(90, 120))
    file = tmp_path / "HAM10000_images_part_1" / "ISIC_0000001.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    (record,) = HAM10000().index(tmp_path).records
    with pytest.raises(InvalidSampleError, match=r"ISIC_0000001.jpg: unreadable"):
        HAM10000().read_arrays(record)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,age\na,3\n", "columns"),
        ("lesion_id,image_id,age,sex,localization\nl,a,old,male,back\n", r"row 2: 'old'"),
        ("lesion_id,image_id,age,sex,localization\nl,a,3,male,back\nl,a,3,male,back\n", "'a' twice"),
        ("", "unreadable"),
    ],
)
def test_bad_tables_name_the_column_and_value(tmp_path, text, message):
    (tmp_path / METADATA).write_text(text)
    with pytest.raises(InvalidSampleError, match=message):
        HAM10000().index(tmp_path)
