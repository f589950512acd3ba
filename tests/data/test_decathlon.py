import json
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch

from fairdiff_lightning.data.decathlon import Decathlon, Task, read_task
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.sample import validate
from fairdiff_lightning.data.volumes import Volume, Window, crop_or_pad, write_nifti

SIZE = (8, 9, 5)
AFFINE = np.array([[-2.0, 0, 0, 7], [0, 1.5, 0, 20], [0, 0, 3, -40], [0, 0, 0, 1]])
"""Of axes that run to the left, front and head."""


def store(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def scan(k=0):
    return (np.arange(8 * 9 * 5, dtype=np.float32).reshape(SIZE) - 200) * (k + 1)


def labels():
    mask = np.zeros(SIZE, np.uint8)
    mask[1:4, 2:7, 1:3], mask[2, 3:5, 2] = 1, 2
    return mask


def task(root, modality=("CT",), cases=("a_1", "b_2"), **more):
    """A tree whose images hold a volume for each modality."""
    for case in cases:
        volumes = [scan(k) for k in range(len(modality))]
        store(root / "imagesTr" / f"{case}.nii.gz", np.stack(volumes, -1) if len(volumes) > 1 else volumes[0])
        store(root / "labelsTr" / f"{case}.nii.gz", labels())
    content = {
        "name": "Organ",
        "modality": {str(k): name for k, name in enumerate(modality)},
        "labels": {"0": "background", "2": "tumour", "1": "organ"},
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases],
        "test": ["./imagesTs/c_3.nii.gz"],
        **more,
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def made(data, seed=0, synthetic=True, **groups):
    draws = np.random.default_rng(seed)
    return {
        "image": torch.from_numpy(draws.uniform(0, 1, (data.channels, *SIZE)).astype(np.float32)),
        "mask": torch.from_numpy(draws.integers(0, len(data.classes), (1, *SIZE))),
        "attributes": {name: torch.tensor(group) for name, group in groups.items()},
        "id": f"made_{seed}",
        "affine": torch.from_numpy(np.diag([2.0, 1.5, 3, 1])),
        "synthetic": torch.tensor(synthetic),
        "source": "a_1" if synthetic else "",
    }


def test_classes_and_channels_come_from_the_task_and_ct_from_a_window(tmp_path):
    data = Decathlon(task(tmp_path))
    index = data.index(tmp_path)
    assert (data.classes, data.channels, data.window) == (("background", "organ", "tumour"), 1, Window(-200, 250))
    assert [(r.id, r.unit, r.split, r.attributes) for r in index.records] == [
        ("a_1", "a_1", None, {}),
        ("b_2", "b_2", None, {}),
    ]
    assert index.left_out == {"images of the test list, which have no labels": 1}
    assert data.backgrounds(tmp_path) == []
    image, mask = data.read_arrays(index.records[0])
    assert np.array_equal(image, scan()[::-1])  # HU, turned to RAS
    assert np.array_equal(mask, labels()[::-1])
    sample = data.read(index.records[0])
    np.testing.assert_allclose(sample["image"][0], np.clip((image + 200) / 450, 0, 1), atol=1e-6)
    validate(sample, num_classes=3, intensity_range=(0, 1))
    assert Decathlon(tmp_path, window=(0, 80)).window == Window(0, 80)
    with pytest.raises(ValueError, match=r"window=\(80, 0\); expected are two finite"):
        Decathlon(tmp_path, window=(80, 0))
    assert Decathlon(task(tmp_path, name="Lung")).window == Window(-1000, 400)


def test_channels_of_mri_are_scaled_each_by_its_percentiles_and_chosen_by_number(tmp_path):
    data = Decathlon(task(tmp_path, ("T2", "ADC")))
    record = data.index(tmp_path).records[0]
    image, mask = data.read_arrays(record)
    assert (image.shape, mask.shape, data.channels) == ((2, *SIZE), SIZE, 2)
    for k in range(2):
        low, high = np.percentile(scan(k), (0.5, 99.5))
        np.testing.assert_allclose(image[k], np.clip((scan(k)[::-1] - low) / (high - low), 0, 1), atol=1e-5)
        one = Decathlon(tmp_path, channel=k)
        assert (one.channels, one.modalities) == (1, (("T2", "ADC")[k],))
        assert np.array_equal(one.read_image(record).array, image[k])
        assert one.read(record)["image"].shape == (1, *SIZE)
    sample = data.read(record)
    validate(sample, num_classes=3, intensity_range=(0, 1))
    assert torch.equal(sample["image"], torch.from_numpy(image))
    with pytest.raises(ValueError, match="several volumes; choose one by `channel`"):
        data.read_image(record)


@pytest.mark.parametrize(("modality", "channel"), [(("CT",), None), (("T2", "ADC"), None), (("T2", "ADC"), 1)])
@pytest.mark.parametrize("synthetic", [True, False])
def test_a_written_sample_reads_back_here_and_as_a_task_of_its_own(tmp_path, modality, channel, synthetic):
    root, out, columns = task(tmp_path / "real", modality), tmp_path / "made", {"stage": ("T1", "T2", "T3")}
    data = Decathlon(root, channel, columns=columns)
    written = made(data, 5, synthetic, stage=2)
    assert data.write(out, written) == out / "imagesTr" / "made_5.nii.gz"
    assert nib.load(out / "imagesTr" / "made_5.nii.gz").shape == (SIZE if data.channels == 1 else (*SIZE, 2))
    assert read_task(out / "dataset.json").modalities == data.modalities
    for reader in (data, Decathlon(out, columns=columns)):
        (record,) = reader.index(out).records
        assert (record.id, record.synthetic, record.source) == ("made_5", synthetic, "a_1" if synthetic else None)
        read = reader.read(record)
        validate(read, num_classes=3, attributes=list(data.attributes.values()), intensity_range=(0, 1))
        torch.testing.assert_close(
            read["image"], written["image"], atol=0.5 / 450 + 1e-6 if modality[0] == "CT" else 0, rtol=0
        )
        assert torch.equal(read["mask"], written["mask"])
        assert read["attributes"] == written["attributes"]
        np.testing.assert_allclose(read["affine"], written["affine"])
    with pytest.raises(ValueError, match=f"3 channels; expected {data.channels}"):
        data.write(out, {**written, "image": torch.zeros(3, *SIZE)})


def test_a_crop_keeps_the_scale_of_its_whole_volume(tmp_path):
    data = Decathlon(task(tmp_path / "real", ("MRI",)))
    image, mask = (crop_or_pad(v, (4, 5, 5), 0) for v in data.read_volumes(data.index(tmp_path / "real").records[0]))
    data.write_volumes(tmp_path / "made", "x", image, mask, synthetic=True)
    again, _ = data.read_volumes(data.index(tmp_path / "made").records[0])
    assert np.array_equal(again.array, image.array)
    assert again.array.max() < 0.9
    np.testing.assert_allclose(again.affine, image.affine)


def test_many_writers_name_every_case_and_what_the_file_said_stays(tmp_path):
    root = task(tmp_path, licence="CC-BY-SA 4.0")
    data = Decathlon(root)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda seed: data.write(root, made(data, seed)), range(12)))
    assert {r.id for r in data.index(root).records} == {"a_1", "b_2", *(f"made_{k}" for k in range(12))}
    content = json.loads((root / "dataset.json").read_text())
    assert (content["licence"], content["numTraining"], len(content["test"])) == ("CC-BY-SA 4.0", 14, 1)


def test_groups_come_from_a_table(tmp_path):
    data = Decathlon(task(tmp_path), columns={"stage": ("T1", "T2", "T3", "T4"), "site": ("x", "y")})
    (tmp_path / "attributes.csv").write_text("id,stage,site\na_1,T4,\nz_9,T1,x\n")
    index = data.index(tmp_path)
    assert [r.attributes for r in index.records] == [{"stage": 3, "site": -1}, {"stage": -1, "site": -1}]
    assert index.left_out["rows of attributes.csv without a case"] == 1
    for rows, message in (
        ("a_1,T5,", r"attributes.csv\[stage\], row 2: 'T5'"),
        ("../../escaped,,", r"attributes.csv\[id\], row 2: the id '../../escaped'. Expected the name of a file"),
        ("a_1,,\na_1,,", r"\[id\]: 'a_1' twice"),
    ):
        (tmp_path / "attributes.csv").write_text(f"id,stage,site\n{rows}\n")
        with pytest.raises(InvalidSampleError, match=message):
            data.index(tmp_path)


def test_predictions_are_written_voxel_for_voxel_as_the_images_file(tmp_path):
    for modality in (("CT",), ("T2", "ADC")):
        root = tmp_path / modality[0]
        data = Decathlon(task(root, modality))
        record = data.index(root).records[0]
        path = data.write_prediction(tmp_path / "out", record, data.read_mask(record))
        stored = nib.load(path)
        assert path == tmp_path / "out" / "labelsTr" / "a_1.nii.gz"
        assert (stored.get_data_dtype(), stored.shape) == (np.uint8, SIZE)
        assert np.array_equal(np.asarray(stored.dataobj), labels())  # not turned
        np.testing.assert_allclose(stored.affine, AFFINE)
    alone = nib.load(data.write_mask(tmp_path / "out", "b", labels(), AFFINE))
    assert np.array_equal(np.asarray(alone.dataobj), labels())


def test_a_mask_lies_voxel_for_voxel_as_its_image_where_its_affine_is_ignored(tmp_path):
    root = task(tmp_path, ("T2", "ADC"))
    store(root / "labelsTr" / "a_1.nii.gz", labels(), np.eye(4))
    data = Decathlon(root, ignore_mask_affine=True)
    record = data.index(root).records[0]
    for found in (data.read_aligned(record)[1], data.read_labels(record)):
        assert np.array_equal(found.array, labels()[::-1])
        np.testing.assert_allclose(found.affine, data.read_channels(record)[0].affine)
    with pytest.raises(InvalidSampleError, match="image and mask lie up to"):
        Decathlon(root).read_aligned(record)
    store(root / "labelsTr" / "a_1.nii.gz", labels()[1:], np.eye(4))
    with pytest.raises(InvalidSampleError, match=r"mask of \(7, 9, 5\) voxels for an image of \(8, 9, 5\)"):
        data.read_labels(record)


def test_a_case_is_added_without_a_look_at_the_others(tmp_path, monkeypatch):
    data = Decathlon(task(tmp_path / "real"))
    data.write(tmp_path / "made", made(data, 0))
    monkeypatch.setattr("fairdiff_lightning.data.decathlon_task.visible_files", None)
    for seed in (1, 2, 2):
        data.write(tmp_path / "made", made(data, seed))
    assert [r.id for r in data.index(tmp_path / "made").records] == ["made_0", "made_1", "made_2"]
    assert json.loads((tmp_path / "made" / "dataset.json").read_text())["numTraining"] == 3


def test_absent_files_are_counted_and_nothing_left_is_an_error(tmp_path):
    root = task(tmp_path, cases=("a_1", "b_2", "c_3"))
    (root / "imagesTr" / "b_2.nii.gz").unlink()
    (root / "labelsTr" / "c_3.nii.gz").unlink()
    index = Decathlon(root).index(root)
    assert [r.id for r in index.records] == ["a_1"]
    assert index.left_out["cases of dataset.json whose image is absent"] == 1
    assert index.left_out["cases of dataset.json whose label is absent"] == 1
    (root / "imagesTr" / "a_1.nii.gz").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"none of the 3 cases that dataset.json names"):
        Decathlon(root).index(root)
    with pytest.raises(DatasetNotFoundError, match=r"no dataset.json.*\n.*\n  dataset.json"):
        Decathlon(tmp_path / "labelsTr")
    with pytest.raises(DatasetNotFoundError, match="no such folder"):
        Decathlon(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"0": "background", "2": "tumour"}}, r"dataset.json\[labels\]: .*without a gap"),
        ({"labels": {"background": 0, "tumour": 1}}, r"dataset.json\[labels\]: .*names by number"),
        ({"modality": ["CT"]}, r"dataset.json\[modality\]: \['CT'\]"),
        ({"test": [{"label": "x"}]}, r"\[test\]\[0\]: None. Expected the path of an image"),
        ({"training": ["./imagesTr/a_1.nii.gz"]}, r"\[training\]\[0\]: './imagesTr/a_1.nii.gz'. Expected an image and"),
    ],
)
def test_a_task_of_another_form_is_named(tmp_path, change, message):
    file = task(tmp_path) / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InvalidSampleError, match=message):
        Decathlon(tmp_path)


def test_a_file_that_is_no_task_and_channels_it_does_not_have_are_named(tmp_path):
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InvalidSampleError, match=r"dataset.json: unreadable"):
        Decathlon(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": {}}')
    with pytest.raises(InvalidSampleError, match="the keys modality, training too"):
        Decathlon(tmp_path)
    with pytest.raises(ValueError, match=r"channel=2 of Organ; expected is one of 0 to 1, \('T2', 'ADC'\)"):
        Decathlon(task(tmp_path, ("T2", "ADC")), channel=2)
    with pytest.raises(ValueError, match="only CT has one"):
        Decathlon(tmp_path, window=(0, 1))
    with pytest.raises(ValueError, match="CT beside other modalities"):
        Decathlon(task(tmp_path, ("CT", "PET")))
    assert Decathlon(tmp_path, channel=0).window == Window(-200, 250)
    other = task(tmp_path / "other", labels={"0": "background", "1": "lung"})
    with pytest.raises(
        InvalidSampleError, match=r"other/dataset.json: the labels .*'lung'.* Expected those of the task"
    ):
        Decathlon(tmp_path, channel=0).index(other)


def test_volumes_that_do_not_fit_are_named(tmp_path):
    data = Decathlon(task(tmp_path, ("MRI",)))
    record = data.index(tmp_path).records[0]
    image, label = (tmp_path / folder / "a_1.nii.gz" for folder in ("imagesTr", "labelsTr"))
    moved = AFFINE.copy()
    moved[0, 3] += 5
    store(label, labels(), moved)
    for read in (data.read_volumes, data.read_arrays, data.read):
        with pytest.raises(InvalidSampleError, match=r"labelsTr/a_1.nii.gz: image and mask lie up to 5 mm off"):
            read(record)
    assert np.array_equal(Decathlon(tmp_path, ignore_mask_affine=True).read_arrays(record)[1], labels()[::-1])
    store(label, labels() + np.uint8(1))
    with pytest.raises(InvalidSampleError, match=r"mask values \[1, 2, 3\]. Expected classes 0 to 2"):
        data.read_mask(record)
    store(label, np.stack([labels()] * 2, -1))
    with pytest.raises(InvalidSampleError, match=r"labelsTr/a_1.nii.gz: 4-D data"):
        data.read_mask(record)
    store(image, np.stack([scan(), scan()], -1))
    with pytest.raises(
        InvalidSampleError, match=r"imagesTr/a_1.nii.gz: 2 volumes. Expected those of dataset.json, MRI"
    ):
        data.read_image(record)
    store(image, np.zeros((*SIZE, 1, 3), np.float32))
    with pytest.raises(InvalidSampleError, match="5-D data"):
        data.read_image(record)
    store(image, np.full(SIZE, 3, np.float32))
    with pytest.raises(InvalidSampleError, match="3 at both percentiles"):
        data.read_image(record)
    write_nifti(image, Volume(np.ones(SIZE, np.float32), AFFINE), {"id": "a_1", "window": [1, 0]})
    with pytest.raises(InvalidSampleError, match=r"the window \(1, 0\) in its notes"):
        data.read_image(record)
    store(image, np.full(SIZE, np.nan, np.float32))
    with pytest.raises(InvalidSampleError, match="NaN or infinite"):
        data.read_image(record)
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(InvalidSampleError, match="unreadable"):
        data.read_image(record)


def test_the_phantom_is_a_task_of_two_channels(tmp_path):
    data = Decathlon()
    data.write_phantom(tmp_path, seed=0)
    index = data.index(tmp_path)
    assert (len(index.records), data.channels, data.classes) == (12, 2, ("background", "PZ", "TZ"))
    assert Decathlon(tmp_path).modalities == ("T2", "ADC")
    for record in index.records[:3]:
        sample = data.read(record)
        validate(sample, num_classes=3, intensity_range=(0, 1))
        mask, t2 = sample["mask"][0], sample["image"][0]
        assert mask.unique().tolist() == [0, 1, 2]
        assert t2[mask == 1].mean() > t2[mask == 2].mean()
    one = Decathlon(channel=1).read(index.records[0])
    assert torch.equal(one["image"][0], data.read(index.records[0])["image"][1])


def test_sixty_real_hippocampi_are_read(realdata):
    root = realdata / "MSD" / "Task04_Hippocampus"
    data = Decathlon(root)
    index = data.index(root)
    assert (len(index.records), index.errors, index.left_out) == (60, [], {})
    assert (data.classes, data.modalities) == (("background", "Anterior", "Posterior"), ("MRI",))
    listed = [case["image"] for case in json.loads((root / "dataset.json").read_text())["training"]]
    assert [f"./imagesTr/{r.id}.nii.gz" for r in index.records] == listed
    for record in index.records[::9]:
        sample = data.read(record)
        validate(sample, num_classes=3, intensity_range=(0, 1))
        stored = nib.load(record.files["mask"])
        assert np.array_equal(sample["mask"][0], np.asarray(stored.dataobj))
        assert sample["mask"].unique().tolist() == [0, 1, 2]
        np.testing.assert_allclose(sample["affine"], stored.affine)


def test_a_real_task_without_images_says_so(realdata):
    root = realdata / "MSD" / "Task05_Prostate"
    data = Decathlon(root, channel=0)
    assert (data.classes, data.modalities) == (("background", "PZ", "TZ"), ("T2",))
    with pytest.raises(
        DatasetNotFoundError, match=r"none of the 32 cases that dataset.json names.*image is absent': 32"
    ):
        data.index(root)


def test_a_real_task_is_used_as_far_as_its_images_are_there(realdata, tmp_path):
    root = tmp_path / "Task05_Prostate"
    (root / "labelsTr").mkdir(parents=True)
    real = realdata / "MSD" / "Task05_Prostate"
    (root / "dataset.json").write_text((real / "dataset.json").read_text())
    label = nib.load(real / "labelsTr" / "prostate_00.nii.gz")
    (root / "labelsTr" / "prostate_00.nii.gz").symlink_to(real / "labelsTr" / "prostate_00.nii.gz")
    values = np.arange(np.prod(label.shape) * 2, dtype=np.int32).reshape(*label.shape, 2)
    store(root / "imagesTr" / "prostate_00.nii.gz", values, label.affine)
    data = Decathlon(root)
    index = data.index(root)
    assert index.left_out == {
        "cases of dataset.json whose image is absent": 31,
        "images of the test list, which have no labels": 16,
    }
    channels, mask = data.read_aligned(index.records[0])
    assert [type(channel) for channel in channels] == [Volume, Volume]
    assert mask.shape == channels[1].shape == label.shape
    assert np.array_equal(mask.array, np.asarray(label.dataobj))


def test_a_task_keeps_its_order(tmp_path):
    root = task(tmp_path, cases=("b_2", "a_1"))
    assert read_task(root / "dataset.json") == Task(
        "Organ",
        ("CT",),
        ("background", "organ", "tumour"),
        tuple((f"./imagesTr/{c}.nii.gz", f"./labelsTr/{c}.nii.gz") for c in ("b_2", "a_1")),
        ("./imagesTs/c_3.nii.gz",),
    )
