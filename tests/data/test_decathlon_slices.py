import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairdiff_lightning.data.decathlon import Decathlon
from fairdiff_lightning.data.decathlon_slice_module import DecathlonSliceDataModule
from fairdiff_lightning.data.decathlon_slices import DecathlonSlices
from fairdiff_lightning.data.edges import CannyEdges
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.patch_merge import PatchMerge
from fairdiff_lightning.data.provenance import marks, read_training_cases, write_training_cases
from fairdiff_lightning.data.requests import GenerationPlan
from fairdiff_lightning.data.sample import validate
from fairdiff_lightning.data.slice_stack import (
    SliceFrame,
    by_case,
    parse_slice_id,
    read_predictions,
    region_of,
    resized_affine,
    scale,
    slice_affine,
    slice_id,
    slice_window,
    spline,
    stack_slices,
    unscale,
    volume_scores,
)
from fairdiff_lightning.data.splits import check_disjoint

SIZE = (8, 9, 5)
AFFINE = np.array([[-2.0, 0, 0, 7], [0, 1.5, 0, 20], [0, 0, 3, -40], [0, 0, 0, 1]])
"""Of axes that run to the left, front and head."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path / "cache"))


def store(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def scan(seed=0, size=SIZE):
    return np.round(np.random.default_rng(seed).normal(0, 300, size)).astype(np.float32)


def labels(size=SIZE):
    mask = np.zeros(size, np.uint8)
    mask[1:6, 2:8, 1:4], mask[2, 3:5, 2] = 1, 2
    return mask


def task(root, cases=("a_1", "b_2", "c_3"), modality=("CT",), image=scan, mask=labels, affine=AFFINE, dtype=np.float32):
    for number, case in enumerate(cases):
        volumes = [image(number + 10 * k).astype(dtype) for k in range(len(modality))]
        found = np.stack(volumes, -1) if len(volumes) > 1 else volumes[0]
        store(root / "imagesTr" / f"{case}.nii.gz", found, affine)
        store(root / "labelsTr" / f"{case}.nii.gz", mask(), affine)
    content = {
        "name": "SPLEEN",
        "modality": {str(k): name for k, name in enumerate(modality)},
        "labels": {"0": "background", "1": "organ", "2": "tumour"},
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases],
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def module(root, **options):
    data = DecathlonSliceDataModule(str(root), **{"image_size": 16, "check": True, **options})
    data.prepare_data()
    data.setup()
    return data


def truth(data):
    """Test masks as a perfect network predicts them."""
    records = data.splits["test"]
    return {record.id: data.dataset.read_mask(record) for record in records}


def scores(data, predictions):
    """Case -> score and class -> value, of predicted slices as volumes."""
    found = {}
    for sample, prediction in data.join(predictions):
        spacing = sample["spacing"].tolist()
        measured = volume_scores(prediction[None], sample["mask"][None], data.num_classes, spacing)
        named = {f"{k}/{name}": float(v[0, c]) for k, v in measured.items() for c, name in enumerate(data.classes[1:])}
        found[sample["id"]] = named
    return found


def made_of(data, record, folder, name=None, **changes):
    """Store a slice as a generator would that gives its own image back."""
    sample = data.dataset.read(record)
    change = {"id": name or f"synthetic_{record.id}", "synthetic": torch.tensor(True), "source": record.id}
    return data.write_sample(folder, {**sample, **change, **changes})


def test_preprocessing_is_the_authors(tmp_path, reference):
    y, x = np.mgrid[:48, :80].astype(float)
    disc = (x - 40) ** 2 + (y - 24) ** 2 < 12**2
    picture = np.clip(np.round(40 + 0.8 * x + 30 * np.sin(y / 5) + 90 * disc), 0, 255)
    root = task(
        tmp_path, ("case1",), ("MRI",), lambda _: picture.T[..., None], lambda: disc.T[..., None].astype(np.uint8)
    )
    data = DecathlonSlices(root, protocol="legacy", image_size=(64, 64))
    (record,) = data.index(root).records
    image, mask = SliceFrame((64, 64), legacy=True).decode(data, record)
    wanted, found = reference("diffboost")["preprocess_2d"], 2 * image - 1
    assert (list(image.shape), image.dtype) == (wanted["data"]["shape"], np.float32)
    measured = [found.min(), found.max(), found.mean(), found.std(), *(found[0, r, c] for r, c in ((32, 32), (0, 0)))]
    expected = [wanted["data"][key] for key in ("min", "max", "mean", "std", "px[0,32,32]", "px[0,0,0]")]
    np.testing.assert_allclose(measured, expected, atol=2e-6)
    np.testing.assert_allclose(found[0, 10, 50], wanted["data"]["px[0,10,50]"], atol=2e-6)
    assert int(mask.sum()) == wanted["seg"]["sum"]


@pytest.mark.parametrize("count", [32, 41])
def test_legacy_folds_are_the_authors(tmp_path, reference, count):
    names = [f"p_{number:03d}" for number in np.random.default_rng(0).permutation(count)]
    root = task(tmp_path, names, image=lambda seed: scan(seed, (6, 6, 1)), mask=lambda: np.ones((6, 6, 1), np.uint8))
    for fold, expected in enumerate(reference("diffboost")["kfold_test_[first,last,count]"][str(count)]):
        data = module(root, protocol="legacy", fold=fold)
        held_out = [names.index(record.unit) for record in data.splits["test"]]
        assert [held_out[0], held_out[-1], len(held_out)] == expected
        assert held_out == sorted(held_out)
        assert data.splits["val"] == []


def test_batches_are_of_the_contract_and_shuffled_unless_legacy(tmp_path, reference):
    root = task(tmp_path, [f"p_{k}" for k in range(6)])
    wanted = reference("diffboost")["dataloader_contract"]["train_batch(is_aug)"]
    orders = {}
    for protocol in ("strict", "legacy"):
        data = module(root, protocol=protocol, batch_size=4, image_size=384)
        batch = next(iter(data.train_dataloader()))
        assert wanted["data"].replace("B", "4") == f"{batch['image'].dtype} {tuple(batch['image'].shape)}"[6:].replace(
            ", ", ","
        )
        assert wanted["seg"].replace("B", "4") == f"{batch['mask'].dtype} {tuple(batch['mask'].shape)}"[6:].replace(
            ", ", ","
        )
        validate(batch, num_classes=3, intensity_range=(0, 1), batched=True)
        assert batch["prompt"] == ["Spleen, CT"] * 4
        orders[protocol] = [name for b in data.train_dataloader() for name in b["id"]]
        assert sorted(orders[protocol]) == sorted(record.id for record in data.splits["train"])
        assert ("native_mask" in next(iter(data.val_dataloader()))) == (protocol == "strict")
        tested = [name for b in data.test_dataloader() for name in b["id"]]
        validated = [name for b in data.val_dataloader() for name in b["id"]]
        assert (validated == tested) == (protocol == "legacy")
    assert orders["legacy"] == sorted(orders["legacy"])
    assert orders["strict"] != sorted(orders["strict"])
    assert {parse_slice_id(name)[1] for name in orders["legacy"]} == {1, 2, 3}, "slices with a label only"
    assert {parse_slice_id(name)[1] for name in orders["strict"]} == set(range(5))


def test_folds_cut_no_case_and_test_each_slice_once(tmp_path):
    root = task(tmp_path, [f"p_{k}" for k in range(7)])
    tested = []
    for fold in range(3):
        data = module(root, fold=fold)
        check_disjoint(data.splits)
        cases = {part: {record.unit for record in records} for part, records in data.splits.items()}
        assert all(cases.values())
        assert all(len(data.splits[part]) == 5 * len(found) for part, found in cases.items())
        tested += [record.id for record in data.splits["test"]]
    assert sorted(tested) == [slice_id(f"p_{k}", z) for k in range(7) for z in range(5)]
    with pytest.raises(ValueError, match="fold=3 of k=3"):
        module(root, fold=3)
    assert len(module(root, fold=None, fractions=(0.5, 0.25, 0.25)).splits["val"]) == 10


def test_slices_are_upright_or_as_they_are_stored_and_in_their_place(tmp_path):
    stored = scan()
    for protocol in ("strict", "legacy"):
        root = task(tmp_path / protocol, ("a_1",), image=lambda _: stored)
        data = DecathlonSlices(root, protocol=protocol)
        for record in data.index(root).records:
            z = parse_slice_id(record.id)[1]
            image, mask = data.read_arrays(record)
            upright = protocol == "strict"  # rows from front to back, columns from right to left
            shown = [a[:, ::-1, z].T if upright else a[..., z].T for a in (stored, labels())]
            assert np.array_equal(image[0], shown[0])
            assert np.array_equal(mask, shown[1])
            assert np.array_equal(data.read_mask(record), mask)
            place = data.read_affine(record) @ (2, 3, 0, 1)
            np.testing.assert_allclose(place, AFFINE @ (3, 8 - 2 if upright else 2, z, 1))


def test_z_counts_from_the_feet_whatever_the_order_of_the_file(tmp_path):
    stored = scan(size=(4, 5, 6))
    axes = np.array([[0, 0, 2.0, 0], [1.5, 0, 0, 0], [0, -3, 0, 40], [0, 0, 0, 1]])  # to front, feet and right
    root = task(tmp_path, ("a_1",), image=lambda _: stored, mask=lambda: np.ones((4, 5, 6), np.uint8), affine=axes)
    data = DecathlonSlices(root)
    records = data.index(root).records
    assert [record.id for record in records] == [slice_id("a_1", z) for z in range(5)]
    for z, record in enumerate(records):
        assert np.array_equal(data.read_arrays(record)[0][0], stored[::-1, 4 - z, ::-1])
        assert data.read_affine(record)[2, 3] == 40 - 3 * (4 - z)


@pytest.mark.parametrize("protocol", ["strict", "legacy"])
def test_float32_and_int16_copies_of_a_ct_are_one(tmp_path, protocol):
    found = []
    for dtype in (np.float32, np.int16):
        root = task(tmp_path / np.dtype(dtype).name, dtype=dtype)
        data = module(root, protocol=protocol, image_size=(7, 11))
        samples = [data._data("train")[k] for k in range(len(data.splits["train"]))]
        found.append(torch.stack([sample["image"] for sample in samples]))
    assert torch.equal(*found)
    assert found[0].min() >= 0
    assert found[0].max() > 0.9
    archived = [np.load(file).dtype for file in (tmp_path / "cache" / "volumes").glob("*/0.npy")]
    assert set(archived) == {np.dtype(np.int16)}, "whole numbers take two bytes"


@pytest.mark.parametrize("protocol", ["strict", "legacy"])
@pytest.mark.parametrize("level", [3.0, -1000.0, 0.25])
def test_a_constant_slice_is_zero(tmp_path, protocol, level):
    def image(seed):
        values = scan(seed)
        values[..., 2] = level
        return values

    root = task(tmp_path, ("a_1",), image=image)
    data = DecathlonSlices(root, protocol=protocol, image_size=(8, 8))
    record = next(record for record in data.index(root).records if record.id == "a_1_z002")
    decoded = SliceFrame((8, 8), legacy=protocol == "legacy").decode(data, record)[0]
    assert np.array_equal(decoded, np.zeros((1, 8, 8)))
    assert data.read(record)["image"].abs().max() == 0


@given(st.lists(st.floats(-2000, 3000, width=32), min_size=4, max_size=40))
def test_windows_give_unit_values_and_their_inverse_what_was_not_clipped(values):
    image = np.array(values, np.float32).reshape(1, 1, -1)
    window = slice_window(image)
    unit = scale(image, [window])
    assert np.isfinite(unit).all()
    assert unit.min() >= 0
    assert unit.max() <= 1
    assert window.low >= -256
    inside = (image >= window.low) & (image <= window.high)
    np.testing.assert_allclose(unscale(unit, [window])[inside], image[inside], atol=1e-3)


def test_what_rises_above_a_flat_slice_is_seen():
    flat = np.zeros((100, 100), np.float32)
    flat[3, 4] = 500
    unit = slice_window(flat).to_unit(flat)
    assert unit[3, 4] > 0.99
    assert unit.sum() == unit[3, 4]


def test_percentiles_are_of_each_slice_and_channel_with_a_floor(tmp_path):
    root = task(tmp_path, ("a_1",), ("T2", "ADC"))
    data = DecathlonSlices(root)
    assert (data.channels, data.prompt, DecathlonSlices(root, 1).channels) == (2, "Spleen, MRI", 1)
    for record in data.index(root).records:
        image, _ = data.read_arrays(record)
        sample = data.read(record)
        validate(sample, num_classes=3, intensity_range=(0, 1))
        for raw, unit in zip(image, sample["image"].numpy(), strict=True):
            low, high = np.percentile(raw, (0.5, 99.5))
            low = max(low, -256)
            np.testing.assert_allclose(unit, np.clip((raw - low) / (high - low), 0, 1), atol=1e-6)
        assert np.array_equal(DecathlonSlices(root, 1).read_arrays(record)[0][0], image[1])


def test_a_missing_class_is_no_error_and_scores_nothing(tmp_path):
    def mask():
        return np.minimum(labels(), 1)

    data = module(task(tmp_path, mask=mask), image_size=None)
    batch = next(iter(data.test_dataloader()))
    assert (data.num_classes, batch["mask"].unique().tolist()) == (3, [0, 1])
    (found,) = scores(data, truth(data)).values()
    assert found["dice/organ"] == found["iou/organ"] == 1
    assert found["hd95/organ"] == found["assd/organ"] == 0
    assert all(np.isnan(found[f"{name}/tumour"]) for name in ("dice", "iou", "hd95", "assd"))


def test_the_index_reads_no_voxels(tmp_path):
    root = task(tmp_path)
    for file in root.glob("*/*.nii.gz"):
        if file.parent.name != "labelsTr":
            file.write_bytes(file.read_bytes()[:-100])
    data = DecathlonSlices(root)
    index = data.index(root)
    assert (len(index.records), index.errors) == (15, [])
    with pytest.raises(InvalidSampleError, match=r"imagesTr/a_1.nii.gz: unreadable"):
        data.read_arrays(index.records[0])
    store(root / "imagesTr" / "a_1.nii.gz", scan(9))
    assert data.read_arrays(index.records[0])[0].shape == (1, 9, 8)


@pytest.mark.parametrize("protocol", ["strict", "legacy"])
def test_predicted_slices_become_the_volume_of_the_file(tmp_path, protocol):
    root = task(tmp_path / "real", mask=lambda: labels() + (scan(3) > 100).astype(np.uint8) % 3 * (labels() == 0))
    data = module(root, protocol=protocol)
    for batch in data.predict_dataloader():
        for name, mask in zip(batch["id"], batch["native_mask"], strict=True):
            path = data.write_mask(tmp_path / "out", name, mask)
            assert path == tmp_path / "out" / "masks" / f"{name}.npz"
    names = [record.id for record in data.splits["test"]]
    ((case, path),) = data.write_joined(tmp_path / "out", names).items()
    assert path.name == f"{case}.nii.gz"
    written, stored = nib.load(path), nib.load(root / "labelsTr" / path.name)
    assert path.parent == tmp_path / "out" / "labelsTr"
    assert np.array_equal(np.asarray(written.dataobj), np.asarray(stored.dataobj))
    np.testing.assert_allclose(written.affine, stored.affine)
    assert written.get_data_dtype() == np.uint8


@pytest.mark.parametrize("protocol", ["strict", "legacy"])
def test_cases_that_lack_a_slice_are_named_and_left_out(tmp_path, protocol):
    data = module(task(tmp_path, [f"p_{k}" for k in range(6)]), protocol=protocol)
    found = truth(data)
    cases = list(dict.fromkeys(record.unit for record in data.splits["test"]))
    del found[f"{cases[0]}_z003"]
    of = "(4 of 5)" if protocol == "strict" else "(2 of 3)"
    with pytest.warns(UserWarning, match=f"volumes that lack slices are left out: {cases[0]} .{of[1:-1]}.") as warned:
        assert list(scores(data, found)) == cases[1:]
    assert len([w for w in warned if "lack slices" in str(w.message)]) == 1
    with pytest.raises(ValueError, match="'other' is no case of the test set; expected is one of "):
        data.write_joined(tmp_path / "out", ["other_z001"])
    with pytest.raises(ValueError, match="'other' is no slice"):
        list(data.join({"other": np.zeros((9, 8))}))
    with pytest.raises(InvalidSampleError, match=r"masks/p_0_z000.npz: unreadable"):
        read_predictions(tmp_path, ["p_0_z000"])


def test_scores_are_of_volumes_in_mm(tmp_path):
    data = module(task(tmp_path))
    shifted = {}
    for name, mask in truth(data).items():
        case, z = parse_slice_id(name)
        shifted[slice_id(case, (z + 1) % 5)] = np.minimum(mask, 1)
    (found,) = scores(data, shifted).values()
    organ = labels()[:, ::-1].transpose(1, 0, 2) == 1
    moved = np.roll(labels()[:, ::-1].transpose(1, 0, 2) > 0, 1, -1)
    dice = 2 * (organ & moved).sum() / (organ.sum() + moved.sum())
    assert found["dice/organ"] == pytest.approx(dice)
    assert found["iou/organ"] == pytest.approx((organ & moved).sum() / (organ | moved).sum())
    assert found["hd95/organ"] == pytest.approx(3)  # a slice, mm
    assert found["dice/tumour"] == 0


def test_joined_volumes_are_samples_of_the_contract_in_their_place(tmp_path):
    data = module(task(tmp_path))
    ((sample, prediction),) = data.join(truth(data))
    validate(sample, num_classes=3, intensity_range=(0, 1))
    (record,) = {record.unit: record for record in data.splits["test"]}.values()
    assert torch.equal(prediction, sample["mask"])
    assert sample["spacing"].tolist() == [1.5, 2, 3]
    z = parse_slice_id(record.id)[1]
    assert torch.equal(sample["image"][..., z], data.dataset.read(record)["image"])
    np.testing.assert_allclose(slice_affine(sample["affine"].numpy(), z), data.dataset.read_affine(record))


def test_masks_of_the_samples_size_go_back_into_the_crop(tmp_path):
    data = module(task(tmp_path), crop=4, image_size=12, evaluate_at="input")
    seen = {name: mask for b in data.test_dataloader() for name, mask in zip(b["id"], b["mask"], strict=True)}
    ((sample, prediction),) = data.join({name: mask.numpy() for name, mask in seen.items()})
    inside = torch.zeros_like(prediction, dtype=torch.bool)
    inside[:, 9 // 2 - 2 : 9 // 2 + 2, 8 // 2 - 2 : 8 // 2 + 2] = True
    assert torch.equal(prediction, sample["mask"] * inside)
    assert (sample["mask"] * ~inside).any()


@pytest.mark.parametrize("protocol", ["strict", "legacy"])
def test_every_rank_validates_as_many_steps_and_tests_each_slice_once(tmp_path, protocol):
    data = module(task(tmp_path), protocol=protocol, batch_size=1, fractions=(0.5, 0.5, 0))
    whole = {
        name: [n for b in getattr(data, name)() for n in b["id"]] for name in ("val_dataloader", "test_dataloader")
    }
    assert len(whole["val_dataloader"]) % 2 == len(whole["test_dataloader"]) % 2 == 1, "uneven over two ranks"
    seen = {name: [] for name in whole}
    for rank in range(2):
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        for name, found in seen.items():
            found.append([n for batch in getattr(data, name)() for n in batch["id"]])
    validated, tested = seen.values()
    assert len(validated[0]) == len(validated[1])
    assert {*validated[0], *validated[1]} == {*whole["val_dataloader"]}
    assert sorted(tested[0] + tested[1]) == sorted(whole["test_dataloader"])


def test_stacking_keeps_z_and_stretching_moves_it():
    slices = {z: np.full((2, 3), z) for z in (6, 2, 4)}
    assert stack_slices(slices, 9, stretch=True).shape == (2, 3, 9)
    assert stack_slices(slices, 9, stretch=True)[1, 2].tolist() == [2, 2, 2, 4, 4, 4, 6, 6, 6]
    assert np.array_equal(stack_slices(dict(enumerate(np.eye(3))), 3), np.eye(3).T)
    with pytest.raises(ValueError, match=r"6 of 9 slices are missing, z = \[0, 1, 3, 5, 7\]"):
        stack_slices(slices, 9)
    with pytest.raises(ValueError, match=r"slices \[2\] to \[6\]; expected z from 0 to 5"):
        stack_slices(slices, 6)
    with pytest.raises(ValueError, match=r"slices \[\] to \[\]"):
        stack_slices({}, 6)
    with pytest.raises(ValueError, match=r"shapes \[\(2, 3\), \(3, 3\)\]"):
        stack_slices({**slices, 0: np.zeros((3, 3))}, 9)


def test_stretching_leaves_dice_and_changes_distances():
    mask = np.zeros((20, 20, 16), np.uint8)
    mask[5:12, 5:12, 6:10] = 1
    moved = np.roll(mask, 3, 2)[..., 6:10] | np.roll(mask, 2, 0)[..., 6:10]
    found = []
    for stretch in (False, True):
        stacked = []
        for volume in (moved, mask[..., 6:10]):
            slices = {} if stretch else {z: np.zeros((20, 20), np.uint8) for z in range(16)}
            slices |= {6 + k: volume[..., k] for k in range(4)}
            stacked.append(torch.from_numpy(stack_slices(slices, 16, stretch).astype(np.int64))[None, None])
        found.append(volume_scores(*stacked, 2, (1.0, 1.0, 3.0)))
    assert float(found[1]["dice"]) == pytest.approx(float(found[0]["dice"]))
    assert float(found[1]["assd"]) != pytest.approx(float(found[0]["assd"]), rel=1e-3)
    assert volume_scores(*stacked, 2).keys() == {"dice", "iou"}


def test_legacy_scores_resampled_and_stretched_labels(tmp_path):
    data = module(task(tmp_path), protocol="legacy", image_size=(7, 8))
    (found,) = scores(data, truth(data)).values()
    assert 0 < found["dice/organ"] < 1, "the truth was resampled, the prediction not"
    data = module(tmp_path, protocol="legacy", image_size=None)
    (found,) = scores(data, truth(data)).values()
    assert found["dice/organ"] == found["dice/tumour"] == 1


@pytest.mark.parametrize("modality", [("CT",), ("MRI",), ("T2", "ADC")])
def test_generated_slices_become_volumes_with_the_intensities_and_geometry_of_the_scan(tmp_path, modality):
    root = task(tmp_path / "real", ("a_1", "b_2", "c_3"), modality)
    data = module(root)
    of_case = [record for record in data.splits["train"] if record.unit == data.splits["train"][0].unit]
    chosen = {k: [r for r in of_case if parse_slice_id(r.id)[1] in zs] for k, zs in enumerate([(0, 2, 3), (2,)])}
    for k, records in chosen.items():
        for record in records:
            made_of(data, record, tmp_path / "slices", f"synthetic_{k}_{record.id}")
    write_training_cases(tmp_path / "slices", marks(data.splits["train"]))
    paths = data.write_generated(tmp_path / "slices", tmp_path / "made")
    volumes = {mark.partition("\t")[0] for mark in read_training_cases(tmp_path / "made")}
    assert {r.unit for r in data.splits["train"]} <= volumes, "whole volumes are known by their slices"
    case = of_case[0].unit
    assert [path.name for path in paths] == [f"{case}_synthetic_000.nii.gz", f"{case}_synthetic_001.nii.gz"]
    stored = nib.load(root / "imagesTr" / f"{case}.nii.gz")
    for path, records in zip(paths, chosen.values(), strict=True):
        written, changed = nib.load(path), {parse_slice_id(record.id)[1] for record in records}
        np.testing.assert_allclose(written.affine, stored.affine)
        assert written.shape == stored.shape
        assert written.get_data_dtype() == (np.int16 if modality == ("CT",) else np.float32)
        again, before = (np.asarray(v.dataobj, np.float64).reshape(*SIZE, -1) for v in (written, stored))
        for k in range(len(modality)):
            for z in range(5):
                window = slice_window(before[..., z, k])
                clipped = np.clip(before[..., z, k], window.low, window.high)
                expected = clipped if z in changed else before[..., z, k]
                assert np.abs(again[..., z, k] - expected).max() <= 0.5, "half a level"
    made = Decathlon(tmp_path / "made").index(tmp_path / "made").records
    assert [(r.id, r.synthetic, r.source) for r in made] == [(p.name[:-7], True, case) for p in paths]
    assert np.array_equal(np.asarray(nib.load(made[0].files["mask"]).dataobj), labels())


@pytest.mark.parametrize("protocol", ["strict", "legacy"])
@pytest.mark.parametrize(("crop", "size"), [(None, (18, 4)), (6, (12, 12)), (6, (5, 5))])
def test_resized_and_cropped_slices_are_put_where_they_were_cut_out(tmp_path, protocol, crop, size):
    root = task(tmp_path / "real", mask=lambda: np.ones(SIZE, np.uint8))
    data = module(root, protocol=protocol, crop=crop, image_size=size)
    record = data.splits["train"][3]
    sample = {
        **data._data("train")[3],
        **data.frame.condition(data.dataset, record),
        "image": torch.full((1, *size), 0.5),
    }
    made_of(data, record, tmp_path / "slices", **{key: sample[key] for key in ("image", "mask", "affine")})
    (path,) = data.write_generated(tmp_path / "slices", tmp_path / "made")
    case, z = parse_slice_id(record.id)
    stored, found = (
        np.asarray(nib.load(file).dataobj, np.float32) for file in (root / "imagesTr" / f"{case}.nii.gz", path)
    )
    shown, rows, columns = data.dataset.read_arrays(record)[0], slice(0, 9), slice(0, 8)
    if crop is not None:
        rows, columns = slice(1, 7), slice(1, 7)
    if protocol == "legacy":
        shown = spline(shown[:, rows, columns], size)
    elif crop is not None:
        rows = slice(9 - 7, 9 - 1)  # of the file, whose rows run to the front
    inside = np.zeros(SIZE, bool)
    inside[columns, rows, z] = True
    assert np.array_equal(found[~inside], np.round(stored[~inside])), "the rest is the scan's own"
    window = slice_window(shown)
    assert np.abs(found[inside] - (window.low + window.high) / 2).max() <= 0.5 + 1e-3


def test_slices_without_a_place_or_of_another_case_are_refused(tmp_path):
    data = module(task(tmp_path / "real"))
    record = data.splits["train"][1]
    sample = data.dataset.read(record)
    sample["affine"][0, 3] += 1
    for number, (change, message) in enumerate(
        (
            ({"affine": sample["affine"]}, r"synthetic_a.npz: image \(1, 9, 8\) with the affine .*a crop of '.*_z001'"),
            ({"source": "other_z001"}, "the source 'other_z001'. Expected a slice of '"),
            ({"source": record.unit}, "the source '._.'. Expected a slice of '"),
            ({"source": ""}, "the source ''. Expected a slice of '"),
        )
    ):
        folder = tmp_path / str(number)
        made_of(data, record, folder, "synthetic_a", **change)
        with pytest.raises(InvalidSampleError, match=message):
            data.write_generated(folder, tmp_path / "made")
    unplaced = {key: value for key, value in data.dataset.read(record).items() if key != "affine"}
    data.write_sample(tmp_path / "un", {**unplaced, "id": "s", "synthetic": torch.tensor(True), "source": record.id})
    with pytest.raises(InvalidSampleError, match="without a place"):
        data.write_generated(tmp_path / "un", tmp_path / "made")
    (tmp_path / "un" / "slices" / "s.npz").write_bytes(b"PK")
    with pytest.raises(InvalidSampleError, match=r"s.npz: unreadable"):
        data.write_generated(tmp_path / "un", tmp_path / "made")


@pytest.mark.parametrize("synthetic", [True, False])
def test_a_written_slice_reads_back(tmp_path, synthetic):
    columns = {"stage": ("T1", "T2")}
    root = task(tmp_path / "real")
    data = DecathlonSlices(root, columns=columns)
    sample = data.read(data.index(root).records[2])
    draws = np.random.default_rng(0)
    made = {
        **sample,
        "image": torch.from_numpy(draws.uniform(0, 1, (1, 9, 8)).astype(np.float32)),
        "attributes": {"stage": torch.tensor(1)},
        "id": "synthetic_0",
        "synthetic": torch.tensor(synthetic),
        "source": "a_1_z002" if synthetic else "",
    }
    assert data.write(tmp_path / "made", made) == tmp_path / "made" / "slices" / "synthetic_0.npz"
    (record,) = data.index(tmp_path / "made").records
    assert (record.synthetic, record.source) == (synthetic, "a_1_z002" if synthetic else None)
    again = data.read(record)
    validate(again, num_classes=3, attributes=list(data.attributes.values()), intensity_range=(0, 1))
    for key in ("image", "mask", "affine"):
        assert torch.equal(again[key], made[key])
    assert again["attributes"] == made["attributes"]
    assert np.array_equal(data.read_mask(record), again["mask"][0])
    unplaced = {key: value for key, value in made.items() if key != "affine"}
    data.write(tmp_path / "made", unplaced)
    assert "affine" not in data.read(record)
    with pytest.raises(ValueError, match=r"image \(2, 9, 8\); expected \(1, H, W\)"):
        data.write(tmp_path, {**made, "image": torch.zeros(2, 9, 8)})


def test_synthetic_slices_join_the_training_set_unless_their_case_is_held_out(tmp_path):
    root = task(tmp_path / "real", [f"p_{k}" for k in range(6)])
    data = module(root)
    for number, part in enumerate(("train", "test")):
        record = data.splits[part][1]
        sample = {**data.dataset.read(record), "id": f"made_{number}", "synthetic": torch.tensor(True)}
        data.write_sample(tmp_path / part, {**sample, "source": record.id})
    mixed = module(root, synthetic=[str(tmp_path / "train")])
    (made,) = [record for record in mixed.splits["train"] if record.synthetic]
    assert made.source == data.splits["train"][1].id
    sample = mixed._data("train")[mixed.splits["train"].index(made)]
    original = data._data("train")[1]
    torch.testing.assert_close(sample["image"], original["image"])
    other = data.splits["test"][1]
    with pytest.raises(ValueError, match=f"derived from the validation or test case '{other.id}'"):
        module(root, synthetic=[str(tmp_path / "test")])


@pytest.mark.parametrize("protocol", ["strict", "legacy"])
def test_a_slice_is_merged_with_what_was_made_from_it_and_not_from_its_neighbour(tmp_path, protocol):
    root = task(tmp_path / "real")
    data = module(root, protocol=protocol, image_size=None)
    for number, record in enumerate(data.splits["train"]):
        sample = {**data.dataset.read(record), "id": f"made_{number}", "synthetic": torch.tensor(True)}
        sample["image"] = torch.full_like(sample["image"], parse_slice_id(record.id)[1] / 10)
        data.write_sample(tmp_path / "made", {**sample, "source": record.id})
    options = {"synthetic": [str(tmp_path / "made")], "merge": PatchMerge(num_synthetic=2), "image_size": None}
    merged = module(root, protocol=protocol, **options)
    seen = [(name, image) for b in merged.train_dataloader() for name, image in zip(b["id"], b["partner"], strict=True)]
    assert [record.id for record in data.splits["train"]] == sorted(name for name, _ in seen)
    assert all(torch.allclose(image, torch.tensor(parse_slice_id(name)[1] / 10)) for name, image in seen)
    assert ([name for name, _ in seen] == sorted(name for name, _ in seen)) == (protocol == "legacy")


def test_requests_carry_prompt_and_place_and_generated_slices_keep_them(tmp_path):
    root = task(tmp_path / "real")
    data = module(root, generate=GenerationPlan(total=2, masks="train"), prompt="Organ, CT", image_size=(18, 16))
    batch = next(iter(data.predict_dataloader()))
    assert batch["prompt"] == ["Organ, CT"] * 2
    assert batch["mask"].shape == (2, 1, 18, 16)
    z = [parse_slice_id(source)[1] for source in batch["source"]]
    affine = batch["affine"]
    assert affine[:, 2, 3].tolist() == [-40 + 3 * k for k in z]
    np.testing.assert_allclose(affine[:, :3, :3].norm(dim=1), [[0.75, 1, 3]] * 2)
    corner = np.array([-0.5, -0.5, 0, 1])
    native = data.dataset.read_affine(next(r for r in data.splits["train"] if r.id == batch["source"][0]))
    np.testing.assert_allclose(affine[0].numpy() @ corner, native @ corner)
    sample = {"image": torch.rand(1, 18, 16), "mask": batch["mask"][0], "attributes": {}, "id": batch["id"][0]}
    data.write_sample(tmp_path / "made", {**sample, "affine": affine[0], "source": batch["source"][0]})
    (record,) = data.dataset.index(tmp_path / "made").records
    assert np.array_equal(data.dataset.read_affine(record), affine[0])
    assert record.source == batch["source"][0]


def test_samples_and_requests_carry_edges(tmp_path):
    root = task(tmp_path / "real")
    plan = GenerationPlan(total=1, masks="train")
    data = module(root, edges=CannyEdges(), image_size=12, generate=plan, crop=6, cache="disk")
    sample = data._data("train")[2]
    assert sample["edge"].shape == (1, 12, 12)
    assert repr(data.frame) == repr(module(root, edges=CannyEdges(), image_size=12, crop=6).frame)
    request = next(iter(data.predict_dataloader()))
    assert set(request) >= {"edge", "mask", "affine", "prompt", "seed"}
    corner, native = np.array([-0.5, -0.5, 0, 1]), data.dataset.read_affine(data.splits["train"][0])
    place = (np.linalg.inv(native) @ request["affine"][0].numpy() @ corner)[:2]
    np.testing.assert_allclose(place, [9 // 2 - 3 - 0.5, 8 // 2 - 3 - 0.5])


@pytest.mark.parametrize("storage", ["none", "memory", "disk"])
def test_caches_change_nothing(tmp_path, storage):
    root = task(tmp_path)
    data = module(root, cache=storage, image_size=(6, 12))
    for _ in range(2):
        for record, k in zip(data.splits["train"], range(10), strict=False):
            expected = data.frame.decode(data.dataset, record)[0]
            assert np.array_equal(data._data("train")[k]["image"], expected)


def test_the_phantom_is_split_and_scored(tmp_path):
    data = DecathlonSliceDataModule(image_size=None, num_folds=4, channel=0)
    data.prepare_data()
    data.setup()
    assert {part: len({r.unit for r in found}) for part, found in data.splits.items()}["test"] == 3
    found = scores(data, truth(data))
    assert len(found) == 3
    assert all(s["dice/PZ"] == 1 and s["hd95/TZ"] == 0 for s in found.values())
    assert data._data("train")[0]["prompt"] == "Phantom, MRI"


def test_bad_input_is_named(tmp_path):
    root = task(tmp_path / "real")
    with pytest.raises(ValueError, match="protocol='quick'; expected is 'strict' or 'legacy'"):
        DecathlonSlices(root, protocol="quick")
    with pytest.raises(DatasetNotFoundError, match="no such folder"):
        DecathlonSlices(root).index(tmp_path / "none")
    data = DecathlonSlices(root)
    record = data.index(root).records[0]
    for change, message in (
        (np.full(SIZE, np.nan, np.float32), "NaN or infinite"),
        (np.zeros((*SIZE, 2), np.float32), r"2 volumes. Expected those of dataset.json"),
        (np.zeros((8, 9, 6), np.float32), r"mask of \(9, 8, 5\) voxels for an image of \(9, 8, 6\)"),
    ):
        store(root / "imagesTr" / "a_1.nii.gz", change)
        with pytest.raises(InvalidSampleError, match=message):
            data.read_arrays(record)
    store(root / "labelsTr" / "b_2.nii.gz", labels() + np.uint8(5))
    legacy = DecathlonSlices(root, protocol="legacy").index(root)
    assert {record.unit for record in legacy.records} == {"c_3"}
    assert [str(error).split(": ")[1][:11] for error in legacy.errors] == ["mask of (9,", "mask values"]
    other = task(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"no slice of '.*other' has labels that sum to more than 20 at image_size=\(2, 2\)"
    ):
        DecathlonSlices(other, protocol="legacy", image_size=(2, 2)).index(other)
    named = task(tmp_path / "named", ("a_z001", "b"))
    assert "a case named 'a_z001'" in str(DecathlonSlices(named).index(named).errors[0])


def test_archives_that_are_no_slices_are_named(tmp_path):
    root, made = task(tmp_path / "real"), tmp_path / "made"
    data = DecathlonSlices(root)
    sample = {**data.read(data.index(root).records[0]), "id": "x"}
    path = data.write(made, sample)
    (record,) = data.index(made).records
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **{**arrays, "mask": arrays["mask"] + np.uint8(7)})
    with pytest.raises(InvalidSampleError, match=r"x.npz: mask values \[7"):
        data.read_arrays(record)
    np.savez(path, notes=arrays["notes"])
    with pytest.raises(InvalidSampleError, match=r"x.npz: no image, mask. Expected the keys"):
        data.read_arrays(record)
    np.savez(path, notes=np.array("{"))
    assert "[notes]: unreadable" in str(data.index(made).errors[0])
    path.write_bytes(b"PK")
    assert str(data.index(made).errors[0]).startswith(f"{path}: unreadable")


def test_names_of_slices():
    assert slice_id("spleen_2", 7) == "spleen_2_z007"
    assert parse_slice_id("folder/a_z1_z1234") == ("folder/a_z1", 1234)
    names = ["a_z001", "b_z000", "a_z000"]
    assert by_case(names) == {"a": {1: "a_z001", 0: "a_z000"}, "b": {0: "b_z000"}}
    assert DecathlonSlices().case_key("a_z012") == DecathlonSlices().case_key("a") == "a"
    np.testing.assert_allclose(resized_affine(np.eye(4), (8, 6), (4, 6))[:2], [[2, 0, 0, 0.5], [0, 1, 0, 0]])


@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.integers(1, 20))
def test_the_region_of_a_resized_crop_is_found_again(top, left, height, width, side):
    cut = AFFINE.copy()
    cut[:3, 3] += AFFINE[:3, :2] @ (top, left)
    placed = resized_affine(cut, (height, width), (side, side + 1))
    region = region_of(placed, (side, side + 1), AFFINE, (top + height, left + width))
    assert region == (top, left, height, width)
    assert region_of(placed, (side, side + 1), AFFINE, (top + height - 1, left + width)) is None
    assert region_of(slice_affine(placed, 1), (side, side + 1), AFFINE, (20, 20)) is None, "of the next slice"
    assert region_of(placed[:, [1, 0, 2, 3]], (side, side + 1), AFFINE, (20, 20)) is None, "turned"


@pytest.mark.parametrize("protocol", ["strict", "legacy"])
def test_real_hippocampi_go_to_slices_and_back(realdata, tmp_path, protocol):
    real, root = realdata / "MSD" / "Task04_Hippocampus", tmp_path / "real"
    root.mkdir()
    content = json.loads((real / "dataset.json").read_text())
    content["training"] = content["training"][:6]
    (root / "dataset.json").write_text(json.dumps(content))
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).symlink_to(real / folder)
    data = module(root, protocol=protocol, image_size=None, batch_size=1, fold=1)
    assert data.dataset.prompt == "Hippocampus, MRI"
    assert len(data.splits["test"]) > 20
    for loader in (data.train_dataloader(), data.test_dataloader()):
        validate(next(iter(loader)), num_classes=3, intensity_range=(0, 1), batched=True)
    found = truth(data)
    assert all(s["dice/Anterior"] == s["dice/Posterior"] == 1 for s in scores(data, found).values())
    if protocol == "strict":
        for name, mask in found.items():
            data.write_mask(tmp_path / "out", name, mask)
        for path in data.write_joined(tmp_path / "out", found).values():
            written, stored = nib.load(path), nib.load(real / "labelsTr" / path.name)
            assert np.array_equal(np.asarray(written.dataobj), np.asarray(stored.dataobj))
            np.testing.assert_allclose(written.affine, stored.affine)
