import pickle
from itertools import pairwise

import numpy as np
import pydicom
import pytest
from pydicom.uid import ComputedRadiographyImageStorage, SegmentationStorage

from fairdiff_lightning.data import DecathlonDataModule, Emidec, GenerationPlan, LIDCDataModule, Record
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.frames import VolumeFrame
from fairdiff_lightning.data.lidc import LIDC
from fairdiff_lightning.data.requests import Request
from fairdiff_lightning.data.scan_list import ORGAN, list_scans, named_cases
from fairdiff_lightning.data.scans import LesionReader, place_in_scan, read_room
from fairdiff_lightning.data.volumes import Volume, write_volume

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def series(folder, patient):
    write_volume(folder, Volume(np.full((6, 5, 4), -700, np.int16), np.diag([1.0, 1, 2, 1])))
    for path in folder.iterdir():
        slice_ = pydicom.dcmread(path)
        slice_.PatientID = patient
        slice_.save_as(path)
    return folder


def body(path, box, seed=0):
    """A scan of a wet body without lungs, and the mask of an organ in it."""
    values = np.random.default_rng(seed).integers(-20, 80, (24, 22, 16)).astype(np.int16)
    values[0] = -1000
    write_volume(path, Volume(values, AFFINE))
    organ = np.zeros(values.shape, np.uint8)
    organ[box] = 3
    return Volume(organ, AFFINE)


BOX = (slice(4, 14), slice(5, 15), slice(3, 12))


@pytest.mark.parametrize(
    ("patient", "unit", "name"),
    [
        ("LIDC-IDRI-0020", "LIDC-IDRI-0020", "LIDC-IDRI-0020-LIDC-IDRI-0001-1.2.840"),  # the header knows better
        ("lung_017", "lung_017", "LIDC-IDRI-0001-1.2.840"),
        ("", "LIDC-IDRI-0001", "LIDC-IDRI-0001-1.2.840"),
        ("0000", "LIDC-IDRI-0001", "LIDC-IDRI-0001-1.2.840"),
        ("ANONYMOUS", "LIDC-IDRI-0001", "LIDC-IDRI-0001-1.2.840"),
        ("anonymized_patient", "LIDC-IDRI-0001", "LIDC-IDRI-0001-1.2.840"),
        ("Anon017", "Anon017", "LIDC-IDRI-0001-1.2.840"),
        ("Simone", "Simone", "LIDC-IDRI-0001-1.2.840"),
    ],
)
def test_a_series_is_of_the_patient_of_its_header(tmp_path, patient, unit, name):
    series(tmp_path / "LIDC-IDRI-0001" / "1.2.840", patient)
    (scan,) = list_scans(tmp_path)
    assert (scan.unit, scan.id) == (unit, name)


def test_series_without_a_patient_are_of_none(tmp_path):
    for name in ("a", "b"):
        series(tmp_path / name, "ANONYMOUS")
    touch(tmp_path / "c" / "x.dcm")
    assert [(scan.id, scan.unit) for scan in list_scans(tmp_path)] == [("a", "a"), ("b", "b"), ("c", "c")]


@pytest.mark.parametrize(
    ("path", "unit", "case"),
    [
        ("/d/imagesTr-lung_001.nii.gz", None, "lung_001"),
        ("/d/lung_0010.nii.gz", None, None),
        ("/d/xlung_001.nii.gz", None, None),
        ("/d/LUNG_001_0000.nii.gz", None, "lung_001"),
        ("/d/lung_001_b.nii.gz", None, "lung_001_b"),
        ("/d/lung_001/2000/ct.nii.gz", None, "lung_001"),
        ("/d/lung_003/lung_001.nii.gz", None, "lung_001"),
        ("/17/ct.nii.gz", None, None),
        ("/d/scan-17.nii.gz", None, "17"),
        ("/d/ct", "lung_003", "lung_003"),
        ("/d/lung_001/ct", "lung_003", "lung_003"),
    ],
)
def test_the_case_of_a_scan_is_a_whole_word(path, unit, case):
    name = path.rsplit("/", 1)[1].split(".nii")[0]
    scan = Record(name, {"scan": path}, {}, unit or name)
    assert named_cases([scan], {"lung_001", "lung_001_b", "lung_003", "17", ""}) == [case]
    assert named_cases([scan], set()) == [None]


@pytest.mark.parametrize("place", ["imagesTr-{}.nii.gz", "{}/ct.nii.gz", "ct/{}_0000.nii.gz"])
def test_scans_of_the_cases_of_any_data_set_are_left_out(tmp_path, place, caplog):
    """Held-out ones are no material, and those of training cases show lesions without a label."""
    caplog.set_level("INFO")
    plain = DecathlonDataModule(cache="none")
    plain.prepare_data()
    plain.setup()
    held_out, training = plain.splits["test"][0].id, plain.splits["train"][0].id
    touch(tmp_path / place.format(held_out))
    plan = GenerationPlan(total=1, masks="train", backgrounds=str(tmp_path))
    data = DecathlonDataModule(cache="none", generate=plan)
    data.setup()
    with pytest.raises(ValueError, match="case is not held out"):
        data.backgrounds()
    touch(tmp_path / place.format(training))
    assert [scan.source for scan in data.scans(tmp_path)] == sorted([held_out, training])
    with pytest.raises(ValueError, match=r"has no scan without a lesion .*, of 2. Give scans of other patients"):
        data.backgrounds()
    touch(tmp_path / "somebody.nii.gz")
    caplog.clear()
    assert [scan.id for scan in data.backgrounds()] == ["somebody"]
    assert [line for line in caplog.messages if line.startswith("1 scans")] == [
        "1 scans are of validation or test cases and are left out.",
        "1 scans show lesions of their case, which would have no label, and are left out.",
    ]


def test_whole_scans_of_patients_with_nodules_are_left_out_also_where_they_have_healthy_blocks(tmp_path):
    data = LIDCDataModule(
        cache="none", generate=GenerationPlan(total=1, masks="train", backgrounds=str(tmp_path / "scans"))
    )
    data.prepare_data()
    data.setup()
    first, second = sorted({record.unit for record in data.splits["train"]})[:2]
    healthy = data.dataset.backgrounds(data.folder)
    data.dataset.backgrounds = lambda root: [*healthy, Record(f"{first}_CVol_1", {}, {}, first)]
    patients = (first, second, healthy[0].unit, "LIDC-IDRI-9999")
    touch(*(tmp_path / "scans" / patient / "ct.nii.gz" for patient in patients))
    assert [scan.unit for scan in data.backgrounds()] == [healthy[0].unit, "LIDC-IDRI-9999"]


def test_scans_in_linked_folders_are_found(tmp_path):
    touch(tmp_path / "store" / "p1" / "ct.nii.gz", tmp_path / "scans" / "p2" / "ct.nii.gz")
    (tmp_path / "scans" / "p1").symlink_to(tmp_path / "store" / "p1")
    (tmp_path / "store" / "p1" / "back").symlink_to(tmp_path / "scans")
    (tmp_path / "scans" / "p2" / "own").symlink_to(tmp_path / "scans" / "p2")
    (tmp_path / "scans" / ".old").symlink_to(tmp_path / "store")
    assert [scan.id for scan in list_scans(tmp_path / "scans")] == ["p1-ct", "p2-ct"]


def test_of_a_download_the_ct_are_taken_and_the_others_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    for name, modality, kind in (
        ("ct", "CT", None),
        ("xray", "DX", ComputedRadiographyImageStorage),
        ("nodules", "SEG", SegmentationStorage),
        ("mr", "MR", None),
        ("mixed", "CT", None),
    ):
        series(tmp_path / name, f"patient of {name}")
        for path in sorted((tmp_path / name).iterdir())[:: -1 if name == "mixed" else 1]:
            slice_ = pydicom.dcmread(path)
            slice_.Modality, slice_.SOPClassUID = modality, kind or slice_.SOPClassUID
            slice_.save_as(path)
    (tmp_path / "nodules" / "000000.dcm").rename(tmp_path / "mixed" / "-seg.dcm")  # the first file of a CT's folder
    assert [(scan.id, scan.unit) for scan in list_scans(tmp_path)] == [
        ("ct", "patient of ct"),
        ("mixed", "patient of mixed"),
    ]
    (line,) = [line for line in caplog.messages if "DICOM" in line]
    assert line.startswith("3 DICOM series under")
    assert line.endswith("are no CT and are left out: {'MR': 1, 'SEG': 1, 'DX': 1}.")
    touch(*(tmp_path / "organs" / f"{name}.nii.gz" for name in ("ct", "mixed", "mr")))
    assert [scan.id for scan in list_scans(tmp_path, str(tmp_path / "organs"))] == ["ct", "mixed", "mr"]
    with pytest.raises(InvalidSampleError, match=r"no scan. Expected .* of a DICOM series of CT"):
        list_scans(tmp_path / "xray")


def test_organs_of_dicom_are_refused_with_what_to_do(tmp_path):
    touch(tmp_path / "ct.nii.gz", tmp_path / "ct_lung.dcm", tmp_path / "lungs" / "ct.dcm")
    with pytest.raises(ValueError, match=r"_lung.dcm'; masks of organs are NIfTI files; convert .* ends in .nii"):
        list_scans(tmp_path, "{folder}/{name}_lung.dcm")
    with pytest.raises(InvalidSampleError, match=r"lungs/ct.nii.gz'.*masks of organs are NIfTI files; convert"):
        list_scans(tmp_path, str(tmp_path / "lungs"))


def test_series_of_held_out_patients_are_left_out_wherever_they_lie(tmp_path):
    plain = LIDCDataModule(cache="none")
    plain.prepare_data()
    plain.setup()
    series(tmp_path / "1.2.840.1", plain.splits["test"][0].unit)
    data = LIDCDataModule(
        cache="none", generate=GenerationPlan(total=1, masks="train", backgrounds=str(tmp_path / "1.2.840.1"))
    )
    data.setup()
    with pytest.raises(ValueError, match="case is not held out"):
        data.backgrounds()


@pytest.mark.parametrize(
    ("scan", "mask", "organs"),
    [
        ("a/ct.nii.gz", "a/lung.nii.gz", "{folder}/lung.nii.gz"),
        ("ct.nii.gz", "ct_lung.nii", "{folder}/{name}_lung.nii"),
        ("b/ct.nii.gz", "organs/b-ct.nii.gz", "ROOT/organs/{id}.nii.gz"),
        ("b/ct.nii.gz", "organs/b-ct.nii.gz", "ROOT/organs"),
    ],
)
def test_organ_masks_are_found_and_are_no_scans(tmp_path, scan, mask, organs):
    touch(tmp_path / scan, tmp_path / mask)
    (found,) = list_scans(tmp_path, organs.replace("ROOT", str(tmp_path)))
    assert found.files == {"scan": str(tmp_path / scan), ORGAN: str(tmp_path / mask)}
    touch(tmp_path / "new" / "one.nii.gz")
    with pytest.raises(InvalidSampleError, match=r"new/one.nii.gz: no mask of its organ. Expected one at"):
        list_scans(tmp_path, organs.replace("ROOT", str(tmp_path)))


def test_a_folder_of_masks_may_be_built_as_that_of_the_scans(tmp_path):
    touch(tmp_path / "ct" / "a" / "x.nii.gz", tmp_path / "lungs" / "a" / "x.nii.gz")
    (scan,) = list_scans(tmp_path / "ct", str(tmp_path / "lungs"))
    assert scan.files[ORGAN] == str(tmp_path / "lungs" / "a" / "x.nii.gz")
    with pytest.raises(ValueError, match=r"organs='\{case\}.nii' .*a pattern has \{folder\}, \{name\} and \{id\}"):
        list_scans(tmp_path / "ct", "{case}.nii")


@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 2.0)])
def test_lesions_lie_inside_of_the_given_organ(tmp_path, spacing):
    organ = body(tmp_path / "scan.nii.gz", BOX)
    write_volume(tmp_path / "organ.nii.gz", organ.reoriented(("L", "P", "S")))
    scan = Record("s", {"scan": str(tmp_path / "scan.nii.gz"), ORGAN: str(tmp_path / "organ.nii.gz")}, {}, "s")
    lesion = Volume(np.ones((3, 2, 2), np.uint8), np.array([[0, 2, 0, 0], [2.0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]))
    spots = set()
    for seed in range(6):
        _, mask = place_in_scan(*read_room(scan, LIDC(), spacing), lesion, (8, 8, 6), seed, LIDC.window)
        inside = np.argwhere(mask.array)
        at = np.round((inside @ mask.affine[:3, :3].T + mask.affine[:3, 3]) / np.diag(AFFINE)[:3]).astype(int)
        assert organ.array[tuple(at.T)].all()
        spots.add(tuple(at[0]))
    assert len(spots) > 3
    with pytest.raises(InvalidSampleError, match="20 ml"):  # without the mask, lungs are looked for
        read_room(Record("s", {"scan": scan.files["scan"]}, {}, "s"), LIDC())


def test_an_organ_mask_of_another_grid_or_without_an_organ_is_refused(tmp_path):
    organ = body(tmp_path / "scan.nii.gz", BOX)
    scan = Record("s", {"scan": str(tmp_path / "scan.nii.gz"), ORGAN: str(tmp_path / "organ.nii")}, {}, "s")
    for wrong, message in (
        (Volume(organ.array[1:], AFFINE), r"organ.nii: mask of \(23, 22, 16\) voxels for an image of \(24, 22, 16\)"),
        (Volume(organ.array, AFFINE + np.eye(4, k=3) * 5), "organ.nii: image and mask lie up to 5 mm off"),
        (Volume(organ.array * 0, AFFINE), "organ.nii: a mask without a voxel of the organ"),
    ):
        write_volume(tmp_path / "organ.nii", wrong)
        with pytest.raises(InvalidSampleError, match=message):
            read_room(scan, LIDC())


def test_a_mask_with_anatomy_goes_into_no_whole_scan(tmp_path):
    files = {"scan": str(tmp_path / "scan.nii.gz"), ORGAN: str(tmp_path / "organ.nii.gz")}
    asked = Request("x", 0, 0, 0, Record("Case_P001", {"mask": "m"}, {}, "p"), Record("s", files, {}, "s"))
    with pytest.raises(ValueError, match="the mask of 'Case_P001' has the anatomy of that case, not of 's'"):
        LesionReader(Emidec(), VolumeFrame((8, 8, 4)))(asked)


@pytest.mark.parametrize("backgrounds", [None, "healthy", "train"])
def test_organs_need_whole_scans(backgrounds):
    with pytest.raises(ValueError, match="they tell the place in whole scans"):
        GenerationPlan(total=1, masks="own" if backgrounds else "train", backgrounds=backgrounds, organs="lungs")


def asked_of(tmp_path, **more):
    for k in range(3):
        organ = body(tmp_path / f"s{k}.nii.gz", BOX, seed=k)
        write_volume(tmp_path / f"s{k}_organ.nii", organ)
    plan = GenerationPlan(
        total=8,
        masks="train",
        backgrounds=str(tmp_path),
        organs="{folder}/{name}_organ.nii",
        textures=["cluster:0", "cluster:1"],
    )
    settings = {"image_size": (48, 48, 32), "batch_size": 3, "cache": "none", "attributes": ()}
    data = LIDCDataModule(generate=plan, **(settings | more))
    data.prepare_data()
    data.setup()
    return data


class SmallLesions:
    """Reads every mask of the phantom as a lesion of 2 x 2 x 2 voxels, and counts what is read of scans."""

    def __init__(self, monkeypatch, log):
        read = LIDC.read_scan

        def read_scan(dataset, file):
            with log.open("a") as stream:
                stream.write(f"{file}\n")
            return read(dataset, file)

        def read_labels(dataset, record):
            return Volume(np.ones((2, 2, 2), np.uint8), np.diag([2.0, 2.0, 3.0, 1.0]))

        monkeypatch.setattr(LIDC, "read_scan", read_scan)
        monkeypatch.setattr(LIDC, "read_labels", read_labels)


def test_each_scan_is_read_once_by_each_process_and_samples_do_not_depend_on_their_number(tmp_path, monkeypatch):
    log, found = tmp_path / "log.txt", {}
    scans = tmp_path / "scans"
    scans.mkdir()
    SmallLesions(monkeypatch, log)
    for workers in (0, 2):
        log.write_text("")
        data = asked_of(scans, num_workers=workers)
        batches = list(data.predict_dataloader())
        read = log.read_text().split()
        assert len(set(read)) == 3
        assert len(read) <= 3 * max(workers, 1)
        found[workers] = batches
    assert [batch["id"] for batch in found[0]] == [batch["id"] for batch in found[2]]
    for one, other in zip(found[0], found[2], strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in ("image", "mask", "affine", "seed"))
    assert sum(len(batch["id"]) for batch in found[0]) == 16
    seen = {name: image for batch in found[0] for name, image in zip(batch["id"], batch["image"], strict=True)}
    assert all(np.array_equal(seen[name], seen[name[:-1] + "1"]) for name in seen)  # one place in both textures


def test_a_larger_plan_begins_with_the_batches_of_a_smaller_one(tmp_path, monkeypatch):
    monkeypatch.setattr("fairdiff_lightning.data.volume_module.STRETCH", 10)  # 12 with batches of 3
    touch(*(tmp_path / f"s{k}.nii.gz" for k in range(3)))

    def asked(total):
        plan = GenerationPlan(total=total, masks="train", backgrounds=str(tmp_path))
        data = LIDCDataModule(generate=plan, batch_size=3, cache="none", attributes=())
        data.prepare_data()
        data.setup()
        return [request.id for request in data.requests()], [request.background.id for request in data.requests()]

    (small, _), (large, scans) = asked(32), asked(50)
    assert large[:24] == small[:24]
    assert sorted(large[24:36])[:8] == sorted(small[24:])
    assert small != sorted(small)
    for start in range(0, 50, 12):
        stretch = scans[start : start + 12]
        assert sum(a != b for a, b in pairwise(stretch)) == len(set(stretch)) - 1


def test_the_last_scan_is_kept_with_its_reader_and_goes_to_no_other_process(tmp_path, monkeypatch):
    log = tmp_path / "log.txt"
    log.write_text("")
    SmallLesions(monkeypatch, log)
    data = asked_of(tmp_path)
    reader, other = data.request_reader(), data.request_reader()
    first, second = data.requests()[:2]
    plain = len(pickle.dumps(reader))
    for request in (first, second):
        reader(request)
    assert len(log.read_text().split()) == 1
    assert len(pickle.dumps(reader)) == plain
    assert reader == other
    copy = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(copy(first)["image"], reader(first)["image"])
    assert len(log.read_text().split()) == 2


def test_masks_that_tell_the_place_are_part_of_how_samples_were_made(tmp_path):
    data = asked_of(tmp_path)
    assert data.reading["organs"] == "{folder}/{name}_organ.nii"
    assert "organs" not in LIDCDataModule().reading
