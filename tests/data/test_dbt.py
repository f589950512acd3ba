import csv

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from dicom_files import window_item, write_dicom
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fairdiff_lightning.data.dbt import DBT, TABLE, DBTDataModule, cut, patient_folds
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.sample import validate
from fairdiff_lightning.data.splits import split_records


def write_pair(root, stem="P001_L_CC", image=40, mask=None, size=(12, 17), folders=("img", "mask"), suffix=".png"):
    lesion = np.zeros(size, np.uint8)
    lesion[2:7, 4:11] = 255
    for folder, pixels in zip(folders, (np.full(size, image, np.uint8), lesion if mask is None else mask), strict=True):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / folder / f"{stem}{suffix}")


def sample(stem, grey=0.5, **more):
    mask = torch.zeros(1, 6, 9, dtype=torch.int64)
    mask[0, 1:4, 2:6] = 1
    return {"image": torch.full((1, 6, 9), grey), "mask": mask, "attributes": {}, "id": stem} | more


def index_of(root, **settings):
    return DBT(**settings).index(root)


def test_pairs_are_made_by_stem_and_not_by_order(tmp_path):
    write_pair(tmp_path, "P2_a", image=20, mask=np.full((12, 17), 255, np.uint8))
    write_pair(tmp_path, "P10_b", image=100, mask=np.zeros((12, 17), np.uint8))
    (tmp_path / "mask" / "P2_a.png").rename(tmp_path / "mask" / "P2_a.PNG")
    for extra in ("masked", "multi_mask"):
        write_pair(tmp_path, "P10_b", folders=(extra, extra))
    (tmp_path / "img" / "Thumbs.db").write_bytes(b"")
    arrays = {r.id: DBT().read_arrays(r) for r in index_of(tmp_path).records}
    assert {stem: (int(image[0, 0]), int(mask[0, 0])) for stem, (image, mask) in arrays.items()} == {
        "P2_a": (20, 1),
        "P10_b": (100, 0),
    }


def test_real_mammograms_with_jpeg_masks_read(realdata):
    root = realdata / "CDD-CESM_mini_512"
    data = DBTDataModule(str(root), attributes=("view", "laterality"), fold=0, check=True, image_size=(96, 64))
    data.prepare_data()
    data.setup()
    records = [record for part in data.splits.values() for record in part]
    assert len(records) == 12
    assert {r.unit for r in records if "P212" in r.id} == {"P212"}
    assert len({r.unit for r in records}) == 11
    for record in records:
        view, side = record.id.split("_")[-1], record.id.split("_")[2]
        assert record.attributes == {"view": ["CC", "MLO"].index(view), "laterality": "LR".index(side), "density": -1}
        image, mask = DBT().read_arrays(record)
        with Image.open(root / "masks" / f"{record.id}.jpg") as noisy:
            assert np.array_equal(mask, np.asarray(noisy.convert("L")) > 127)
        assert (image.shape, mask.any()) == ((512, 512), True)
    batch = next(iter(data.train_dataloader()))
    validate(batch, num_classes=2, attributes=data.attribute_specs, intensity_range=(0, 1), batched=True)
    assert batch["image"].shape[1:] == (1, 96, 64)


def test_a_mask_blurred_by_jpeg_is_restored_exactly(tmp_path):
    lesion = cv2.ellipse(np.zeros((512, 512), np.uint8), (230, 300), (53, 31), 20, 0, 360, 255, -1)
    Image.fromarray(lesion).save(tmp_path / "m.jpg", quality=75)
    noisy = np.asarray(Image.open(tmp_path / "m.jpg"))
    assert len(np.unique(noisy)) > 10
    assert np.array_equal(cut(noisy, "m.jpg"), lesion // 255)
    smooth = cv2.resize(cv2.resize(lesion, (96, 96), interpolation=cv2.INTER_AREA), (512, 512))
    assert cut(smooth, "resized").sum() == pytest.approx((lesion > 0).sum(), rel=0.02)


def test_masks_of_zeros_and_ones_and_empty_ones_are_taken_as_they_are():
    assert cut(np.eye(5, dtype=np.uint8), "m").sum() == 5
    assert cut(np.eye(5, dtype=np.int16) * 255, "m").sum() == 5
    assert not cut(np.zeros((4, 6), np.uint8), "m").any()


def test_grey_masks_that_no_threshold_explains_say_their_share():
    ternary = np.zeros((40, 50), np.uint8)
    ternary[5:35, 5:45], ternary[12:22, 10:30] = 127, 255  # 1200 pixels, 1000 of them grey, 64 of these by the outline
    outline = (14 * 24) - (10 * 20)
    with pytest.raises(InvalidSampleError, match=rf"{(1000 - outline) / 1200:.0%} of the pixels"):
        cut(ternary, "mask/P1.png")
    with pytest.raises(InvalidSampleError, match=r"mask/P1.png: 100% of the pixels"):
        cut(np.where(ternary, np.uint8(100), np.uint8(0)), "mask/P1.png")
    with pytest.raises(InvalidSampleError, match="mask values from 0 to 3"):
        cut(np.full((4, 4), 3, np.uint8) * np.eye(4, dtype=np.uint8), "m")
    with pytest.raises(InvalidSampleError, match="mask values from -1 to 0"):
        cut(-np.eye(4, dtype=np.int16), "m")


def test_dicom_images_and_masks_pair_with_other_formats(tmp_path):
    write_pair(tmp_path, "P1", folders=("images", "masks"))
    (tmp_path / "images" / "P1.png").unlink()
    ramp = np.linspace(0, 1023, 12 * 17).round().astype(np.uint16).reshape(1, 12, 17)
    write_dicom(tmp_path / "images" / "P1.dcm", ramp, SharedFunctionalGroupsSequence=[window_item(512, 1024)])
    write_dicom(tmp_path / "images" / "P2.dcm", ramp)
    write_dicom(tmp_path / "masks" / "P2.dcm", (ramp > 600).astype(np.uint16), bits=16)
    first, second = (DBT().read_arrays(record) for record in index_of(tmp_path).records)
    np.testing.assert_allclose(first[0], ramp[0] / 1023 * 255, atol=1)
    assert first[1].sum() == 35
    assert np.array_equal(second[1], ramp[0] > 600)


def test_unpaired_files_are_errors_that_name_them(tmp_path):
    for stem in ("P1", "P2", "P3"):
        write_pair(tmp_path, stem)
    (tmp_path / "img" / "P1.png").rename(tmp_path / "img" / "P9.png")
    index = index_of(tmp_path)
    assert [r.id for r in index.records] == ["P2", "P3"]
    messages = sorted(map(str, index.errors))
    assert "img/P9.png: no mask of the stem 'P9'" in messages[0]
    assert "mask/P1.png: no image of the stem 'P1'" in messages[1]
    data = DBTDataModule(str(tmp_path))
    data.prepare_data()
    with pytest.raises(InvalidSampleError, match="no image of the stem 'P1'"):
        data.setup()
    with pytest.warns(UserWarning, match="2 samples. Left out: 2 unreadable"):
        DBTDataModule(str(tmp_path), on_error="skip").setup()


def test_two_files_of_one_stem_are_an_error(tmp_path):
    write_pair(tmp_path, "P1")
    write_pair(tmp_path, "P1", suffix=".jpg", folders=("images", "mask"))
    (tmp_path / "mask" / "P1.jpg").unlink()
    (error,) = index_of(tmp_path).errors
    assert "has this stem too" in str(error)


def test_differing_sizes_and_damaged_files_are_named(tmp_path):
    write_pair(tmp_path, "P1", mask=np.zeros((17, 12), np.uint8))
    write_pair(tmp_path, "P2", size=(90, 90))
    write_pair(tmp_path, "P3")
    Image.fromarray(np.full((12, 17), 3000, np.uint16)).save(tmp_path / "img" / "P3.png")
    damaged = tmp_path / "mask" / "P2.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    errors = {}
    for record in index_of(tmp_path).records:
        with pytest.raises(InvalidSampleError) as error:
            DBT().read_arrays(record)
        errors[record.id] = str(error.value)
    assert "mask of size (17, 12) for an image of size (12, 17)" in errors["P1"]
    assert "mask/P2.png: unreadable" in errors["P2"]
    assert "more than 8 bits (I;16)" in errors["P3"]


def test_missing_and_empty_folders_say_what_is_expected(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"no such folder"):
        index_of(tmp_path / "nowhere")
    for folder in ("img", "mask"):
        (tmp_path / folder).mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"no image and no mask[\s\S]*img/<stem>.png"):
        index_of(tmp_path)


@pytest.mark.parametrize(
    ("stem", "patient", "groups"),
    [
        ("flipped_P207_L_CM_CC", "P207", (0, 0)),
        ("P001_rmlo_12", "P001", (1, 1)),
        ("DBT-P00013_DBT-S00163_rmlo1_016", "DBT-P00013", (1, 1)),
        ("P3", "P3", (-1, -1)),
        ("P3_right_lateral", "P3", (-1, -1)),
        ("XP3_mloc", "XP3_mloc", (-1, -1)),
    ],
)
def test_patient_view_and_side_are_taken_from_the_name(tmp_path, stem, patient, groups):
    write_pair(tmp_path, stem)
    index = index_of(tmp_path)
    (record,) = index.records
    assert (record.unit, record.attributes["view"], record.attributes["laterality"]) == (patient, *groups)
    assert (sum(index.left_out.values()) == 1) is (stem == patient and stem != "P3")


def test_a_pattern_of_ones_own_finds_the_patient(tmp_path):
    write_pair(tmp_path, "case12-007")
    write_pair(tmp_path, "case12-008")
    assert {r.unit for r in index_of(tmp_path, patient_pattern=r"case(\d+)-").records} == {"12"}
    assert {r.unit for r in index_of(tmp_path, patient_pattern=r"case\d+").records} == {"case12"}


def test_the_table_gives_patients_and_attributes(tmp_path):
    write_pair(tmp_path, "a_L_CC")
    write_pair(tmp_path, "P7_R")
    table = [("file", "patient", "view", "density", "site"), ("a_L_CC.png", "ann", "MLO", "", "south")]
    with (tmp_path / TABLE).open("w", newline="") as stream:
        csv.writer(stream).writerows([*table, ("P7_R", "eve", "", "D", "")])
    columns = {"density": ("A", "B", "C", "D"), "site": ("north", "south")}
    index = index_of(tmp_path, columns=columns)
    found = {r.id: (r.unit, *r.attributes.values()) for r in index.records}
    assert found == {"a_L_CC": ("ann", 1, 0, -1, 1), "P7_R": ("eve", -1, 1, 3, -1)}
    assert list(index.records[0].attributes) == ["view", "laterality", "density", "site"]
    assert (index.left_out, index.errors) == ({}, [])


def test_rows_without_their_file_are_errors_of_their_own(tmp_path):
    for patient in range(4):
        write_pair(tmp_path, f"P{patient}_L")
    (tmp_path / TABLE).write_text("file,patient\nP0_L,P0\nP1_l.png,P1\nP2_L,P2\ngone,P3\n")
    messages = list(map(str, index_of(tmp_path).errors))
    assert len(messages) == 2
    assert f"{TABLE}[file], row 3: no file 'P1_l'. Expected the name or stem of an image" in messages[0]
    assert f"{TABLE}[file], row 5: no file 'gone'" in messages[1]
    with pytest.raises(InvalidSampleError, match=r"row 3: no file 'P1_l'"):
        DBTDataModule(str(tmp_path)).setup()
    with pytest.warns(UserWarning, match="4 samples. Left out: 2 unreadable"):
        DBTDataModule(str(tmp_path), on_error="skip").setup()


def test_no_woman_is_a_patient_of_the_table_and_another_one_by_name(tmp_path):
    for stem in ("P207_L_CC", "P207_R_CC", "P208_L_CC", "left"):
        write_pair(tmp_path, stem)
    (tmp_path / TABLE).write_text("file,patient\nP207_L_CC,207\n")
    index = index_of(tmp_path)
    assert {r.id: r.unit for r in index.records} == {"P207_L_CC": "207", "left": "left"}
    assert len(index.errors) == 2
    message = r"patients.csv: no row for 'P207_R_CC', of 'P207' by its name, while 'P207_L_CC' is of '207' by the table"
    with pytest.raises(InvalidSampleError, match=message):
        DBTDataModule(str(tmp_path)).setup()
    (tmp_path / TABLE).write_text("file,patient\nP207_L_CC,P207\n")  # the names' own words: nobody is two
    index = index_of(tmp_path)
    assert ({r.unit for r in index.records}, index.errors) == ({"P207", "P208", "left"}, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,name\nP1,x\n", "columns"),
        ("file,patient\nP1,x\nP1.png,y\n", "'P1' twice"),
        ("file,patient\nP1,\n", r"\[patient\], row 2: nothing"),
        ("file,patient,density\nP1,x,A\nP2,y,E\n", r"\[density\], row 3: density 'E'"),
        ("", "unreadable"),
    ],
)
def test_bad_tables_name_the_column_and_value(tmp_path, text, message):
    write_pair(tmp_path, "P1")
    (tmp_path / TABLE).write_text(text)
    with pytest.raises(InvalidSampleError, match=message):
        index_of(tmp_path)


def test_five_folds_hold_every_patient_out_once(tmp_path):
    for patient in range(13):
        for slice_ in range(1 + patient % 3):
            write_pair(tmp_path, f"P{patient:03d}_{slice_}")
    tested = []
    for fold in range(5):
        records = index_of(tmp_path, fold=fold).records
        splits = split_records(records, (0.8, 0.1, 0.1), 0)
        patients = {part: {r.unit for r in found} for part, found in splits.items()}
        assert all(patients.values())
        assert sum(map(len, patients.values())) == 13, "no patient stands in two parts"
        assert len(patients["test"]) in (2, 3)
        assert index_of(tmp_path, fold=fold).records == records
        tested += [r.id for r in splits["test"]]
    assert sorted(tested) == sorted(r.id for r in index_of(tmp_path).records)
    held_out = [{r.unit for r in index_of(tmp_path, fold=0, split_seed=s).records if r.split} for s in range(3)]
    assert held_out[0] != held_out[1] or held_out[1] != held_out[2]


@settings(max_examples=25, deadline=None)
@given(st.sets(st.text(min_size=1), min_size=3, max_size=20), st.integers(2, 3), st.randoms())
def test_folds_depend_on_the_patients_alone(patients, num_folds, random):
    order = list(patients) * 2
    random.shuffle(order)
    folds = patient_folds(order, num_folds, seed=1)
    assert folds == patient_folds(patients, num_folds, seed=1)
    sizes = np.bincount(list(folds.values()), minlength=num_folds)
    assert sizes.sum() == len(patients)
    assert sizes.max() - sizes.min() <= 1


def test_impossible_folds_are_refused(tmp_path):
    assert (DBTDataModule().num_folds, DBTDataModule(num_folds=3).num_folds) == (5, 3)
    with pytest.raises(ValueError, match="fold=5 with num_folds=5"):
        DBTDataModule(fold=5)
    write_pair(tmp_path, "P1")
    with pytest.raises(ValueError, match="num_folds=5 for 1 patients"):
        index_of(tmp_path, fold=0)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_written_sample_reads_back(tmp_path_factory, data):
    root, dataset = tmp_path_factory.mktemp("dbt"), DBT()
    size = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    draws = np.random.default_rng(data.draw(st.integers(0, 999)))
    synthetic, source = data.draw(st.booleans()), data.draw(st.sampled_from(["", "P3_R_CC", "Zoë_ﬁ"]))
    written = {
        "image": torch.from_numpy(draws.integers(0, 256, (1, *size))).float() / 255,
        "mask": torch.from_numpy(draws.integers(0, 2, (1, *size))),
        "attributes": {n: torch.tensor(data.draw(st.integers(-1, len(s) - 1))) for n, s in dataset.attributes.items()},
        "id": "synthetic_MLO_00001",
        "synthetic": torch.tensor(synthetic),
        "source": source,
    }
    dataset.write(root, written)
    index = dataset.index(root)
    (record,) = index.records
    read = dataset.read(record)
    assert (index.errors, record.synthetic, record.source or "") == ([], synthetic, source)
    assert torch.equal(read["image"], written["image"])
    assert torch.equal(read["mask"], written["mask"])
    assert read["attributes"] == written["attributes"]


def test_generated_pairs_join_the_training_set_in_the_ratios_of_the_paper(tmp_path):
    real, made = tmp_path / "real", [tmp_path / f"made{k}" for k in range(3)]
    for patient in range(10):
        write_pair(real, f"P{patient:03d}_L_CC")
    for folder in made:
        for k in range(4):
            DBT().write(folder, sample(f"synthetic_CC_{k:05d}", synthetic=torch.tensor(True)))
    for count in range(4):
        data = DBTDataModule(str(real), fold=1, image_size=None, synthetic=list(map(str, made[:count])))
        data.setup()
        sizes = {
            part: [sum(r.synthetic == s for r in records) for s in (0, 1)] for part, records in data.splits.items()
        }
        assert sizes == {"train": [7, 4 * count], "val": [1, 0], "test": [2, 0]}


def test_pairs_derived_from_a_held_out_slice_are_refused(tmp_path):
    for patient in range(10):
        write_pair(tmp_path / "real", f"P{patient:03d}")
    held_out = next(r.id for r in index_of(tmp_path / "real", fold=0).records if r.split == "test")
    DBT().write(tmp_path / "made", sample("s1", synthetic=torch.tensor(True), source=held_out))
    with pytest.raises(ValueError, match=f"derived from the validation or test case '{held_out}'"):
        DBTDataModule(str(tmp_path / "real"), fold=0, synthetic=[str(tmp_path / "made")]).setup()


def test_the_phantom_hides_masses_in_dense_breasts(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path))
    data = DBTDataModule(attributes=("density", "view"), image_size=None, check=True, seed=0)
    data.prepare_data()
    data.setup()
    counts = {part: groups["density"] for part, groups in data.counts().items()}
    assert sum(map(sum, ({**c}.values() for c in counts.values()))) == 120
    assert [sum(c[d] for c in counts.values()) for d in "ABCD"] == [12, 48, 48, 12]
    contrast = {0: [], 1: [], 2: [], 3: []}
    for record in (r for part in data.splits.values() for r in part):
        image, mask = data.dataset.read_arrays(record)
        around = cv2.dilate(mask, np.ones((9, 9), np.uint8)) > mask
        contrast[record.attributes["density"]].append(image[mask > 0].mean() - image[around].mean())
        assert 0.003 < mask.mean() < 0.06
        assert image[:, -1].mean() > image[:, 0].mean() + 30, "the chest wall is at the right edge"
    means = [np.mean(contrast[density]) for density in range(4)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 3 * means[3] > 0
    batch = next(iter(data.train_dataloader()))
    validate(batch, num_classes=2, attributes=data.attribute_specs, intensity_range=(0, 1), batched=True)
    assert set(pd.read_csv(data.folder / TABLE)["density"]) == set("ABCD")
