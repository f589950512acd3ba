"""New patients: what `predict` segments, and what is never trained or scored on."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from lightning.pytorch import Trainer

from fairdiff_lightning.callbacks import PredictionWriter
from fairdiff_lightning.data import DecathlonDataModule, ProstateDataModule
from fairdiff_lightning.data.volumes import Volume, write_volume
from fairdiff_lightning.modules import Segmenter

AFFINE = np.array([[-2.0, 0, 0, 7], [0, -1.5, 0, 20], [0, 0, 3, -40], [0, 0, 0, 1]])
SIZES = {"image_size": (8, 8, 8), "patch_size": None, "spacing": (2.0, 2.0, 3.0), "crop_foreground": False}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def cases(root, contoured, new):
    """A table of cases; those without contours differ in size."""
    rows = []
    for k, name in enumerate([*contoured, *new]):
        shape = (10 + k % 3, 9, 6)
        image = np.random.default_rng(k).integers(-200, 200, shape).astype(np.int16)
        write_volume(root / "ct" / f"{name}.nii.gz", Volume(image, AFFINE))
        mask = f"rt/{name}.nii.gz" if name in contoured else ""
        if mask:
            write_volume(root / mask, Volume((image > 0).astype(np.uint8), AFFINE))
        stage = "T2" if name in contoured else ""
        rows.append({"id": name, "image": f"ct/{name}.nii.gz", "mask": mask, "t_stage": stage, "centre": "A"})
    pd.DataFrame(rows).to_csv(root / "cases.csv", index=False)
    return str(root)


def model(in_channels=1):
    network = {"channels": (4, 8), "strides": (2,)}
    return Segmenter("unet", network, num_classes=2, in_channels=in_channels, image_size=(8, 8, 8))


def predicted(data, out, folder="masks", **arguments):
    trainer = Trainer(callbacks=[PredictionWriter(str(out))], **QUIET)
    trainer.predict(model(**arguments), data, return_predictions=False)
    return sorted((out / folder).iterdir())


OLD = [f"old{k}" for k in range(8)]


@pytest.mark.parametrize("contoured", [OLD, []])
def test_new_patients_are_segmented_and_nothing_else_sees_them(tmp_path, contoured):
    root = cases(tmp_path / "in", contoured, ["new1", "new2"])
    made = predicted(ProstateDataModule(root, batch_size=2, check=True, **SIZES), tmp_path / "out")
    assert [file.name for file in made] == ["new1.nii.gz", "new2.nii.gz"]
    for file in made:
        image = nib.load(tmp_path / "in" / "ct" / file.name)
        assert nib.load(file).shape == image.shape
        np.testing.assert_allclose(nib.load(file).affine, AFFINE)
    data = ProstateDataModule(root, batch_size=2, **SIZES)
    if not contoured:
        with (
            pytest.raises(ValueError, match="no sample of Prostate"),
            pytest.warns(UserWarning, match="2 images without"),
        ):
            data.setup("fit")
        return
    with pytest.warns(
        UserWarning, match="8 samples. Left out: 2 images without a mask, which are for prediction alone"
    ):
        data.setup("fit")
    seen = {record.id for part in data.splits.values() for record in part}
    assert seen == set(OLD)
    assert {i for batch in data.predict_dataloader() for i in batch["id"]} == {"new1", "new2"}


def test_the_test_split_is_predicted_when_it_is_asked_for_or_nobody_is_new(tmp_path):
    root = cases(tmp_path / "in", OLD, ["new1"])
    asked = ProstateDataModule(root, predict_on="test", **SIZES)
    none = ProstateDataModule(cases(tmp_path / "all", OLD, []), **SIZES)
    for data in (asked, none):
        data.setup("predict")
        ids = [i for batch in data.predict_dataloader() for i in batch["id"]]
        assert ids == [record.id for record in data.splits["test"]]


def test_filters_hold_for_new_patients_too(tmp_path):
    data = ProstateDataModule(cases(tmp_path, OLD, ["new1"]), groups={"t_stage": ["T2"]}, **SIZES)
    with (
        pytest.raises(ValueError, match="no sample of Prostate"),
        pytest.warns(UserWarning, match="1 t_stage not asked"),
    ):
        data.setup("predict")


@pytest.mark.parametrize("training", [True, False])
def test_images_of_a_decathlons_test_list_are_segmented(tmp_path, training):
    root = tmp_path / "task"
    listed = {"training": [], "test": ["./imagesTs/new_1.nii.gz", "./imagesTs/absent.nii.gz"]}
    for folder, name in [("imagesTr", f"a_{k}") for k in range(6 * training)] + [("imagesTs", "new_1")]:
        image = np.random.default_rng(0).uniform(0, 9, (10, 9, 6, 2)).astype(np.float32)
        (root / folder).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(image, AFFINE), root / folder / f"{name}.nii.gz")
        if folder == "imagesTr":
            write_volume(root / "labelsTr" / f"{name}.nii.gz", Volume((image[..., 0] > 4).astype(np.uint8), AFFINE))
            listed["training"].append({"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"})
    names = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "gland"}}
    (root / "dataset.json").write_text(json.dumps({"name": "Organ", **names, **listed}))
    data = DecathlonDataModule(str(root), image_size=(8, 8, 8))
    with pytest.warns(UserWarning, match="1 images of the test list of dataset.json that are absent"):
        (made,) = predicted(data, tmp_path / "out", "labelsTr", in_channels=2)
    assert made.name == "new_1.nii.gz"
    assert nib.load(made).shape == (10, 9, 6)
    np.testing.assert_allclose(nib.load(made).affine, AFFINE)
