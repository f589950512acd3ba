"""Numbers and probes of DiffBoost's own code that training and testing a segmenter must meet, or must not."""

import json
import math
from typing import get_args

import nibabel as nib
import numpy as np
import pytest
import torch

from fairdiff_lightning.data import DecathlonSliceDataModule
from fairdiff_lightning.data.batch_augmentation import augment_batch
from fairdiff_lightning.data.classical_augmentation import (
    GEOMETRIES,
    INTENSITIES,
    ClassicalAugmentation,
    Geometry,
    Name,
    stretch,
)
from fairdiff_lightning.data.patch_merge import PatchMerge
from fairdiff_lightning.metrics.functional import dice_score
from fairdiff_lightning.modules import Segmenter

ROWS = {
    "RandomContrast": "contrast",
    "RandomGamma": "gamma",
    "RandomBrightness": "brightness",
    "RandomNoise": "noise",
    "RandomResolution": "low_resolution",
    "RandomMirror": "mirror",
    "RandomRotate": "rotate",
    "RandomScale": "scale",
    "DeepStack": "deep_stack",
}
"""Names in the authors' registry -> ours."""


def images(count=6, size=24):
    image = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(1))
    return image, (image > 0.5).long()


def test_the_score_that_chooses_a_checkpoint_is_the_authors(reference):
    """Logits (0, f - 0.1) with f = sin(x/20) cos(y/30) of 384 pixels, against a disc of radius 80."""
    expected = reference("diffboost")["quick_dice"]
    y, x = torch.meshgrid(*[torch.arange(384.0)] * 2, indexing="ij")
    field = (x / 20).sin() * (y / 30).cos()
    logits = torch.stack([torch.zeros_like(field), field - 0.1])[None]
    predicted, label = logits.argmax(1, keepdim=True), ((x - 192) ** 2 + (y - 192) ** 2 < 80**2).long()[None, None]
    assert dice_score(predicted, label, 2).item() == pytest.approx(expected["foreground"], abs=1e-6)
    assert dice_score(1 - predicted, 1 - label, 2).item() == pytest.approx(expected["background"], abs=1e-6)


def test_a_step_on_real_images_alone_trains(reference):
    assert reference("diffboost")["official_bug_probes"]["plain_training_step"].startswith("TypeError")
    model = Segmenter("unet", {"channels": (4, 8), "strides": (2,)}, 2, 1, 24)
    image, mask = images()
    batch = {"image": image, "mask": mask, "attributes": {}, "id": [str(k) for k in range(len(image))]}
    loss = model.losses(batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad.abs().sum() > 0 for p in model.parameters())


def test_every_row_of_the_registry_is_one_of_ours_and_does_what_its_name_says(reference):
    registry = reference("diffboost")["official_bug_probes"]["augmentation_registry"]
    assert set(ROWS.values()) == set(get_args(Name)) - {"all"}
    assert set(registry) - set(ROWS) == {"Baseline", "MedDiffAug", "MedDiffAug_Plus"}
    for row, name in ROWS.items():
        *applied, last = registry[row]["transforms"]
        assert last == "MinMaxNormalization"
        if applied:
            moves = applied[0] in ("MirrorTransform", "SpatialTransform")
            assert (name in GEOMETRIES, name in INTENSITIES) == (moves, not moves)


@pytest.mark.parametrize("row", ["DeepStack", "MedDiffAug_Plus"])
def test_what_the_authors_code_leaves_out_with_a_warning_is_applied_to_a_pair_alike(reference, row):
    probe = reference("diffboost")["official_bug_probes"]["augmentation_registry"][row]
    assert (probe["transforms"], probe["warned"]) == (["MinMaxNormalization"], True)
    image, mask = images()
    batch = {"image": image, "partner": image.clone(), "mask": mask}
    changed = augment_batch(batch, ClassicalAugmentation("deep_stack"), torch.Generator().manual_seed(0))
    assert not torch.allclose(stretch(changed["image"]), stretch(image), atol=0.01)
    assert not torch.equal(changed["mask"], mask)
    torch.testing.assert_close(changed["image"], changed["partner"])


def test_scaling_has_the_authors_settings(reference):
    flags = reference("diffboost")["official_bug_probes"]["random_scale_flags"]
    off = flags["do_elastic_deform"] or flags["do_rotation"] or flags["random_crop"]
    assert (flags["do_scale"], off, flags["border_mode_data"]) == (True, False, "nearest")
    assert flags["order_data"] == 3, "cubic, as here"
    expected = Geometry(scale=tuple(flags["scale"]), p_scale=flags["p_scale_per_sample"], border="border")
    assert GEOMETRIES["scale"] == expected
    assert (expected.degrees, expected.p_elastic, expected.p_mirror) == (0, 0, 0)


def test_rotation_has_the_authors_settings(reference):
    flags = reference("diffboost")["official_bug_probes"]["random_rotate_flags"]
    assert (flags["do_rotation"], flags["do_scale"], flags["do_elastic_deform"]) == (True, False, False)
    low, high = (math.degrees(angle) for angle in flags["angle_x"])
    rotate = GEOMETRIES["rotate"]
    assert (-rotate.degrees, rotate.degrees) == pytest.approx((low, high))
    assert (rotate.p_rotate, rotate.scale, rotate.p_elastic) == (flags["p_rot_per_sample"], (1.0, 1.0), 0)
    assert (flags["border_mode_data"], rotate.border) == ("nearest", "border")
    assert flags["order_data"] == 3, "cubic, as here"


def write_task(root, positive):
    """A task of volumes of four slices, of which the case's own number have a label."""
    names = list(positive)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for k, (name, count) in enumerate(positive.items()):
        image = np.random.default_rng(k).normal(size=(12, 10, 4)).astype(np.float32)
        label = np.zeros((12, 10, 4), np.uint8)
        label[2:9, 3:8, 1 : 1 + count] = 1
        for folder, array in (("imagesTr", image), ("labelsTr", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), root / folder / f"{name}.nii.gz")
    training = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    content = {"name": "Spleen", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"}}
    (root / "dataset.json").write_text(json.dumps(content | {"training": training}))


def test_a_training_batch_has_a_partner_of_the_same_mask_in_the_order_of_the_files(tmp_path, monkeypatch, reference):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path / "task", {"a_1": 2, "b_2": 2, "c_3": 2})
    wanted, settings = reference("diffboost")["dataloader_contract"], {"protocol": "legacy", "batch_size": 2}
    plain = slices_of(tmp_path / "task", **settings)
    for number, record in enumerate(plain.splits["train"]):
        sample = {**plain.dataset.read(record), "id": f"made_{number}", "synthetic": torch.tensor(True)}
        plain.write_sample(tmp_path / "made", {**sample, "source": record.id})
    merge = PatchMerge(num_synthetic=1)
    data = slices_of(tmp_path / "task", synthetic=[str(tmp_path / "made")], merge=merge, image_size=384, **settings)
    batches = list(data.train_dataloader())
    partners = {"data": "image", "seg": "mask", "aug_data": "partner", "aug_seg": "mask"}
    for key, text in wanted["train_batch(is_aug)"].items():
        dtype, shape = text.split(" ")
        found = batches[0][partners[key]]
        assert str(found.dtype) == f"torch.{dtype}"
        assert list(found.shape) == [2, *map(int, shape.strip("()").split(",")[1:])]
    assert wanted["train_sampler"].startswith("SequentialSampler")
    seen = [name for batch in batches for name in batch["id"]]
    assert seen == [record.id for record in data.splits["train"]] == sorted(seen)


def slices_of(root, **settings):
    data = DecathlonSliceDataModule(str(root), **settings)
    data.prepare_data()
    data.setup()
    return data


def test_a_test_case_is_a_batch_of_its_slices_with_a_label(tmp_path, monkeypatch, reference):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path / "task", {"a_1": 3, "b_2": 2, "c_3": 1})
    wanted = reference("diffboost")["dataloader_contract"]["test3d_batch"]
    for fold, (case, count) in enumerate((("a_1", 3), ("b_2", 2), ("c_3", 1))):
        data = DecathlonSliceDataModule(str(tmp_path / "task"), protocol="legacy", fold=fold, batch_size=4)
        data.prepare_data()
        data.setup()
        (batch,) = data.test_dataloader()
        shapes = {key: str(tuple(batch[key].shape)).replace(" ", "") for key in ("image", "mask")}
        assert shapes == {
            "image": wanted["data"].replace("n_positive_slices", str(count)),
            "mask": wanted["seg"].replace("n_positive_slices", str(count)),
        }
        assert {name.rpartition("_z")[0] for name in batch["id"]} == {case}, wanted["meta"]
