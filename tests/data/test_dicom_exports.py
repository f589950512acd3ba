"""Folders of patients as planning systems export them: series and structure sets are told by what they say."""

import shutil
from contextlib import nullcontext

import numpy as np
import pydicom
import pytest
from pydicom.uid import RTDoseStorage
from test_rtstruct import FRAME, closed, ellipse, write_rtstruct, write_scan

from fairdiff_lightning.data import Prostate, ProstateDataModule, read_volume
from fairdiff_lightning.data.dicom_exports import find_exports
from fairdiff_lightning.data.dicom_seg import write_segmentation
from fairdiff_lightning.data.dicom_series import read_series
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.rtstruct import write_structures

HU = {"RescaleSlope": 1, "RescaleIntercept": -1000}


def export(folder, uid="1.2.826.1.9", structures=True, flat=True, write=write_structures, **tags):
    """A patient with a CT and a structure set of two slices, all in one folder or each in its own."""
    folder.mkdir(parents=True, exist_ok=True)
    series = write_scan(folder / uid, SeriesInstanceUID=uid, **{"PatientID": folder.name, **HU, **tags})
    image = read_volume(series)
    mask = np.zeros(image.shape, np.uint8)
    mask[4:9, 3:8, 1:3] = 1
    if structures:
        (folder / "RS").mkdir(exist_ok=True)
        write(folder / "RS" / f"RS.{uid}", image.with_array(mask), image, {1: "CTV prostate"})
    if flat:
        for path in [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]:
            path.rename(folder / f"{uid}.{path.name}")
        for path in [path for path in folder.iterdir() if path.is_dir()]:
            path.rmdir()
    return mask


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("write", [write_structures, write_segmentation])
def test_patients_are_found_without_a_table(tmp_path, flat, write):
    masks = {name: export(tmp_path / name, flat=flat, write=write) for name in ("0007", "P2")}
    dose = pydicom.dcmread(next(p for p in (tmp_path / "P2").rglob("*.dcm")))
    dose.SOPClassUID, dose.Modality, dose.SeriesInstanceUID = RTDoseStorage, "RTDOSE", "1.2.3"
    dose.save_as(tmp_path / "P2" / "RD.dcm")
    (tmp_path / "P2" / "report.txt").write_text("no DICOM")
    index = Prostate().index(tmp_path)
    assert [(record.id, record.unit, record.attributes["t_stage"]) for record in index.records] == [
        ("0007", "0007", -1),
        ("P2", "P2", -1),
    ]
    assert not index.errors
    assert not index.left_out
    for record in index.records:
        image, mask = Prostate().read_volumes(record)
        assert image.array.max() == -1000
        assert np.array_equal(mask.array, masks[record.id])


def test_the_series_in_a_folder_of_several_is_the_one_that_was_contoured(tmp_path):
    truth = export(tmp_path / "p1", "1.2.9.1")
    export(tmp_path / "p1", "1.2.9.2", structures=False, SeriesNumber=4)
    export(tmp_path / "p1", "1.2.9.3", structures=False, Modality="MR")
    index = Prostate().index(tmp_path)
    (record,) = index.records
    assert (record.id, record.series) == ("p1", "1.2.9.1")
    assert index.left_out == {"series that are no CT": 1, "series without a mask beside one that has it": 1}
    assert np.array_equal(Prostate().read_mask(record), truth)
    assert Prostate().read_grid(record).native.slices[0].SeriesInstanceUID == "1.2.9.1"
    assert not Prostate().unlabelled(tmp_path).records


def test_two_plans_of_a_patient_are_two_cases_of_one_unit(tmp_path):
    for uid in ("1.2.9.1", "1.2.9.2"):
        export(tmp_path / "p1", uid)
    records = Prostate().index(tmp_path).records
    assert [(record.id, record.unit) for record in records] == [("p1-1.2.9.1", "p1"), ("p1-1.2.9.2", "p1")]
    assert all(Prostate().read_mask(record).sum() == 5 * 5 * 2 for record in records)


@pytest.mark.parametrize("told", ["HN-0042", "anonymous", "0000", None])
def test_folders_of_one_patient_id_are_one_unit_and_one_that_tells_nobody_is_none(tmp_path, told):
    for k, name in enumerate(("plan1", "plan2")):
        export(tmp_path / name, f"1.2.9.{k}", PatientID=told and f"{told} ")
    export(tmp_path / "p3", "1.2.9.3")
    somebody = told == "HN-0042"
    with pytest.warns(UserWarning, match="plan1, plan2 are of one patient") if somebody else nullcontext():
        records = Prostate().index(tmp_path).records
    assert [record.id for record in records] == ["p3", "plan1", "plan2"]
    assert [record.unit for record in records] == ["p3", *(["HN-0042"] * 2 if somebody else ["plan1", "plan2"])]
    (tmp_path / "cases.csv").write_text("id,t_stage,centre,patient\nplan1,T3,A,\nplan2,T2,A,other\n")
    units = {record.id: (record.unit, record.attributes["t_stage"]) for record in Prostate().index(tmp_path).records}
    assert units["plan1"] == ("HN-0042" if somebody else "plan1", 2), "a table names the folder"
    assert units["plan2"] == ("other", 1)


def test_two_patients_in_a_folder_are_an_error(tmp_path):
    export(tmp_path / "p1", "1.2.9.1", PatientID="A7")
    export(tmp_path / "p1", "1.2.9.2", PatientID="B8")
    (error,) = Prostate().index(tmp_path).errors
    assert "p1: series of the patients ['A7', 'B8']. Expected those of one" in str(error)


def test_folders_without_images_are_counted_and_links_are_followed(tmp_path):
    root = tmp_path / "in"
    export(root / "good")
    (root / "empty").mkdir()
    (root / "notes").mkdir()
    (root / "notes" / "report.txt").write_text("no DICOM")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    export(tmp_path / "store" / "linked", "1.2.9.2", flat=False)
    (root / "linked").symlink_to(tmp_path / "store" / "linked")
    export(tmp_path / "store" / "inner", "1.2.9.3", PatientID="inner")
    (root / "deep").mkdir()
    (root / "deep" / "ct").symlink_to(tmp_path / "store" / "inner")
    index = Prostate().index(root)
    assert [record.id for record in index.records] == ["deep", "good", "linked"]
    assert index.left_out == {"folders without a series of images": 3}
    assert not index.errors
    (root / "good" / "lost").symlink_to(tmp_path / "nowhere")
    (error,) = Prostate().index(root).errors
    assert "good/lost: unreadable" in str(error)


@pytest.mark.parametrize("write", [write_structures, write_segmentation])
def test_a_mask_of_a_series_that_is_not_there_is_of_no_other(tmp_path, write):
    export(tmp_path / "p1", "1.2.9.1", write=write)
    for path in (tmp_path / "p1").glob("*.dcm"):
        path.unlink()
    assert len(list((tmp_path / "p1").iterdir())) == 1
    export(tmp_path / "p1", "1.2.9.2", structures=False)
    index = Prostate().index(tmp_path)
    assert not index.records
    (error,) = index.errors
    assert "RS.1.2.9.1: 0 series that it may be of, by the series ['1.2.9.1'] that it names" in str(error)
    assert "1.2.9.2" in str(error)


def test_a_structure_set_that_names_no_series_is_of_the_ct_in_its_frame(tmp_path):
    export(tmp_path / "p1", "1.2.9.1", structures=False, Modality="PT", FrameOfReferenceUID=FRAME)
    export(tmp_path / "p1", "1.2.9.2", structures=False)
    export(tmp_path / "p1", "1.2.9.3", structures=False, FrameOfReferenceUID="1.2.826.1.8")
    write_rtstruct(tmp_path / "p1" / "RS.dcm", {"PTV": closed(ellipse(6, 5, 3, 3, 2))})
    (record,) = Prostate().index(tmp_path).records
    assert record.series == "1.2.9.2"
    assert Prostate().read_mask(record).any()
    export(tmp_path / "p1", "1.2.9.4", structures=False)
    index = Prostate().index(tmp_path)
    assert not index.records
    assert len(index.errors) == 1
    assert "RS.dcm: 2 series that it may be of" in str(index.errors[0])
    assert "in cases.csv" in str(index.errors[0])


def test_what_is_no_case_is_an_error_of_its_patient_alone(tmp_path):
    export(tmp_path / "good")
    export(tmp_path / "twice")
    shutil.copy(tmp_path / "twice" / "1.2.826.1.9.RS.1.2.826.1.9", tmp_path / "twice" / "second")
    export(tmp_path / "other", structures=False, FrameOfReferenceUID="1.2.5")
    write_rtstruct(tmp_path / "other" / "RS.dcm", {"PTV": closed(ellipse(6, 5, 3, 3, 2))})
    for uid in ("1.2.9.1", "1.2.9.2"):
        export(tmp_path / "several", uid, structures=False)
    export(tmp_path / "spread")
    (tmp_path / "spread" / "b").mkdir()
    (tmp_path / "spread" / "1.2.826.1.9.4.dcm").rename(tmp_path / "spread" / "b" / "4.dcm")
    export(tmp_path / "damaged")
    (tmp_path / "damaged" / "x.dcm").write_bytes(b"half a file")
    index = Prostate().index(tmp_path)
    assert [record.id for record in index.records] == ["good"]
    texts = "\n".join(str(error) for error in index.errors)
    assert len(index.errors) == 5
    for text in (
        "a second mask of the series 1.2.826.1.9, beside",
        "0 series that it may be of, by the frames ['1.2.826.1.7'] that it names",
        "several: 2 series ['1.2.9.1', '1.2.9.2'] and a mask of none",
        "spread: slices of the series 1.2.826.1.9 in 2 folders",
        "damaged/x.dcm: unreadable",
    ):
        assert text in texts


def test_a_patient_without_structures_is_predicted_and_then_a_case(tmp_path):
    truth = export(tmp_path / "in" / "p1", structures=False)
    dataset = Prostate()
    (record,) = dataset.unlabelled(tmp_path / "in").records
    index = dataset.index(tmp_path / "in")
    assert (record.id, index.records) == ("p1", [])
    assert index.left_out == {"images without a mask, which are for prediction alone": 1}
    made = dataset.write_prediction(tmp_path / "out", record, truth)
    made.rename(tmp_path / "in" / "p1" / "SEG.dcm")
    (record,) = dataset.index(tmp_path / "in").records
    assert np.array_equal(dataset.read_mask(record), truth)


def test_exports_train_through_the_module(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path / "cache"))
    for k in range(3):
        export(tmp_path / "in" / f"p{k}")
    monkeypatch.chdir(tmp_path)
    sizes = {"image_size": (16, 16, 8), "patch_size": None, "spacing": None, "crop_foreground": False}
    data = ProstateDataModule("in", batch_size=1, cache="disk", **sizes)
    data.prepare_data()
    data.setup("fit")
    for _ in range(2):
        (batch,) = data.train_dataloader()
        assert batch["mask"].sum() == 5 * 5 * 2
        assert batch["attributes"]["t_stage"].tolist() == [-1]


def test_a_folder_without_patients_says_what_is_expected(tmp_path):
    (tmp_path / "notes").mkdir()
    expected = (
        r"no CT in folders of patients \(1 folders without a series of images\).*(?s:.*)as planning systems export"
    )
    with pytest.raises(DatasetNotFoundError, match=expected):
        Prostate().index(tmp_path)


def test_a_table_without_files_says_the_groups_of_the_patients(tmp_path):
    for name, uid in (("p1", "1.2.9.1"), ("p2", "1.2.9.2"), ("p2", "1.2.9.3"), ("p3", "1.2.9.4")):
        export(tmp_path / name, uid)
    (tmp_path / "cases.csv").write_text("id,t_stage,centre,split\np1,T4,B,test\np2,T2,A,\np9,T1,,\n")
    index = Prostate().index(tmp_path)
    stages = {record.id: record.attributes["t_stage"] for record in index.records}
    assert stages == {"p1": 3, "p2-1.2.9.2": 1, "p2-1.2.9.3": 1, "p3": -1}
    assert [record.split for record in index.records] == ["test", None, None, None]
    (error,) = index.errors
    assert "row 4: the id 'p9' of no case" in str(error)
    (tmp_path / "cases.csv").write_text("id,image,t_stage,centre\np1,p1,T4,B\n")
    with pytest.raises(InvalidSampleError, match=r"the column image alone\. Expected image and mask"):
        Prostate().index(tmp_path)


def test_a_series_is_named_in_the_table(tmp_path):
    for uid in ("1.2.9.1", "1.2.9.2"):
        export(tmp_path / "p1", uid, structures=False)
    row = "id,image,mask,t_stage,centre,series\na,p1,,T2,A,{}\n"
    (tmp_path / "cases.csv").write_text(row.format("1.2.9.2"))
    (record,) = Prostate().unlabelled(tmp_path).records
    assert Prostate().read_image(record).native.slices[0].SeriesInstanceUID == "1.2.9.2"
    (tmp_path / "cases.csv").write_text(row.format(""))
    with pytest.raises(InvalidSampleError, match="2 series"):
        Prostate().read_image(Prostate().unlabelled(tmp_path).records[0])


@pytest.mark.parametrize("flat", [True, False])
def test_a_real_export_is_found(realdata, tmp_path, flat):
    root = realdata / "IBSI" / "ibsi_validation"
    if flat:
        (tmp_path / "STS_002").mkdir()
        for path in (root / "dicom" / "STS_002" / "PET").rglob("*.dcm"):
            shutil.copy(path, tmp_path / "STS_002")
    folder = tmp_path if flat else root / "dicom"
    assert find_exports(folder).left_out == {"series that are no CT": 1}
    cases = find_exports(folder, modality="PT")
    (row,) = cases.rows.values()
    assert (row["id"], row["mask"].endswith("RS.dcm")) == ("STS_002", True)
    dataset = Prostate(structures=["gtv_.*"])
    image = read_series(row["image"], series=row["series"])
    mask = dataset._dicom_mask(row["mask"], image)
    truth = read_volume(root / "nifti" / "STS_002" / "PET_mask.nii.gz")
    assert np.array_equal(mask.array, truth.array)
