import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from lightning.pytorch import Trainer
from test_rtstruct import write_scan

from fairdiff_lightning.callbacks import PredictionWriter
from fairdiff_lightning.data import Prostate, ProstateDataModule, read_volume
from fairdiff_lightning.data.dicom_seg import read_segmentation
from fairdiff_lightning.data.rtstruct import read_structures, structure_names, write_structures
from fairdiff_lightning.modules import Segmenter


@pytest.mark.parametrize("kind", ["rtstruct", "nifti"])
def test_predictions_for_dicom_series_are_dicom(tmp_path, kind):
    series = write_scan(tmp_path / "ct")
    image = read_volume(series)
    mask = np.zeros(image.shape, np.uint8)
    mask[4:9, 3:8, 1:4] = 1
    truth = image.with_array(mask)
    if kind == "rtstruct":
        write_structures(tmp_path / "mask.dcm", truth, image, {1: "CTV"})
        file = "mask.dcm"
    else:
        nib.save(nib.Nifti1Image(mask, image.affine), tmp_path / "mask.nii.gz")
        file = "mask.nii.gz"
    row = {"id": "p1", "image": "ct", "mask": file, "t_stage": "T2", "centre": "A"}
    pd.DataFrame([row]).to_csv(tmp_path / "cases.csv", index=False)
    dataset = Prostate(hu_offset=-1000)
    (record,) = dataset.index(tmp_path).records
    assert np.array_equal(dataset.read_volumes(record)[1].array, mask)
    made = dataset.write_prediction(tmp_path / "made", record, mask)
    if kind == "rtstruct":
        assert structure_names(made) == ["target"]
        assert np.array_equal(read_structures(made, image, ["target"]).array, mask)
    else:
        assert np.array_equal(read_segmentation(made, image).array, mask)


def plan(root, *names):
    """A table of a DICOM series with an RTSTRUCT each; the target shines."""
    rows = []
    root.mkdir()
    for name in names:
        folder = root / name
        write_scan(folder)
        image = read_volume(folder)
        mask = np.zeros(image.shape, np.uint8)
        mask[4:9, 3:8, 1:4] = 1
        write_structures(root / f"{name}.dcm", image.with_array(mask), image, {1: "CTV"})
        placed = image.with_array(mask).reoriented(image.native.axes)
        for k, header in enumerate(image.native.slices):
            path = next(p for p in folder.iterdir() if pydicom.dcmread(p).SOPInstanceUID == header.SOPInstanceUID)
            stored = pydicom.dcmread(path)
            stored.PixelData = (placed.array[..., k] * np.int16(400) - 200).astype(np.int16).tobytes()
            stored.save_as(path)
        rows.append({"id": name, "image": name, "mask": f"{name}.dcm", "t_stage": "T2", "centre": "A", "split": "test"})
    pd.DataFrame(rows).to_csv(root / "cases.csv", index=False)
    return str(root)


def predict_what_shines(root, tmp_path, monkeypatch):
    """Predict the cases of a table by a model that marks what shines; the files that the manifest lists."""
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path / "cache"))
    sizes = {"image_size": (16, 16, 8), "patch_size": None, "spacing": None, "crop_foreground": False}
    data = ProstateDataModule(root, fractions=(0.0, 0.0, 1.0), batch_size=2, **sizes)
    network = {"channels": (4, 8), "strides": (2,)}
    model = Segmenter("unet", network, num_classes=2, in_channels=1, image_size=(16, 16, 8))
    monkeypatch.setattr(model, "infer", lambda batch, stage: _bright(batch["image"]))
    writer = PredictionWriter(str(tmp_path / "out"))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(callbacks=[writer], **quiet).predict(model, data, return_predictions=False)
    manifest = pd.read_csv(tmp_path / "out" / "manifest.csv")
    made = [tmp_path / "out" / file for file in manifest["file"]]
    assert sorted(made) == sorted((tmp_path / "out" / "masks").iterdir())
    assert [file.stem for file in made] == manifest["id"].tolist()
    return made


def test_new_dicom_patients_are_predicted_as_segmentations_through_the_module(tmp_path, monkeypatch):
    root = plan(tmp_path / "in", "p1", "p2")
    truths = {name: read_volume(tmp_path / "in" / name).array > 0 for name in ("p1", "p2")}
    table = pd.read_csv(tmp_path / "in" / "cases.csv").assign(mask="", split="")
    table.to_csv(tmp_path / "in" / "cases.csv", index=False)
    made = predict_what_shines(root, tmp_path, monkeypatch)
    assert [file.stem for file in made] == ["p1", "p2"]
    for file in made:
        image = read_volume(tmp_path / "in" / file.stem)
        assert pydicom.dcmread(file).Modality == "SEG"
        assert np.array_equal(read_segmentation(file, image).array, truths[file.stem])


def test_dicom_plans_are_predicted_as_structures_through_the_module(tmp_path, monkeypatch):
    root = plan(tmp_path / "in", "p1", "p2")
    reads = []
    real = Prostate.read_image
    monkeypatch.setattr(Prostate, "read_image", lambda self, record: reads.append(record.id) or real(self, record))
    made = predict_what_shines(root, tmp_path, monkeypatch)
    assert [file.name for file in made] == ["p1.dcm", "p2.dcm"]
    for file in made:
        image = read_volume(tmp_path / "in" / file.stem)
        truth = image.array > 0
        found = read_structures(file, image, ["target"]).array
        assert truth.sum() == 5 * 5 * 3
        assert np.array_equal(found, truth)
        header = pydicom.dcmread(file)
        assert header.FrameOfReferenceUID == image.native.slices[0].FrameOfReferenceUID
    assert max(reads.count(name) for name in ("p1", "p2")) == 2, "read to be segmented, and to be written for"


def _bright(image):
    inside = (image - 0.5) * 20
    return torch.cat([-inside, inside], 1)
