"""Volumes through the command line: prostate by T stage and centre, and real hippocampi."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from test_cli import CONFIGS
from test_lefusion import QUIET, SHORT

from fairdiff_lightning.cli import build_cli, main
from fairdiff_lightning.data import Prostate, ProstateDataModule
from fairdiff_lightning.data.volumes import Window

SMALL = ["--data.image_size=[32,32,64]", "--data.spacing=[6,6,3]", "--data.batch_size=4", "--model.num_experts=2"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fairdiff"])
    for name in ("PROSTATE_ROOT", "HIPPOCAMPUS_ROOT", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)


def test_prostates_are_trained_tested_and_predicted_by_stage_and_centre():
    network = "--model.network_args={feature_size: 4}"
    arguments = ["--config", str(CONFIGS / "demo" / "prostate_dmoe.yaml"), *SMALL, network, *QUIET]
    main(["fit", *arguments, *SHORT])
    report = ["--trainer.callbacks=FairnessReport", "--trainer.callbacks.subsets=centre"]
    main(["test", *arguments, "--ckpt_path=last", "--model.mirror=[0]", *report])
    (path,) = Path().rglob("fairness.json")
    report = json.loads(path.read_text())
    assert list(report["attributes"]) == ["t_stage", "centre"]
    assert [list(a["groups"]) for a in report["attributes"].values()] == [["T1", "T2", "T3", "T4"], ["A", "B"]]
    assert list(report["subsets"]) == ["centre A", "centre B"]
    assert [sum(s["t_stage"]["images"].values()) for s in report["subsets"].values()] == [8, 8]
    assert sum(report["attributes"]["t_stage"]["images"].values()) == 16
    assert list(path.parent.rglob("*.png")) or "data:image/png" in path.with_name("report.html").read_text()
    main(["predict", *arguments, "--ckpt_path=last", "--trainer.limit_predict_batches=1"])
    files = sorted(Path().rglob("predictions/**/*.nii.gz"))
    assert len(files) == 4
    (manifest,) = Path().rglob("predictions/manifest.csv")
    assert {manifest.parent / file for file in pd.read_csv(manifest)["file"]} == set(files)
    records = {r.id: r for r in Prostate().index(ProstateDataModule().folder).records}
    for file in files:
        record = records[file.name.removesuffix(".nii.gz")]
        made, image = nib.load(file), nib.load(record.files["image"])
        np.testing.assert_allclose(made.affine, image.affine)
        assert made.shape == image.shape
        assert made.get_data_dtype() == np.uint8
        assert set(np.unique(made.dataobj)) <= {0, 1}


def test_predictions_hold_what_the_model_saw_voxel_by_voxel(monkeypatch):
    """A model that marks what is brighter than fat: its masks are the bright voxels of each image's own file."""
    arguments = ["--config", str(CONFIGS / "demo" / "prostate_dmoe.yaml"), *SMALL, *QUIET, "--data.evaluate_at=native"]
    arguments += ["--model.network_args={feature_size: 4}", "--data.image_size=[80,80,40]", "--data.spacing=null"]
    bright = float(Window(-200, 250).to_unit(np.array(0.0)))
    monkeypatch.setattr(
        "fairdiff_lightning.modules.segmenter.Segmenter.infer",
        lambda self, batch, stage: torch.cat([bright - batch["image"], batch["image"] - bright], 1),
    )
    main(["predict", *arguments, "--trainer.limit_predict_batches=2"])
    records = {r.id: r for r in Prostate().index(ProstateDataModule().folder).records}
    files = sorted(Path().rglob("predictions/**/*.nii.gz"))
    assert len(files) == 8
    for file in files:
        image = nib.load(records[file.name.removesuffix(".nii.gz")].files["image"])
        values = np.asarray(image.dataobj)
        assert 0.01 < (values > 0).mean() < 0.99
        np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), values > 0)


@pytest.mark.parametrize(("config", "count"), [("dmoe", 25_899_472), ("resunet3d", 13_125_696)])
def test_full_size_networks_link_to_the_data(config, count):
    with torch.device("meta"):
        arguments = ["--config", str(CONFIGS / "prostate" / f"{config}.yaml"), "--data.num_workers=0"]
        cli = build_cli([*arguments, "--data.attributes=[t_stage]"], run=False)
    routers = 0 if config == "resunet3d" else _router_parameters(4) - _router_parameters(5)
    assert sum(p.numel() for p in cli.model.parameters()) == count + routers
    assert cli.model.hparams["num_groups"] == {"t_stage": 4}
    assert (cli.trainer.precision, cli.model.hparams["dice_background"]) == ("bf16-mixed", False)


def _router_parameters(groups):
    """Of the five routers of the 3-D network: a linear layer for gates and one for noise, for each group."""
    return sum(groups * 2 * (48 * ratio * 8 + 8) for ratio in (1, 1, 2, 4, 8))


def test_real_hippocampi_are_trained_on_and_tested_at_their_own_size(realdata):
    arguments = ["--config", str(CONFIGS / "hippocampus" / "resunet3d.yaml"), *QUIET]
    arguments += [f"--data.root={realdata / 'MSD' / 'Task04_Hippocampus'}", "--trainer.precision=32-true"]
    arguments += ["--model.network_args={feature_size: 4}", "--data.batch_size=2"]
    main(["fit", *arguments, *SHORT, "--trainer.limit_val_batches=0"])
    main(["test", *arguments, "--ckpt_path=last", "--trainer.limit_test_batches=1"])
    main(["predict", *arguments, "--ckpt_path=last", "--trainer.limit_predict_batches=1"])
    files = sorted(Path().rglob("predictions/**/*.nii.gz"))
    assert len(files) == 1
    for file in files:
        made, label = nib.load(file), nib.load(realdata / "MSD" / "Task04_Hippocampus" / "labelsTr" / file.name)
        assert made.shape == label.shape
        np.testing.assert_allclose(made.affine, label.affine)
        assert set(np.unique(made.dataobj)) <= {0, 1, 2}
