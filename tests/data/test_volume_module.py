import nibabel as nib
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from fairdiff_lightning.data import (
    LIDC,
    EmidecDataModule,
    GenerationPlan,
    InvalidSampleError,
    LIDCDataModule,
    Prostate,
    ProstateDataModule,
    RandomMirror,
    Volume,
    validate,
)
from fairdiff_lightning.data.classical_augmentation import ClassicalAugmentation
from fairdiff_lightning.data.patches import PatchSampler
from fairdiff_lightning.data.phantoms_3d import chest
from fairdiff_lightning.data.resample import move, restore_volumes, to_spacing
from fairdiff_lightning.data.volumes import write_volume
from fairdiff_lightning.modules import Segmenter


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def ready(module_class=LIDCDataModule, **arguments):
    data = module_class(**({"batch_size": 2} | arguments))
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize(
    ("module_class", "arguments", "shape"),
    [
        (LIDCDataModule, {}, (64, 64, 32)),
        (EmidecDataModule, {}, (72, 72, 10)),
        (LIDCDataModule, {"image_size": (40, 70, 20)}, (40, 70, 20)),
        (LIDCDataModule, {"image_size": None, "spacing": (1.4, 1.4, 2.5)}, (32, 32, 16)),
    ],
)
def test_every_loader_yields_the_contract(module_class, arguments, shape):
    data = ready(module_class, **arguments)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batch = next(iter(loader))
        facts = {"num_classes": data.num_classes, "intensity_range": data.intensity_range}
        validate(batch, attributes=data.attribute_specs, batched=True, **facts)
        assert batch["image"].shape[1:] == (1, *shape)
        assert batch["affine"].shape[1:] == (4, 4)
        assert torch.allclose(batch["spacing"].double(), batch["affine"][:, :3, :3].norm(dim=1))


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        ({"mirror": False}, True),
        ({"mirror": True}, False),
        ({"augmentation": ClassicalAugmentation("gamma")}, False),
        ({"augmentation": "mirror"}, False),
    ],
)
def test_mirroring_may_be_left_out_and_augmentations_given(arguments, same):
    data = LIDCDataModule(**arguments)
    batch = {"image": torch.rand(8, 1, 4, 4, 2), "mask": torch.zeros(8, 1, 4, 4, 2, dtype=torch.int64)}
    changed = data.augment(dict(batch), torch.Generator().manual_seed(0))
    assert torch.equal(changed["image"], batch["image"]) == same


def test_padding_is_air_and_keeps_the_place_in_the_patient():
    data = ready(image_size=(80, 64, 32))
    sample = data._data("train")[0]
    assert (sample["image"][:, :8] == 0).all()
    record = data._data("train").records[0]
    image, mask = data.dataset.read_volumes(record)
    inside = np.argwhere(mask.array)[0]
    there = np.argwhere(sample["mask"][0].numpy())[0]
    assert image.affine @ [*inside, 1] == pytest.approx(sample["affine"].numpy() @ [*there, 1])


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
def test_blocks_are_drawn_around_lesions_from_any_cache(cache):
    data = ready(image_size=None, patch_size=(16, 16, 8), positive=1.0, cache=cache)
    train, record = data._data("train"), data._data("train").records[3]
    first, again, later, repeated = train[3, 0, 0], train[3, 0, 0], train[3, 1, 0], train[3, 0, 1]
    assert first["image"].shape == (1, 16, 16, 8)
    assert first["mask"].any()
    assert torch.equal(again["image"], first["image"])
    for other in (later, repeated):
        assert not torch.equal(other["image"], first["image"])
    image, _ = data.dataset.read_volumes(record)
    whole = data.dataset.window.to_unit(image.array)
    for block in (first, later):
        start = np.round(np.linalg.solve(image.affine, block["affine"].numpy())[:3, 3]).astype(int)
        there = whole[tuple(slice(s, s + n) for s, n in zip(start, (16, 16, 8), strict=True))]
        assert np.array_equal(there, block["image"][0].numpy()), "the affine tells the block's own place"
    assert data._data("val")[0]["image"].shape == (1, 64, 64, 32), "validation sees whole volumes"


def test_volumes_of_unequal_size_are_evaluated_one_by_one():
    data = ready(image_size=None, patch_size=(16, 16, 8), batch_size=4)
    sizes = [next(iter(loader()))["image"].shape[0] for loader in (data.train_dataloader, data.val_dataloader)]
    assert sizes == [4, 1]
    assert next(iter(ready(batch_size=3).val_dataloader()))["image"].shape[0] == 3


def test_volumes_smaller_than_the_block_are_padded():
    data = ready(image_size=None, patch_size=(96, 16, 40))
    assert data._data("train")[0]["image"].shape == (1, 96, 16, 40)
    assert data._data("val")[0]["image"].shape == (1, 96, 64, 40)


def unequal(root):
    """A folder of three prostates, the third of which is larger."""
    for k, side in enumerate((10, 10, 12)):
        shape = (side, 9, 6)
        image = np.random.default_rng(k).integers(-200, 200, shape).astype(np.int16)
        mask = np.zeros(shape, np.uint8)
        mask[4:6, 4:6, 2:4] = 1
        for folder, array in (("images", image), ("masks", mask)):
            write_volume(root / folder / f"{k}.nii.gz", Volume(array, np.diag([2.0, 2, 3, 1])))
    return str(root)


def test_volumes_that_make_no_batch_are_refused_before_the_first(tmp_path):
    root = unequal(tmp_path)
    plain = {"root": root, "attributes": (), "fractions": (1.0, 0.0, 0.0), "image_size": None, "patch_size": None}
    plain |= {"crop_foreground": False, "spacing": None}
    for spacing in (None, (1.0, 1.0, 3.0)):
        data = ready(ProstateDataModule, **(plain | {"spacing": spacing}))
        with pytest.raises(ValueError, match=r"samples of \(.*needs one size. Give patch_size, .* or image_size"):
            data.train_dataloader()
    with pytest.raises(ValueError, match=r"crop_foreground=True gives each volume a size of its own.*Give patch_size"):
        ready(ProstateDataModule, **(plain | {"crop_foreground": True})).train_dataloader()
    # in voxels of 20 mm all have the same sides
    for change in ({"batch_size": 1}, {"patch_size": (4, 4, 4)}, {"image_size": (8, 8, 4)}, {"spacing": (20.0, 2, 3)}):
        batches = list(ready(ProstateDataModule, **(plain | change)).train_dataloader())
        assert sum(len(batch["id"]) for batch in batches) == 3


def test_masks_of_no_case_have_no_grid(tmp_path):
    data = ready()
    with pytest.raises(
        ValueError, match=r"'nobody' is none of the \d+ cases of .* that can be predicted; expected is one of"
    ):
        data.write_mask(tmp_path, "nobody", torch.zeros(1, 64, 64, 32, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spacing", (-1.0, 1.0, 3.0)),
        ("spacing", (0.0, 1.0, 3.0)),
        ("spacing", (float("nan"), 1.0, 1.0)),
        ("patch_size", (0, 4, 4)),
        ("patch_size", (4, 4)),
        ("image_size", (-8, 8, 8)),
        ("image_size", (8.5, 8, 8)),
    ],
)
def test_sizes_that_cannot_be_are_named(name, value):
    sizes = {"image_size": None, "patch_size": None, name: value}
    with pytest.raises(ValueError, match=rf"{name}=\(.*\); expected are three .* above 0, or None"):
        ProstateDataModule(**sizes)
    with pytest.raises(ValueError, match="predict_on='train'; expected is 'new' or 'test'"):
        ProstateDataModule(predict_on="train")


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_native_masks_are_decoded_once(tmp_path, monkeypatch, cache):
    sizes = {"patch_size": None, "image_size": (8, 8, 4), "spacing": (4.0, 4.0, 3.0), "cache": cache}
    fractions = (0.0, 1.0, 0.0)
    data = ready(
        ProstateDataModule, root=unequal(tmp_path), attributes=(), fractions=fractions, evaluate_at="native", **sizes
    )
    first = list(data.val_dataloader())
    monkeypatch.setattr(Prostate, "read_labels", None)
    again = list(data.val_dataloader())
    for one, other in zip(first, again, strict=True):
        assert one["id"] == other["id"]
        for before, after in zip(one["native_mask"], other["native_mask"], strict=True):
            assert torch.equal(before, after)
            assert before.sum() == 2 * 2 * 2


def test_share_of_blocks_around_the_foreground():
    mask = np.zeros((40, 40, 20), np.uint8)
    mask[30:34, 3:6, 15] = 1
    for share, expected in ((1.0, 200), (0.0, 20)):
        sampler = PatchSampler((8, 8, 8), share)
        found = sum(mask[sampler.draw(mask, k)].any() for k in range(200))
        assert found == 200 if share == 1.0 else found < expected
    assert PatchSampler((40, 40, 20), 1.0).draw(mask) == (slice(0, 40), slice(0, 40), slice(0, 20))
    with pytest.raises(ValueError, match="a share of the blocks"):
        PatchSampler((8, 8, 8), 1.5)


def test_mirroring_moves_image_and_mask_alike_and_each_sample_on_its_own():
    image = torch.rand(16, 1, 4, 5, 6)
    mask = (image > 0.5).long()
    moved, labels = RandomMirror((0, 2))(image, mask, torch.Generator().manual_seed(1))
    assert torch.equal(labels, (moved > 0.5).long())
    ways = [image, image.flip(2), image.flip(4), image.flip(2, 4)]
    chosen = [next(k for k, way in enumerate(ways) if torch.equal(moved[i], way[i])) for i in range(16)]
    assert len(set(chosen)) == 4
    louder, same = RandomMirror((), intensity=0.2, p_intensity=1.0)(image, mask, torch.Generator().manual_seed(1))
    assert torch.equal(same, mask)
    assert 0 <= louder.min() < louder.max() <= 1
    assert not torch.equal(louder, image)


def test_foreground_crop_takes_the_box_of_what_is_no_air():
    data = ready(image_size=None, crop_foreground=True, root=None)
    sample = data._data("train")[0]
    assert all(side <= full for side, full in zip(sample["image"].shape[1:], (64, 64, 32), strict=True))
    box = sample["image"][0] > 0
    assert all(box.any(dim=d).any() for d in range(3))


@pytest.mark.parametrize("block", [(6, 5, 4), (14, 9, 9)])
def test_blocks_go_back_to_their_place(block):
    native = torch.randint(3, (1, 1, 10, 9, 8), generator=torch.Generator().manual_seed(0))
    volume = Volume(native[0, 0].numpy(), np.diag([2.0, 1.0, 3.0, 1.0]))
    from fairdiff_lightning.data.volumes import crop_or_pad

    part = crop_or_pad(volume, block, 0)
    logits = torch.nn.functional.one_hot(torch.from_numpy(part.array), 3).permute(3, 0, 1, 2)[None].float()
    places = (torch.from_numpy(part.affine)[None], torch.from_numpy(volume.affine)[None], torch.tensor([[10, 9, 8]]))
    mask = restore_volumes(logits, *places)
    inside = crop_or_pad(volume.with_array(np.ones_like(volume.array)), block, 0)
    kept = move(torch.from_numpy(inside.array)[None], places[0][0], places[1][0], (10, 9, 8))
    assert torch.equal(mask[0], native[0] * kept)
    two = restore_volumes(logits.repeat(2, 1, 1, 1, 1), *(p.repeat(2, *[1] * (p.dim() - 1)) for p in places))
    assert torch.equal(two[0], two[1])
    sizes = torch.tensor([[10, 9, 8], [10, 9, 9]])
    unequal = restore_volumes(logits.repeat(2, 1, 1, 1, 1), *(p.repeat(2, 1, 1) for p in places[:2]), sizes)
    assert [tuple(m.shape) for m in unequal] == [(1, 10, 9, 8), (1, 10, 9, 9)]


def test_other_spacings_come_back_to_the_file_grid():
    """Told by the place of a lopsided shape on an oblique grid: a voxel's shift would move it by 1 mm or more."""
    truth = np.zeros((24, 22, 14), np.uint8)
    truth[6:18, 8:16, 3:9] = 1
    truth[6:9, 8:16, 9:12], truth[6:18, 16:18, 3:5] = 1, 1
    angle = np.deg2rad(8)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([1.0, 1.0, 2.0]), (-120.0, 85.0, 430.0)
    volume = Volume(truth, affine)
    coarse = to_spacing(volume, (1.5, 1.3, 2.0), "nearest")
    assert coarse.shape == (16, 17, 14)
    assert coarse.array.dtype == np.uint8
    logits = torch.nn.functional.one_hot(torch.from_numpy(coarse.array).long(), 2).permute(3, 0, 1, 2)[None] * 8.0
    affines = (torch.from_numpy(v.affine)[None] for v in (coarse, volume))
    mask = restore_volumes(logits, *affines, torch.tensor([truth.shape]))[0, 0].numpy()

    def centre(array, affine):
        return affine[:3, :3] @ np.argwhere(array).mean(0) + affine[:3, 3]

    np.testing.assert_allclose(centre(coarse.array, coarse.affine), centre(truth, affine), atol=0.5)  # mm
    np.testing.assert_allclose(centre(mask, affine), centre(truth, affine), atol=0.5)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.93
    assert to_spacing(volume, (1, 1, 2), "nearest") is volume


def test_segmenting_volumes_end_to_end(tmp_path):
    data = ready(EmidecDataModule, image_size=(64, 64, 8), evaluate_at="native", batch_size=4)
    network = {"channels": (4, 8), "strides": (2,)}
    facts = {"num_classes": 5, "in_channels": 1, "image_size": (64, 64, 8)}
    model = Segmenter("unet", network, **facts, surface_metrics=True, mirror=(0,), tolerance=2.0)
    limits = {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1, "limit_predict_batches": 1}
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, accelerator="cpu", logger=False, **limits)
    trainer.fit(model, data)
    (scores,) = trainer.test(model, data)
    assert 0 <= scores["test/dice"] <= 1
    assert scores["test/assd"] >= 0
    (predicted, *_) = trainer.predict(model, data)
    assert predicted["mask"].shape == (4, 1, 80, 76, 10)
    file = data.write_mask(tmp_path / "made", predicted["id"][0], predicted["mask"][0])
    record = data.splits["test"][0]
    assert np.allclose(nib.load(file).affine, nib.load(record.files["image"]).affine)
    assert nib.load(file).shape == nib.load(record.files["image"]).shape


def test_lesions_for_healthy_blocks_follow_masks_of_their_own_or_of_training():
    own = ready(generate=GenerationPlan(per_group=2, masks="own", backgrounds="healthy"))
    request = own.requests()[0]
    assert request.background is request.condition
    batch = next(iter(own.predict_dataloader()))
    assert batch["source"][0] == request.background.id
    scan = own.dataset.read_image(request.background)
    assert np.allclose(batch["image"][0, 0].numpy(), own.dataset.window.to_unit(scan.array))
    assert np.allclose(batch["affine"][0].numpy(), scan.affine)

    train = ready(generate=GenerationPlan(per_group=2, masks="train", backgrounds="healthy"))
    asked = train.requests()
    assert {r.condition.attributes["texture"] for r in asked if r.group == 2} == {2}
    assert all(r.source == r.background.id for r in asked)
    assert next(iter(train.predict_dataloader()))["mask"].any()

    again = ready(generate=GenerationPlan(total=4, masks="own", backgrounds="train"))
    assert all(r.background.attributes["texture"] == r.group for r in again.requests())


def test_lesions_for_whole_scans_lie_in_the_lungs(tmp_path):
    found = chest(np.random.default_rng(0), nodules=0)
    write_volume(tmp_path / "scan.nii.gz", found.image)
    plan = GenerationPlan(per_group=1, masks="train", backgrounds=str(tmp_path))
    data = ready(image_size=(32, 32, 16), generate=plan, batch_size=3)
    batch = next(iter(data.predict_dataloader()))
    assert batch["image"].shape == (3, 1, 32, 32, 16)
    assert batch["source"] == ["scan"] * 3
    lungs = Volume(found.lungs.array, found.image.affine)
    for mask, affine in zip(batch["mask"], batch["affine"], strict=True):
        at = np.argwhere(mask[0].numpy())
        assert len(at)
        voxels = np.linalg.inv(lungs.affine) @ affine.numpy() @ np.c_[at, np.ones(len(at))].T
        assert lungs.array[tuple(np.round(voxels[:3]).astype(int))].all()


def test_whole_scans_are_seen_at_the_spacing_of_training(tmp_path):
    write_volume(tmp_path / "LIDC-IDRI-9999.nii.gz", chest(np.random.default_rng(0), nodules=0).image)
    plan = GenerationPlan(per_group=1, masks="train", backgrounds=str(tmp_path))
    data = ready(image_size=(24, 24, 12), spacing=(3.0, 3.0, 5.0), generate=plan, batch_size=3)
    batch = next(iter(data.predict_dataloader()))
    np.testing.assert_allclose(batch["spacing"], [[3, 3, 5]] * 3, atol=1e-4)
    own = data.dataset.read_labels(data.requests()[0].condition)
    asked = own.array.sum() * np.prod(own.spacing)
    assert float(batch["mask"][0].sum()) * 45 == pytest.approx(asked, rel=0.3), "a lesion keeps its size in mm"
    small = ready(image_size=(4, 4, 2), spacing=(3.0, 3.0, 5.0), generate=plan)
    with pytest.raises(InvalidSampleError, match="one that fits into the block"):
        next(iter(small.predict_dataloader()))


def test_scans_of_held_out_patients_are_left_out(tmp_path):
    image = chest(np.random.default_rng(0), nodules=0).image
    held_out = sorted({r.unit for r in ready().splits["test"]})[0]
    write_volume(tmp_path / held_out / "01-01-2000" / "scan.nii.gz", image)
    plan = GenerationPlan(per_group=1, masks="train", backgrounds=str(tmp_path))
    with pytest.raises(ValueError, match="case is not held out"):
        ready(generate=plan).requests()
    write_volume(tmp_path / "LIDC-IDRI-9999" / "scan.nii.gz", image)
    assert {r.background.id for r in ready(generate=plan).requests()} == {"LIDC-IDRI-9999-scan"}


def test_scans_that_show_other_lesions_are_refused():
    with pytest.raises(ValueError, match="they would have no label"):
        GenerationPlan(total=1, masks="train", backgrounds="train")


def test_without_a_known_group_samples_are_of_none(tmp_path):
    LIDC().write_phantom(tmp_path, 0)
    (tmp_path / "Pathological" / "nodules.csv").unlink()
    plan = GenerationPlan(total=2, masks="own", backgrounds="train")
    with pytest.warns(UserWarning, match="'texture' is unknown for all training samples"):
        asked = ready(root=str(tmp_path), generate=plan).requests()
    assert [request.group for request in asked] == [-1, -1]


def test_an_offset_is_that_of_the_scanner_and_not_of_generated_samples(tmp_path):
    data = ready(generate=GenerationPlan(per_group=1, masks="own", backgrounds="healthy"))
    batch = next(iter(data.predict_dataloader()))
    one = {k: batch[k][0] for k in ("image", "mask", "affine", "id", "source")}
    data.write_sample(tmp_path, {**one, "attributes": {}, "synthetic": torch.tensor(True)})
    (record,) = LIDC(hu_offset=-1024).index(tmp_path).records
    plain = LIDC().read_image(record).array
    assert np.array_equal(LIDC(hu_offset=-1024).read_image(record).array, plain)


def test_a_scan_without_lungs_is_refused(tmp_path):
    write_volume(tmp_path / "phantom.nii.gz", Volume(np.full((40, 40, 20), -50, np.int16), np.eye(4)))
    data = ready(generate=GenerationPlan(per_group=1, masks="train", backgrounds=str(tmp_path)))
    with pytest.raises(InvalidSampleError, match="a CT of the chest"):
        next(iter(data.predict_dataloader()))
    with pytest.raises(InvalidSampleError, match="no scan"):
        ready(generate=GenerationPlan(per_group=1, masks="train", backgrounds=str(tmp_path / "no"))).requests()


def test_anatomy_of_another_case_is_refused():
    data = ready(EmidecDataModule, generate=GenerationPlan(total=2, masks="train", backgrounds="healthy"))
    with pytest.raises(ValueError, match="has the anatomy of that case"):
        next(iter(data.predict_dataloader()))


def test_a_scan_without_the_mask_that_is_asked_for_is_refused(tmp_path):
    LIDC().write_phantom(tmp_path, 0)
    for mask in (tmp_path / "Normal" / "Mask").iterdir():
        mask.unlink()
    data = ready(root=str(tmp_path), generate=GenerationPlan(per_group=2, masks="own", backgrounds="healthy"))
    with pytest.raises(ValueError, match=r"masks='own', but '.*_CVol_1' has none"):
        next(iter(data.predict_dataloader()))


def test_backgrounds_of_held_out_cases_are_left_out(tmp_path):
    LIDC().write_phantom(tmp_path, 0)
    held_out = sorted((tmp_path / "Pathological" / "test.txt").read_text().split())[0].split("_")[0]
    healthy = sorted((tmp_path / "Normal" / "Image").iterdir())
    healthy[0].rename(healthy[0].with_name(f"{held_out}_CVol_1.nii.gz"))
    data = ready(root=str(tmp_path), generate=GenerationPlan(per_group=9, masks="train", backgrounds="healthy"))
    used = {request.background.unit for request in data.requests()}
    assert len(used) == len(healthy) - 1
    assert held_out not in used


def test_plans_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="say which `backgrounds`"):
        GenerationPlan(total=1, masks="own")
    with pytest.raises(ValueError, match="is larger than image_size"):
        LIDCDataModule(image_size=(16, 16, 16), patch_size=(16, 16, 32))
    data = ready(generate=GenerationPlan(per_group=1, backgrounds="healthy", masks="train"))
    with pytest.raises(ValueError, match="has no scan without a lesion whose case"):
        _without_healthy(data).requests()


def _without_healthy(data):
    data.dataset.backgrounds = lambda root: []
    return data


def test_generated_samples_are_read_back_where_they_lie(tmp_path):
    data = ready(generate=GenerationPlan(per_group=1, masks="own", backgrounds="healthy"))
    batch = next(iter(data.predict_dataloader()))
    one = {k: batch[k][0] for k in ("image", "mask", "affine", "id", "source")}
    data.write_sample(tmp_path, {**one, "attributes": {"texture": torch.tensor(1)}, "synthetic": torch.tensor(True)})
    (record,) = data.dataset.index(tmp_path).records
    assert (record.synthetic, record.source, record.attributes) == (True, one["source"], {"texture": 1})
    image, mask = data.dataset.read_volumes(record)
    assert np.allclose(image.affine, one["affine"].numpy())
    assert np.array_equal(mask.array, one["mask"][0].numpy())
    assert np.abs(data.dataset.window.to_unit(image.array) - one["image"][0].numpy()).max() < 1 / 1400
