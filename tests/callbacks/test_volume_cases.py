"""The report of a test whose samples are slices of volumes."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from callback_fakes import Foreign, trainer

from fairdiff_lightning.callbacks import FairnessReport, PredictionWriter
from fairdiff_lightning.callbacks.volume_cases import PackedMasks
from fairdiff_lightning.data import DecathlonSliceDataModule
from fairdiff_lightning.metrics.functional import dice_score
from fairdiff_lightning.metrics.surface import surface_scores


class Shifted(Foreign):
    """Predicts the truth a row lower, and measures slices."""

    surfaces = True

    def test_step(self, batch, batch_idx):
        prediction = self.predict_step(batch, batch_idx)["mask"]
        dice = dice_score(prediction, batch["native_mask"], 3)
        measured = {"hd95": dice} if self.surfaces else {}
        return {"prediction": prediction, "dice": dice, "iou": dice / (2 - dice), **measured}

    def predict_step(self, batch, batch_idx):
        return {"mask": batch["native_mask"].roll(1, -2), "id": batch["id"]}


def slices(**options):
    return DecathlonSliceDataModule(image_size=(16, 18), num_folds=6, channel=0, batch_size=7, **options)


def cases(folder):
    with (folder / "fairness" / "cases.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def by_hand(data):
    """Scores of each test case as a volume, from the files."""
    found = {}
    for record in {record.unit: record for record in data.splits["test"]}.values():
        volume = data.dataset.read_labels(record)
        truth = torch.from_numpy(volume.array.astype(np.int64))[None, None]
        dice = dice_score(truth.roll(1, 2), truth, 3)
        hd95 = surface_scores(truth.roll(1, 2), truth, 3, volume.spacing.tolist()).hausdorff95
        found[record.unit] = {f"{m}_{c}": float(v[0, k]) for m, v in (("dice", dice), ("hd95", hd95)) for k, c in
                              enumerate(("PZ", "TZ"))}  # fmt: skip
    return found


def test_cases_are_volumes_in_mm(tmp_path):
    data = slices()
    trainer(tmp_path, FairnessReport(num_resamples=20)).test(Shifted(), data, verbose=False)
    rows, expected = cases(tmp_path), by_hand(data)
    assert [row["id"] for row in rows] == sorted(expected)
    assert len(rows) == 2, "one for each volume"
    for row in rows:
        for name, value in expected[row["id"]].items():
            assert float(row[name]) == pytest.approx(value), name
        assert float(row["iou_PZ"]) == pytest.approx(float(row["dice_PZ"]) / (2 - float(row["dice_PZ"])))
    content = json.loads((tmp_path / "fairness" / "fairness.json").read_text())
    assert content["images"] == 2
    page = (tmp_path / "fairness" / "report.html").read_text()
    assert page.count("data:image/png") == 2, "three planes of each worst case"


def test_distances_are_measured_only_when_the_step_does(tmp_path):
    module = Shifted()
    module.surfaces = False
    trainer(tmp_path, FairnessReport(num_resamples=20)).test(module, slices(), verbose=False)
    assert not any("hd95" in name or "assd" in name for name in cases(tmp_path)[0])


def test_a_part_of_the_test_reports_whole_volumes_only(tmp_path):
    data = slices()
    with pytest.warns(UserWarning, match=r"volumes that lack slices are left out: phantom_\d+ \(8 of 20\)"):
        trainer(tmp_path, FairnessReport(num_resamples=20), limit_test_batches=4).test(Shifted(), data, verbose=False)
    assert len(cases(tmp_path)) == 1
    with pytest.warns(UserWarning, match="the test had no whole case, so there is no report"):
        trainer(tmp_path / "b", FairnessReport(), limit_test_batches=1).test(Shifted(), data, verbose=False)


def test_predicted_slices_are_written_as_volumes_too(tmp_path):
    data = slices()
    trainer(tmp_path, PredictionWriter(str(tmp_path / "out"))).predict(Shifted(), data, return_predictions=False)
    files = sorted((tmp_path / "out" / "labelsTr").iterdir())
    assert [file.name for file in files] == sorted({f"{record.unit}.nii.gz" for record in data.splits["test"]})
    for file in files:
        written, stored = nib.load(file), nib.load(data.folder / "labelsTr" / file.name)
        np.testing.assert_allclose(written.affine, stored.affine)
        # rows run from front to back: a row lower is one step to the back
        assert np.array_equal(np.asarray(written.dataobj), np.roll(np.asarray(stored.dataobj), -1, 1))


def test_packed_masks_come_back():
    masks = {"a": torch.randint(3, (1, 5, 7)), "b": torch.randint(200, (4, 2))}
    packed = PackedMasks()
    for name, mask in masks.items():
        packed.add(name, mask)
    again = PackedMasks(packed.packed)
    assert list(again) == ["a", "b"]
    assert all(np.array_equal(again[name], mask.reshape(mask.shape[-2:])) for name, mask in masks.items())
