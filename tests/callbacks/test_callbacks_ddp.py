import csv
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from callback_fakes import Data, Foreign, sample, trainer
from test_synthetic_dataset_writer import Painter, content, rows
from test_volume_cases import Shifted, slices

from fairdiff_lightning.callbacks import FairnessReport, PredictionWriter, SyntheticDatasetWriter
from fairdiff_lightning.data import FairSegDataModule, GenerationPlan

SAMPLES = [sample(f"s{i}", i % 3 - 1, (i / 10, 1 - i / 20)) for i in range(7)]
"""An odd number: the sampler repeats one of them for the second process."""


def run(folder, **arguments):
    callbacks = [FairnessReport(num_resamples=50, num_worst=2), PredictionWriter(str(folder / "masks"))]
    both = trainer(folder, *callbacks, **arguments)
    both.test(Foreign(), Data(SAMPLES), verbose=False)
    both.predict(Foreign(), Data(SAMPLES), return_predictions=False)
    volumes = [FairnessReport(str(folder / "volumes"), num_resamples=50), PredictionWriter(str(folder / "slices"))]
    of_slices = trainer(folder, *volumes, **arguments)
    of_slices.test(Shifted(), slices(), verbose=False)
    of_slices.predict(Shifted(), slices(), return_predictions=False)
    plan = FairSegDataModule(image_size=(12, 16), batch_size=4, generate=GenerationPlan(total=13, masks="train"))
    generating = trainer(folder, SyntheticDatasetWriter(str(folder / "made")), **arguments)
    generating.predict(Painter(), plan)
    few = FairSegDataModule(image_size=(12, 16), batch_size=4, generate=GenerationPlan(total=3))
    trainer(folder, SyntheticDatasetWriter(str(folder / "few")), **arguments).predict(Painter(), few)


def test_two_processes_report_and_write_what_one_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(one)
    command = [sys.executable, __file__, str(two)]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parent, capture_output=True)
    for name in ("fairness.csv", "cases.csv"):
        assert (one / "fairness" / name).read_text() == (two / "fairness" / name).read_text()
        assert (one / "volumes" / name).read_text() == (two / "volumes" / name).read_text(), "cases lie on both"
    assert len((one / "volumes" / "cases.csv").read_text().splitlines()) == 1 + 2
    assert content(one / "slices") == content(two / "slices")
    volumes = [[nib.load(p) for p in sorted((folder / "slices" / "labelsTr").iterdir())] for folder in (one, two)]
    assert len(volumes[0]) == 2
    assert all(np.array_equal(a.dataobj, b.dataobj) for a, b in zip(*volumes, strict=True))
    worst = [json.loads((folder / "fairness" / "fairness.json").read_text())["worst_cases"] for folder in (one, two)]
    assert worst[0] == worst[1]
    for folder in (one, two):
        with (folder / "masks" / "manifest.csv").open(newline="") as stream:
            assert [row["id"] for row in csv.DictReader(stream)] == [f"s{i}" for i in range(7)]
    assert content(one / "made") == content(two / "made")
    assert rows(one / "made") == rows(two / "made")
    assert len(rows(two / "made")) == 13
    assert content(one / "few") == content(two / "few"), "one batch for two processes"
    assert rows(one / "few") == rows(two / "few")
    assert len(rows(two / "few")) == 3
    assert {path.name for path in (two / "masks").iterdir()} == {path.name for path in (one / "masks").iterdir()}


if __name__ == "__main__":
    run(Path(sys.argv[1]), strategy="ddp", devices=2)
