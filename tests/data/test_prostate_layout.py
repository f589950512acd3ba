"""Masks and images of prostate CT as exports and predictions have them, with a table and without one."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
from test_rtstruct import write_scan

from fairdiff_lightning.data import Prostate, ProstateDataModule, read_volume
from fairdiff_lightning.data.dicom_seg import write_segmentation
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.rtstruct import write_structures

HU = {"hu_offset": -1000}


def target(image, *classes):
    """Blocks of the classes, one behind the other."""
    mask = np.zeros(image.shape, np.uint8)
    for k, value in enumerate(classes):
        mask[2 + 4 * k : 5 + 4 * k, 3:8, 1:4] = value
    return mask


@pytest.mark.parametrize(
    "dataset",
    [
        Prostate(**HU),
        Prostate(targets=(7, 2), structures=["none"], **HU),
        Prostate(classes=("none", "CTV", "GTV"), targets=None, **HU),
    ],
)
def test_a_predicted_segmentation_is_a_mask_of_its_case(tmp_path, dataset):
    (tmp_path / "images").mkdir()
    image = read_volume(write_scan(tmp_path / "images" / "p1"))
    (new,) = dataset.unlabelled(tmp_path).records
    assert not dataset.index(tmp_path).records
    mask = target(image, *range(1, len(dataset.classes)))
    assert dataset.write_prediction(tmp_path, new, mask) == tmp_path / "masks" / "p1.dcm"
    (record,) = dataset.index(tmp_path).records
    assert (record.id, record.files["image"]) == ("p1", str(tmp_path / "images" / "p1"))
    assert not dataset.unlabelled(tmp_path).records
    assert np.array_equal(dataset.read_volumes(record)[1].array, mask)
    assert np.array_equal(dataset.read_labels(record).array, mask)
    again = dataset.write_prediction(tmp_path / "again", record, mask)
    assert pydicom.dcmread(again).Modality == "SEG", "as the mask that the case has"


def overlap(path):
    """Put the segments of a SEG, one behind the other, into the place of the first."""
    found = pydicom.dcmread(path)
    frames = [item.SegmentIdentificationSequence[0] for item in found.PerFrameFunctionalGroupsSequence]
    first = found.pixel_array[[frame.ReferencedSegmentNumber == 1 for frame in frames]]
    packed = np.concatenate([first] * (len(frames) // len(first)))
    found.PixelData = np.packbits(packed.ravel(), bitorder="little").tobytes()
    found.save_as(path)


def test_segments_that_match_are_joined_even_where_they_overlap(tmp_path):
    image = read_volume(write_scan(tmp_path / "ct"))
    path = tmp_path / "seg"  # exports name files by UID
    mask = target(image, 1, 2, 3)
    write_segmentation(path, image.with_array(mask), image, {1: "CTV 1", 2: "ptv", 3: "Bladder"})
    (tmp_path / "cases.csv").write_text("id,image,mask,t_stage,centre\np1,ct,seg,,\n")

    def read(**arguments):
        dataset = Prostate(**HU, **arguments)
        return dataset.read_mask(dataset.index(tmp_path).records[0])

    assert np.array_equal(read(), np.isin(mask, (1, 2)))
    assert np.array_equal(read(classes=("background", "bladder")), mask > 0)
    with pytest.raises(InvalidSampleError, match=r"seg: segments \['Bladder', 'CTV 1', 'ptv'\]. .* matches \['GTV'\]"):
        read(structures=["GTV"])
    classes = ("none", "Bladder", "PTV", "CTV 1")
    assert np.array_equal(read(classes=classes, targets=None), np.array([0, 3, 2, 1])[mask])
    with pytest.raises(InvalidSampleError, match=r"segments .*Expected \['Bladder', 'PTV'\]"):
        read(classes=classes[:3], targets=None)
    overlap(path)
    assert np.array_equal(read(), mask == 1)
    with pytest.raises(InvalidSampleError, match=r"segments \[[123]\] and [123] overlap in slice"):
        read(classes=classes, targets=None)


@pytest.mark.parametrize("name", ["1.2.840.10008", "p1.DCM", "p1"])
def test_structures_are_known_by_what_they_are(tmp_path, name):
    image = read_volume(write_scan(tmp_path / "ct"))
    mask = target(image, 1)
    (tmp_path / "rt").mkdir()
    write_structures(tmp_path / "rt" / name, image.with_array(mask), image, {1: "CTV"})
    (tmp_path / "cases.csv").write_text(f"id,image,mask,t_stage,centre\np1,ct,rt/{name},,\n")
    dataset = Prostate(**HU)
    (record,) = dataset.index(tmp_path).records
    assert np.array_equal(dataset.read_volumes(record)[1].array, mask)
    made = dataset.write_prediction(tmp_path / "out", record, mask)
    assert pydicom.dcmread(made).Modality == "RTSTRUCT"
    if name == "1.2.840.10008":
        return
    (tmp_path / "cases.csv").unlink()
    (tmp_path / "images").mkdir()
    (tmp_path / "ct").rename(tmp_path / "images" / "p1")
    (tmp_path / "rt").rename(tmp_path / "masks")
    (record,) = dataset.index(tmp_path).records
    assert np.array_equal(dataset.read_mask(record), mask)


def test_other_objects_and_folders_without_a_series_are_named(tmp_path):
    scan = write_scan(tmp_path / "ct")
    (tmp_path / "cases.csv").write_text("id,image,mask,t_stage,centre\np1,ct,ct/0.dcm,,\n")
    dataset = Prostate(**HU)
    with pytest.raises(InvalidSampleError, match=r"0.dcm: a DICOM object of modality CT. Expected .*RTSTRUCT.*SEG"):
        dataset.read_labels(dataset.index(tmp_path).records[0])
    (tmp_path / "cases.csv").unlink()
    (tmp_path / "images" / "p1").mkdir(parents=True)
    scan.rename(tmp_path / "images" / "p1" / "series")
    (tmp_path / "images" / "notes.txt").write_text("no case")
    (record,) = dataset.unlabelled(tmp_path).records
    with pytest.raises(InvalidSampleError, match=r"images/p1: 0 series"):
        dataset.read_image(record)


def test_pairs_are_found_below_a_relative_root(tmp_path, monkeypatch):
    for name in ("images/a.nii.gz", "masks/a.nii.gz"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        nib.save(
            nib.Nifti1Image(np.full((4, 4, 4), -300 * int("images" in name), np.int16), np.eye(4)),
            tmp_path / "in" / name,
        )
    monkeypatch.chdir(tmp_path)
    index = Prostate().index(Path("in"))
    assert not index.errors
    assert Prostate().read_arrays(index.records[0])[0].shape == (4, 4, 4)


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_two_files_of_one_id_are_an_error_of_that_id(tmp_path, folder):
    for name in ("images/a.nii.gz", "masks/a.nii.gz", "images/b.nii.gz", "masks/b.nii.gz", f"{folder}/a.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / name)
    index = Prostate().index(tmp_path)
    assert [record.id for record in index.records] == ["b"]
    assert [str(error) for error in index.errors] == [
        f"{tmp_path / folder / 'a.nii'}: 'a.nii.gz' beside it. Expected one image and one mask of each id."
    ]
    assert not index.left_out
    assert not Prostate().unlabelled(tmp_path).records


def test_cases_that_cannot_be_read_are_skipped_and_counted_where_that_is_asked_for(tmp_path):
    affine, rows = np.diag([2.0, 2.0, 3.0, 1]), []
    image = read_volume(write_scan(tmp_path / "ct", RescaleSlope=1, RescaleIntercept=-1000))
    write_structures(tmp_path / "bladder.dcm", image.with_array(target(image, 1)), image, {1: "Bladder"})
    for k in range(6):
        values = np.random.default_rng(k).integers(-200, 200, (8, 8, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(values, affine), tmp_path / f"good{k}.nii.gz")
        nib.save(nib.Nifti1Image((values > 0).astype(np.uint8), affine), tmp_path / f"mask{k}.nii.gz")
        rows.append((f"good{k}", f"good{k}.nii.gz", f"mask{k}.nii.gz"))
    nib.save(nib.Nifti1Image(np.full((8, 8, 8, 2), -5, np.int16), affine), tmp_path / "series.nii.gz")
    rows += [("4d", "series.nii.gz", "mask0.nii.gz"), ("bladder", "ct", "bladder.dcm"), ("gone", "no.nii.gz", "")]
    table = pd.DataFrame(rows, columns=["id", "image", "mask"]).assign(t_stage="T2", centre="A")
    table.loc[table["id"] == "gone", "mask"] = "mask0.nii.gz"
    table.to_csv(tmp_path / "cases.csv", index=False)
    sizes = {"image_size": (8, 8, 8), "patch_size": None, "spacing": None, "crop_foreground": False}
    with pytest.raises(InvalidSampleError, match=r"cases.csv, row 10, image: no file '.*no.nii.gz'"):
        ProstateDataModule(str(tmp_path), **sizes).setup("fit")
    for record, found in zip(Prostate().index(tmp_path).records[6:], ("4-D data", "no structure"), strict=True):
        with pytest.raises(InvalidSampleError, match=found):
            Prostate().read_volumes(record)
    data = ProstateDataModule(str(tmp_path), on_error="skip", **sizes)
    with pytest.warns(UserWarning, match=r"6 samples. Left out: 3 unreadable, the first: .*row 10, image: no file"):
        data.setup("fit")
    assert {record.id for part in data.splits.values() for record in part} == {f"good{k}" for k in range(6)}
    assert {i for batch in data.train_dataloader() for i in batch["id"]} == {r.id for r in data.splits["train"]}


def test_a_folder_of_a_plan_needs_no_more_than_a_table_of_three_columns(tmp_path):
    for name in ("p1", "p2", "p3"):
        folder = write_scan(tmp_path / name, RescaleSlope=1, RescaleIntercept=-1000)
        image = read_volume(folder)
        write_structures(folder / "RS.1.2.3", image.with_array(target(image, 1)), image, {1: "PTV"})
    (tmp_path / "cases.csv").write_text("id,image,mask\np1,p1,p1/RS.1.2.3\np2,p2,p2/RS.1.2.3\np3,p3,p3/RS.1.2.3\n")
    sizes = {"image_size": (16, 16, 8), "patch_size": None, "spacing": None, "crop_foreground": False}
    data = ProstateDataModule(str(tmp_path), attributes=(), columns={}, batch_size=1, **sizes)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["mask"].sum() == 3 * 5 * 3
