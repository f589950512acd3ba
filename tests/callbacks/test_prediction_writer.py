import csv

import numpy as np
import pytest
import torch
from callback_fakes import Data, Foreign, sample, square, trainer
from PIL import Image

from fairdiff_lightning.callbacks import PredictionWriter
from fairdiff_lightning.callbacks.prediction_writer import write_png

SAMPLES = [sample(f"s{i}", 0, (0.5, 0.5), prediction=square(0, i, 2) * (i + 1)) for i in range(5)]


def predict(folder, datamodule, module=None):
    writer = PredictionWriter(str(folder / "masks"))
    trainer(folder, writer).predict(module or Foreign(), datamodule, return_predictions=False)
    return folder / "masks"


def manifest(folder):
    with (folder / "manifest.csv").open(newline="") as stream:
        return {row["id"]: row["file"] for row in csv.DictReader(stream)}


def read(path):
    return torch.from_numpy(np.asarray(Image.open(path)).astype(np.int64))[None]


def test_written_masks_read_back_and_are_listed(tmp_path):
    folder = predict(tmp_path, Data(SAMPLES))
    listed = manifest(folder)
    assert list(listed) == [f"s{i}" for i in range(5)]
    for item in SAMPLES:
        assert (read(folder / listed[item["id"]]) == item["prediction"]).all()
    assert {path.name for path in folder.iterdir()} == {"manifest.csv", *(f"s{i}.png" for i in range(5))}


def test_masks_of_unequal_size_come_as_a_list(tmp_path):
    class Native(Foreign):
        def predict_step(self, batch, batch_idx):
            masks = [mask[:, : 3 + index] for index, mask in enumerate(batch["prediction"])]
            return {"mask": masks, "id": batch["id"]}

    folder = predict(tmp_path, Data(SAMPLES[:2]), Native())
    assert [read(folder / f"s{i}.png").shape for i in range(2)] == [(1, 3, 7), (1, 4, 7)]


def test_data_module_writes_its_own_format(tmp_path):
    class Native(Data):
        def write_mask(self, directory, sample_id, mask):
            path = directory / "part" / f"{sample_id}.pt"
            path.parent.mkdir(exist_ok=True)
            torch.save(mask, path)
            return path

    folder = predict(tmp_path, Native(SAMPLES))
    assert manifest(folder)["s3"] == "part/s3.pt"
    assert (torch.load(folder / "part" / "s3.pt") == SAMPLES[3]["prediction"]).all()


def test_ids_that_are_no_file_names_stay_inside_the_folder_and_apart(tmp_path):
    ids = ["../evil", "a/b", "a%2Fb", "plain, with comma"]
    folder = predict(tmp_path, Data([SAMPLES[i] | {"id": name} for i, name in enumerate(ids)]))
    listed = manifest(folder)
    assert set(listed) == set(ids)
    for index, name in enumerate(ids):
        assert (read(folder / listed[name]) == SAMPLES[index]["prediction"]).all()
    assert not (tmp_path / "evil.png").exists()


def test_second_run_replaces_the_first(tmp_path):
    predict(tmp_path, Data(SAMPLES))
    folder = predict(tmp_path, Data([SAMPLES[0] | {"prediction": SAMPLES[1]["prediction"]}]))
    assert list(manifest(folder)) == ["s0"]
    assert (read(folder / "s0.png") == SAMPLES[1]["prediction"]).all()


def test_interrupted_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    write_png(tmp_path, "s", square(0, 0, 2))
    before = (tmp_path / "s.png").read_bytes()

    def half(self, path, *args, **kwargs):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        write_png(tmp_path, "s", square(1, 1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]
    assert (tmp_path / "s.png").read_bytes() == before


@pytest.mark.parametrize("mask", [torch.full((1, 2, 3), 256), torch.full((2, 3), -1), torch.zeros(1, 2, 3, 4)])
def test_mask_that_does_not_fit_is_refused_by_name(tmp_path, mask):
    with pytest.raises(ValueError, match=r"mask of 'x': shape .* values .* expected \(1, H, W\)"):
        write_png(tmp_path, "x", mask)
    assert not list(tmp_path.iterdir())


def test_module_that_predicts_something_else_is_named(tmp_path):
    class Logits(Foreign):
        def predict_step(self, batch, batch_idx):
            return {"logits": batch["image"]}

    with pytest.raises(ValueError, match=r"Logits\.predict_step gave a dict with the keys \['logits'\]"):
        predict(tmp_path, Data(SAMPLES), Logits())
