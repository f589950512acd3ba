import csv

import numpy as np
import pandas as pd
import pytest
import torch
from dicom_files import encode, window_item, write_dicom
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLosslessSV1, RLELossless

from fairdiff_lightning.data import bcs_dbt
from fairdiff_lightning.data.bcs_dbt import BCSDBT, BCSDBTDataModule, turn_to
from fairdiff_lightning.data.dicom import read_frame
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.sample import validate

SIZE = (23, 31)
KEY = {"PatientID": "DBT-P00001", "StudyUID": "DBT-S00001", "View": "rcc"}
FILE = "Breast-Cancer-Screening-DBT/DBT-P00001/01-01-2000-DBT-S00001-MAMMO 1/2.000-3/1-1.dcm"
LOSSLESS = [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless]


def frames(count=4, bits=10, size=SIZE):
    return np.random.default_rng(bits).integers(0, 2**bits, (count, *size)).astype(np.uint16)


def windowed(values, center, width):
    """DICOM PS3.3, C.11.2.1.2.1, to 255."""
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1) * 255


def box(slice_=1, x=5, y=3, width=7, height=4, depth=4, **more):
    facts = {"Subject": 0, "Slice": slice_, "X": x, "Y": y, "Width": width, "Height": height}
    return KEY | facts | {"Class": "benign", "AD": 0, "VolumeSlices": depth} | more


def write_tables(root, *boxes, part="train", labels=None, file=FILE):
    pd.DataFrame(list(boxes)).to_csv(root / f"BCS-DBT boxes-{part}-v2.csv", index=False)
    keys = pd.DataFrame(list(boxes))[list(KEY)].drop_duplicates()
    paths = keys.assign(descriptive_path=file, classic_path="elsewhere/1-1.dcm")
    paths.to_csv(root / f"BCS-DBT file-paths-{part}-v2.csv", index=False)
    if labels:
        pd.DataFrame(labels).to_csv(root / f"BCS-DBT labels-{part}-v2.csv", index=False)


def breast(side, count=4, size=SIZE):
    """A volume that is bright at its chest wall, in its upper half and in one spot, as seen from the side."""
    volume = np.zeros((count, *size), np.uint16)
    volume[:, :, -9:] = 400
    volume[:, : size[0] // 2, -9:] += 100
    volume[:, 3:7, 5:12] = 900
    return volume if side == "R" else volume[:, :, ::-1]


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_frames_are_windowed_as_the_authors_of_the_set_do(tmp_path, syntax, bits):
    stored, (center, width) = frames(bits=bits), (0.45 * 2**bits, 0.5 * 2**bits)
    groups = [window_item(center, width)]
    path = write_dicom(tmp_path / "v.dcm", stored, bits, syntax, SharedFunctionalGroupsSequence=groups)
    for index in (0, 3):
        expected = np.clip((stored[index] - (center - width / 2)) / width, 0, 1) * 255
        found = read_frame(path, index)
        assert (found.shape, found.dtype) == (SIZE, np.uint8)
        np.testing.assert_allclose(found, expected, atol=1)
        assert found.min() == 0
        assert found.max() == 255


def test_baseline_jpeg_reads_within_its_loss(tmp_path):
    ramp = np.add.outer(np.arange(23), np.arange(31) * 4).astype(np.uint8)[None]
    path = write_dicom(tmp_path / "v.dcm", ramp, 8, JPEGBaseline8Bit)
    np.testing.assert_allclose(read_frame(path), ramp[0], atol=3)


def test_only_the_frame_that_is_asked_for_is_decoded(tmp_path):
    stored = frames()
    good = encode(stored[2], JPEG2000Lossless)
    path = write_dicom(tmp_path / "v.dcm", stored, 10, JPEG2000Lossless, [b"broken" * 20, b"x" * 40, good, good[:90]])
    np.testing.assert_allclose(read_frame(path, 2), stored[2] / 1023 * 255, atol=0.5)
    with pytest.raises(InvalidSampleError, match=r"v.dcm: pixels unreadable"):
        read_frame(path, 0)


def test_a_frames_own_window_comes_before_the_volumes(tmp_path):
    stored = frames(3)
    own = [window_item(100, 100), window_item(500, 300), window_item(900, 100)]
    tags = {"SharedFunctionalGroupsSequence": [window_item(1, 2)], "PerFrameFunctionalGroupsSequence": own}
    path = write_dicom(tmp_path / "v.dcm", stored, WindowCenter=7, WindowWidth=9, **tags)
    np.testing.assert_allclose(read_frame(path, 1), windowed(stored[1], 500, 300), atol=0.51)


def test_windows_at_the_top_with_several_values_use_the_first(tmp_path):
    stored = frames(1)
    path = write_dicom(tmp_path / "v.dcm", stored, WindowCenter=[500, 9], WindowWidth=[300, 9])
    np.testing.assert_allclose(read_frame(path), windowed(stored[0], 500, 300), atol=0.51)


def test_signed_and_rescaled_pixels_are_windowed_after_rescaling(tmp_path):
    stored = (frames(1).astype(np.int16) - 512)[:, :, ::-1]
    tags = {"RescaleSlope": 2, "RescaleIntercept": 100, "WindowCenter": 300, "WindowWidth": 800}
    path = write_dicom(tmp_path / "v.dcm", np.ascontiguousarray(stored), **tags)
    np.testing.assert_allclose(read_frame(path), windowed(stored[0] * 2.0 + 100, 300, 800), atol=0.51)


def test_a_look_up_table_is_applied(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [1024, 0, 12]
    table.LUTData = (4095 - 4 * np.arange(1024)).astype("<u2").tobytes()
    stored = frames(1)
    path = write_dicom(tmp_path / "v.dcm", stored, VOILUTSequence=Sequence([table]))
    np.testing.assert_allclose(read_frame(path), (4095 - 4.0 * stored[0]) / 4095 * 255, atol=0.51)


def test_monochrome1_is_inverted(tmp_path):
    stored, groups = frames(2), [window_item(500, 300)]
    tags = {"SharedFunctionalGroupsSequence": groups}
    white, dark = (
        read_frame(write_dicom(tmp_path / f"{kind}.dcm", stored, PhotometricInterpretation=kind, **tags), 1)
        for kind in ("MONOCHROME2", "MONOCHROME1")
    )
    assert np.array_equal(dark, 255 - white)


def test_files_without_a_window_keep_the_range_of_their_bits(tmp_path):
    stored = frames(2)
    stored[1] //= 8
    path = write_dicom(tmp_path / "v.dcm", stored, bits=10)
    np.testing.assert_allclose(read_frame(path, 1), stored[1] / 1023 * 255, atol=0.5)


@pytest.mark.parametrize(
    ("tags", "index", "message"),
    [
        ({"PixelData": None}, 0, "no pixel data"),
        ({"Rows": None, "PixelData": None}, 0, "no pixel data, nor Rows"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, 0, "PALETTE COLOR pixels"),
        ({}, 4, "4 frames, so no slice 4"),
        ({}, None, "4 frames. Expected one slice"),
        ({"WindowCenter": 5, "WindowWidth": 0}, 0, "Window Width"),
        ({"NumberOfFrames": 9}, 8, "pixels unreadable"),
    ],
)
def test_bad_dicom_files_are_named(tmp_path, tags, index, message):
    path = write_dicom(tmp_path / "v.dcm", frames(), **tags)
    with pytest.raises(InvalidSampleError, match=rf"v.dcm: .*{message}"):
        read_frame(path, index)


def test_files_that_are_no_dicom_are_named(tmp_path):
    (tmp_path / "v.dcm").write_bytes(b"PNG" * 100)
    for name in ("v.dcm", "absent.dcm"):
        with pytest.raises(InvalidSampleError, match=f"{name}: unreadable"):
            read_frame(tmp_path / name)


@pytest.mark.skipif(get_decoder(JPEGLosslessSV1).is_available, reason="a decoder of lossless JPEG is installed")
def test_a_missing_decoder_names_the_packages(tmp_path):
    path = write_dicom(tmp_path / "v.dcm", frames(1), 10, JPEGLosslessSV1, [b"\xff\xd8\xff\xc3" * 8])
    with pytest.raises(InvalidSampleError, match=r"JPEG Lossless.*pip install pylibjpeg pylibjpeg-libjpeg"):
        read_frame(path)


@pytest.mark.parametrize("view", ["rcc", "lcc", "rmlo1", "lmlo"])
@pytest.mark.parametrize("stored_as", ["shown", "turned"])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_the_box_lies_on_its_lesion_however_the_volume_is_stored(tmp_path, view, stored_as, photometric):
    side = view[0].upper()
    seen = breast(side)
    stored = seen[:, ::-1, ::-1] if stored_as == "turned" else seen
    stored = 1023 - stored if photometric == "MONOCHROME1" else stored
    write_dicom(tmp_path / FILE, np.ascontiguousarray(stored), PhotometricInterpretation=photometric)
    write_tables(tmp_path, box(x=5 if side == "R" else SIZE[1] - 12, View=view))
    (record,) = BCSDBT().index(tmp_path).records
    image, mask = BCSDBT().read_arrays(record)
    assert np.array_equal(mask, seen[1] == 900)
    np.testing.assert_allclose(image, seen[1] / 1023 * 255, atol=1)
    assert record.attributes["diagnosis"] == -1, "there is no table of labels"
    assert record.attributes["laterality"] == "LR".index(side)
    assert record.attributes["view"] == ["CC", "MLO"].index(view[1:].rstrip("1").upper())


def test_turning_is_half_a_turn_decided_by_the_brighter_edge():
    image = np.array([[0, 1, 9], [0, 2, 9]], np.uint8)
    assert np.array_equal(turn_to(image, "R"), image)
    assert np.array_equal(turn_to(image, "L"), [[9, 2, 0], [9, 1, 0]])


def test_slices_around_the_boxes_are_chosen_and_boxes_of_one_slice_joined(tmp_path):
    write_dicom(tmp_path / "manifest-1617" / FILE, frames())
    write_tables(tmp_path, box(1), box(1, x=20, y=10, AD=1), box(3, x=0, y=0, width=2, height=2))
    masks = {}
    for offsets in ((0,), (-1, 0, 1)):
        dataset = BCSDBT(offsets)
        records = dataset.index(tmp_path).records
        masks[offsets] = {r.slice: int(dataset.read_mask(r).sum()) for r in records}
        assert [r.id for r in records] == [f"DBT-P00001_DBT-S00001_rcc_{r.slice:03d}" for r in records]
        assert {r.slice: r.attributes["distortion"] for r in records}[3] == 0
        assert {r.unit for r in records} == {"DBT-P00001"}
    assert masks == {(0,): {1: 56, 3: 4}, (-1, 0, 1): {0: 56, 1: 56, 2: 60, 3: 4}}


def test_rows_without_a_file_are_counted_and_none_at_all_is_an_error(tmp_path):
    other = {"PatientID": "DBT-P00002"}
    write_tables(tmp_path, box(), box(2), box(**other))
    with pytest.raises(DatasetNotFoundError, match=r"3 rows in 1 tables of boxes; 3 rows of the boxes without a file"):
        BCSDBT().index(tmp_path)
    paths = pd.read_csv(tmp_path / "BCS-DBT file-paths-train-v2.csv")
    paths[paths["PatientID"] == "DBT-P00001"].to_csv(tmp_path / "BCS-DBT file-paths-train-v2.csv", index=False)
    write_dicom(tmp_path / FILE, frames())
    index = BCSDBT().index(tmp_path)
    assert ([r.slice for r in index.records], index.left_out) == ([1, 2], {"rows of the boxes without a path": 1})
    with pytest.raises(DatasetNotFoundError, match=r"no image and no mask"):
        BCSDBT().index(tmp_path / "Breast-Cancer-Screening-DBT")


def test_boxes_beyond_the_image_and_slices_beyond_the_volume_are_named(tmp_path):
    write_dicom(tmp_path / FILE, frames())
    write_tables(tmp_path, box(1, x=25), box(6, depth=9))
    wide, deep = BCSDBT().index(tmp_path).records
    with pytest.raises(InvalidSampleError, match=r"columns 25 to 32 and rows 3 to 7.*the 31 columns and 23 rows"):
        BCSDBT().read_arrays(wide)
    with pytest.raises(
        InvalidSampleError, match=r"\[VolumeSlices\], .*_006: 9\. Expected 4, the frames of '.*1-1\.dcm'"
    ):
        BCSDBT().read_arrays(deep)


@pytest.mark.parametrize(("depths", "found"), [((50, 50), "50"), ((4, 50), "4 and 50")])
def test_a_volume_of_another_depth_than_its_boxes_were_drawn_in_is_refused(tmp_path, depths, found):
    write_dicom(tmp_path / FILE, frames(5))
    write_tables(tmp_path, *(box(2, depth=depth) for depth in depths))
    (record,) = BCSDBT().index(tmp_path).records
    for read in (BCSDBT().read_arrays, BCSDBT().read_mask):
        with pytest.raises(InvalidSampleError, match=rf"train-v2\.csv\[VolumeSlices\], .*_002: {found}\. Expected 5"):
            read(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": -1}, r"\[X\], row 3: '-1'"),
        ({"Width": 0}, r"\[Width\], row 3"),
        ({"Slice": 1.5}, r"\[Slice\], row 3: '1.5'"),
        ({"Slice": 4}, r"\[Slice\], row 3: .*below the row's VolumeSlices"),
        ({"View": "axial"}, r"\[View\], row 3: 'axial'"),
    ],
)
def test_bad_rows_of_boxes_are_named(tmp_path, change, message):
    write_tables(tmp_path, box(), box(**change))
    with pytest.raises(InvalidSampleError, match=message):
        BCSDBT().index(tmp_path)


def test_tables_without_their_columns_are_named(tmp_path):
    write_tables(tmp_path, box(), labels=[KEY | {"Normal": 0, "Actionable": 1, "Benign": 1, "Cancer": 0}])
    with pytest.raises(InvalidSampleError, match=r"labels-train-v2.csv\[Normal\], row 2"):
        BCSDBT().index(tmp_path)
    (tmp_path / "BCS-DBT file-paths-train-v2.csv").write_text("PatientID,StudyUID,View\n")
    with pytest.raises(InvalidSampleError, match="descriptive_path or classic_path"):
        BCSDBT().index(tmp_path)
    (tmp_path / "BCS-DBT boxes-train-v2.csv").write_text("PatientID,StudyUID\n")
    (tmp_path / "BCS-DBT file-paths-train-v2.csv").unlink()
    (tmp_path / "BCS-DBT labels-train-v2.csv").unlink()
    with pytest.raises(InvalidSampleError, match="View, Slice, X"):
        BCSDBT().index(tmp_path)


def write_parts(root, **parts):
    """The owner's tables of each part, each with a slice of its own of a volume that all rows have."""
    names = {"train": "train", "validation": "validation-PHASE-2-Jan-2024", "test": "test-PHASE-2"}  # as of 2024
    for number, (part, patients) in enumerate(parts.items()):
        keys = [{"PatientID": f"DBT-P{p:05d}"} for p in patients]
        labels = [KEY | key | {"Normal": 0, "Actionable": 0, "Benign": 0, "Cancer": 1} for key in keys]
        write_tables(root, *(box(number, **key) for key in keys), part=names[part], labels=labels)
    write_dicom(root / FILE, frames())


def patients_of(root, **settings):
    data = BCSDBTDataModule(str(root), attributes=["diagnosis"], **settings)
    data.setup()
    return {part: sorted(int(r.unit[-5:]) for r in records) for part, records in data.splits.items()}


def test_the_official_test_tables_stay_the_test_split(tmp_path):
    write_parts(tmp_path, train=range(1, 12), test=range(12, 14))
    data = BCSDBTDataModule(str(tmp_path), attributes=["diagnosis"])
    data.setup()
    assert {r.unit for r in data.splits["test"]} == {"DBT-P00012", "DBT-P00013"}
    assert [len(data.splits[part]) for part in ("train", "val", "test")] == [9, 2, 2]
    assert {r.attributes["diagnosis"] for r in data.splits["train"]} == {3}


def test_every_case_stands_in_the_split_that_the_owners_tables_name(tmp_path):
    parts = {"train": range(1, 12), "validation": range(12, 16), "test": range(16, 18)}
    write_parts(tmp_path, **parts)
    found = patients_of(tmp_path)
    assert found == {"train": [*range(1, 12)], "val": [*range(12, 16)], "test": [16, 17]}
    assert found == patients_of(tmp_path, fractions=(0.4, 0.3, 0.3), split_seed=5)
    assert len(patients_of(tmp_path, fractions=(0, 0, 1))["test"]) == 17, "all of it, to test what others trained"


def test_without_test_tables_the_test_split_is_drawn_from_the_training_cases(tmp_path):
    write_parts(tmp_path, train=range(1, 12), validation=range(12, 16))
    found = patients_of(tmp_path, fractions=(0.7, 0.1, 0.2))
    assert found["val"] == [*range(12, 16)]
    assert len(found["test"]) == 3
    assert sorted(found["train"] + found["test"]) == [*range(1, 12)]


@pytest.mark.parametrize(("test", "held_out"), [([], "test"), ([16, 17], "val")])
def test_five_folds_divide_the_training_and_validation_cases(tmp_path, test, held_out):
    write_parts(tmp_path, train=range(1, 12), validation=range(12, 16), **({"test": test} if test else {}))
    folds = [patients_of(tmp_path, fold=fold) for fold in range(5)]
    assert sorted(patient for fold in folds for patient in fold[held_out]) == [*range(1, 16)]
    assert [len(fold[held_out]) for fold in folds] == [3] * 5
    assert all(fold["test"] == test for fold in folds) or not test
    with pytest.raises(ValueError, match="fold=5 of k=5"):
        patients_of(tmp_path, fold=5)


@pytest.mark.parametrize("parts", [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_a_patient_in_two_of_the_owners_tables_is_refused(tmp_path, parts):
    patients = {"train": [*range(1, 6)], "validation": [6, 7], "test": [8, 9]}
    patients[parts[0]].append(patients[parts[1]][0])
    write_parts(tmp_path, **patients)
    with pytest.raises(ValueError, match=rf"unit 'DBT-P0000{patients[parts[1]][0]}' stands in both"):
        patients_of(tmp_path)


def test_public_tables_are_read_with_a_volume_at_its_public_path(tmp_path, realdata):
    tables = realdata / "BCS-DBT"
    for table in tables.glob("*.csv"):
        (tmp_path / table.name).symlink_to(table)
    with (tables / "boxes_with_paths-train-v2.derived.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    first = rows[0]
    size = (2457, 1996)
    bright = np.zeros(size, np.uint16)
    bright[:, -300:] = 500
    coded = [encode(np.zeros((8, 8), np.uint16), JPEG2000Lossless)] * int(first["VolumeSlices"])
    coded[int(first["Slice"])] = encode(bright, JPEG2000Lossless)
    stored = np.broadcast_to(bright, (len(coded), *size))
    write_dicom(tmp_path / first["classic_path"], stored, 10, JPEG2000Lossless, coded)
    dataset = BCSDBT()
    index = dataset.index(tmp_path)
    (record,) = index.records
    assert index.left_out == {"rows of the boxes without a file": len(rows) - 1}
    assert (len(rows), record.id, record.unit) == (224, "DBT-P00013_DBT-S00163_rmlo_016", "DBT-P00013")
    assert record.attributes == {"view": 1, "laterality": 1, "diagnosis": 2, "distortion": 0}
    image, mask = dataset.read_arrays(record)
    assert (image.shape, int(mask.sum())) == (size, 218 * 105)
    assert mask[1724 : 1724 + 105, 1116 : 1116 + 218].all()
    assert image[0, -1] == round(500 / 1023 * 255)
    labels = dataset._read_labels(tables)
    with (tables / "BCS-DBT labels-train-v2.csv").open(newline="") as stream:
        diagnoses = [[row[d] for d in ("Normal", "Actionable", "Benign", "Cancer")] for row in csv.DictReader(stream)]
    assert list(labels.values()) == [row.index("1") for row in diagnoses]
    assert len(labels) == 19148


def test_the_phantom_is_read_as_the_real_set_with_boxes_on_the_masses(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path))
    data = BCSDBTDataModule(attributes=("diagnosis", "view"), image_size=48, offsets=(-1, 0, 1), check=True)
    data.prepare_data()
    data.setup()
    records = [r for part in data.splits.values() for r in part]
    assert len(records) == 90
    contrast = []
    for record in records:
        image, mask = data.dataset.read_arrays(record)
        side = -1 if record.attributes["laterality"] == 1 else 0
        assert image[:, side].mean() > image[:, -1 - side].mean() + 30
        y, x = (int(axis.mean()) for axis in np.nonzero(mask))
        contrast.append(image[y - 1 : y + 2, x - 1 : x + 2].mean() - image[mask > 0].mean())
    assert np.mean(contrast) > 10
    batch = next(iter(data.train_dataloader()))
    validate(batch, num_classes=2, attributes=data.attribute_specs, intensity_range=(0, 1), batched=True)
    assert batch["image"].shape[1:] == (1, 48, 48)


def test_generated_pairs_are_written_and_mixed_in(tmp_path):
    write_dicom(tmp_path / "real" / FILE, frames())
    write_tables(tmp_path / "real", *(box(PatientID=f"DBT-P{p:05d}") for p in range(5)))
    groups = {"view": 1, "laterality": 0, "diagnosis": 3, "distortion": 1}
    mask = torch.zeros(1, 6, 9, dtype=torch.int64)
    mask[0, 2:4, 3:8] = 1
    made = {"image": torch.rand(1, 6, 9), "mask": mask, "id": "synthetic_CC_00000", "synthetic": torch.tensor(True)}
    attributes = {name: torch.tensor(group) for name, group in groups.items()}
    BCSDBT().write(tmp_path / "made", made | {"attributes": attributes})
    data = BCSDBTDataModule(str(tmp_path / "real"), image_size=(20, 16), synthetic=[str(tmp_path / "made")])
    data.setup()
    (record,) = [r for r in data.splits["train"] if r.synthetic]
    assert record.attributes == groups
    assert torch.equal(BCSDBT().read(record)["mask"], mask)
    shapes = {tuple(data._data("train")[i]["image"].shape) for i in range(len(data.splits["train"]))}
    assert shapes == {(1, 20, 16)}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["BCS-DBT boxes-train-v2.csv", "boxes_with_paths-test-v2.csv"], {"": "BCS", "test": "boxes"}),
        (["BCS-DBT boxes-train-v2.csv", "boxes_with_paths-train-v2.derived.csv"], {"": "BCS"}),
        (["boxes_with_paths-test-v2.csv"], {"test": "boxes"}),
    ],
)
def test_joined_tables_stand_in_for_parts_that_have_none(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).touch()
    tables = bcs_dbt._tables_of_boxes(tmp_path)
    found = {"test" if bcs_dbt._part(table) == "test" else "": table.name for table in tables}
    assert {part: name[: len(expected[part])] for part, name in found.items()} == expected


def test_a_generator_of_other_slices_of_a_held_out_patient_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path))
    seen, other = (BCSDBTDataModule(image_size=32, offsets=o, split_seed=k) for o, k in (((0,), 0), ((1,), 3)))
    for data in (seen, other):
        data.prepare_data()
        data.setup()
    leaked = {r.unit for r in seen.splits["train"]} & {r.unit for r in other.held_out_records}
    assert leaked
    assert not {r.id for r in seen.splits["train"]} & {r.id for r in other.held_out_records}
    with pytest.raises(ValueError, match=r"was trained on \d+ validation or test cases"):
        other.load_state_dict(seen.state_dict())
