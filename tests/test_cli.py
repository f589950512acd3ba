import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from fairdiff_lightning import Segmenter
from fairdiff_lightning.cli import build_cli, main, newest_checkpoint
from fairdiff_lightning.data import DatasetNotFoundError

CONFIGS = Path(__file__).parents[1] / "configs"
OVERLAYS = ("trainer", "lefusion")
RUNS = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("*/*.yaml") if p.parent.name not in OVERLAYS)
VOLUMES = [run for run in RUNS if any(part in run for part in ("lidc", "emidec", "prostate", "hippocampus"))]
DIFFBOOST = [run for run in RUNS if "busi" in run or "radimagenet" in run]
PARTS = ("points", "point_diffusion", "controlnet", "pig", "lefusion", "lesion_masks")
GENERATORS = [run for run in RUNS if any(part in run for part in PARTS)]
SMALL = [
    "--model.init_args.network=tiny",
    "--data.init_args.image_size=32",
    "--data.init_args.batch_size=4",
    "--data.init_args.num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
DEMO = ["--config", str(CONFIGS / "demo" / "fairseg_dmoe.yaml"), *SMALL, "--data.init_args.seed=3"]
SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fairdiff"])
    for name in ("FAIRSEG_ROOT", "HAM10000_ROOT", "DBT_ROOT", "FAIRSEG_TRANSUNET", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)


def report(folder="."):
    (path,) = Path(folder).rglob("fairness.json")
    return json.loads(path.read_text())


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("config", sorted({*RUNS} - {*GENERATORS} - {*VOLUMES} - {*DIFFBOOST}))
def test_every_shipped_segmenter_trains_and_tests(config):
    arguments = ["--config", str(CONFIGS / config), *SMALL, "--trainer.fast_dev_run=2"]
    network = [] if "unet.yaml" not in config or "trans" in config else ["--model.init_args.network=unet"]
    main(["fit", *arguments, *network])
    main(["test", *arguments, *network])
    (groups,) = [attribute["groups"] for attribute in report()["attributes"].values()]
    assert len(groups) in (2, 3, 4, 5)


def test_the_papers_settings_stand_in_the_configurations():
    settings = yaml.safe_load((CONFIGS / "fairseg" / "dmoe.yaml").read_text())
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    assert (model["network"], model["num_experts"], model["top_k"], data["batch_size"]) == ("vit_b16", 8, 2, 42)
    assert model["optimizer"]["init_args"] == {"lr": 0.0175, "momentum": 0.9, "weight_decay": 1e-4}
    assert (settings["trainer"]["max_epochs"], settings["seed_everything"]) == (300, 1234)


def test_full_size_models_link_to_the_data():
    with torch.device("meta"):
        cli = build_cli(
            ["--config", str(CONFIGS / "fairseg" / "dmoe.yaml"), "--data.init_args.num_workers=0"], run=False
        )
    assert sum(p.numel() for p in cli.model.parameters()) == 129_489_699
    assert cli.model.hparams["num_groups"] == {"race": 3}


def test_what_is_asked_for_now_wins_over_the_checkpoint(monkeypatch):
    main(["fit", *DEMO, *SHORT, "--trainer.max_epochs=1", "--model.overlap=0.25"])
    found = []
    monkeypatch.setattr(Segmenter, "on_test_start", lambda self: found.append(dict(self.hparams)))
    main(["test", *DEMO, "--ckpt_path=last", "--trainer.limit_test_batches=1", "--model.overlap=0.75"])
    assert [settings["overlap"] for settings in found] == [0.75]


@pytest.mark.parametrize("overlay", ["cpu", "gpu_bf16", "ddp", "fsdp"])
def test_trainer_overlays_change_the_trainer_only(overlay, capsys):
    base = [str(CONFIGS / "demo" / "fairseg_plain.yaml"), str(CONFIGS / "trainer" / f"{overlay}.yaml")]
    with pytest.raises(SystemExit):
        main(["fit", "--config", base[0], "--config", base[1], "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    wanted = yaml.safe_load(Path(base[1]).read_text())["trainer"]
    assert {key: printed["trainer"][key] for key in wanted} == wanted
    assert printed["model"]["init_args"]["network"] == "tiny"


def test_print_config_round_trips(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["fit", *DEMO, "--print_config"])
    first = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(first)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "printed.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(first)
    main(["fit", "--config", "printed.yaml", "--trainer.fast_dev_run=1"])


@pytest.mark.parametrize("name", ["model.help=Segmenter", "model.help=DMoESegmenter", "data.help=FairSegDataModule"])
def test_every_argument_has_help(name, capsys):
    with pytest.raises(SystemExit):
        main(["fit", f"--{name}"])
    text = capsys.readouterr().out
    entries = [line for line in text.split("\n  --")[1:] if not line.startswith(("config", "model.help", "data.help"))]
    assert len(entries) > 10
    silent = [entry.split()[0] for entry in entries if len(" ".join(entry.split()).split("(type")[0].split()) < 4]
    assert not silent


def test_bare_names_and_dots_work_without_a_configuration():
    arguments = ["--model=Segmenter", "--model.network=tiny", "--data=HAM10000DataModule", "--data.image_size=32"]
    arguments += ["--data.attributes=[sex]", "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"]
    main(["fit", *arguments])
    model = build_cli(arguments, run=False).model
    assert (type(model), model.num_groups, model.hparams["in_channels"]) == (Segmenter, {"sex": 2}, 3)


def test_real_files_train_and_test(realdata):
    arguments = ["--config", str(CONFIGS / "ham10000" / "dmoe.yaml"), *SMALL]
    arguments += [f"--data.init_args.root={realdata / 'HAM10000'}", "--data.init_args.evaluate_at=native"]
    main(["fit", *arguments, "--trainer.max_epochs=1"])
    main(["test", *arguments, "--ckpt_path=best"])
    main(["predict", *arguments, "--ckpt_path=last"])
    (mask,) = Path().rglob("*_segmentation.png")
    from PIL import Image

    with Image.open(mask) as image:
        assert image.size == (600, 450)
        assert set(np.unique(np.asarray(image))) <= {0, 255}
    assert report()["images"] == 1
    assert report()["attributes"]["age"]["images"]["60-79"] == 1


def test_predictions_are_written_in_the_data_sets_format_and_read_back(tmp_path):
    main(["fit", *DEMO, *SHORT, "--trainer.max_epochs=1"])
    main(["predict", *DEMO, "--ckpt_path=best", "--trainer.limit_predict_batches=2"])
    files = sorted(Path().rglob("predictions/*.npz"))
    assert len(files) == 8
    with np.load(files[0]) as archive:
        assert archive["disc_cup_mask"].shape == (128, 166)
        assert set(np.unique(archive["disc_cup_mask"])) <= {0, -1, -2}
    (manifest,) = Path().rglob("manifest.csv")
    assert len(manifest.read_text().splitlines()) == 9


def test_patches_train_what_sliding_windows_test_at_native_size():
    native = ["--data.init_args.image_size=null", "--data.init_args.crop=null", "--data.init_args.evaluate_at=native"]
    sliding = ["--model.init_args.inference=sliding", "--model.init_args.roi_size=[64,64]"]
    main(["fit", *DEMO, *native, *sliding, "--data.init_args.patch_size=64", "--trainer.fast_dev_run=1"])
    with pytest.warns(UserWarning, match="test without --ckpt_path uses the weights that the model starts with"):
        main(["test", *DEMO, *native, *sliding, "--trainer.limit_test_batches=1"])
    assert report()["images"] == 4
    assert report()["run"]["hparams"]["image_size"] is None


def test_training_keeps_best_and_last_and_both_are_found_again():
    main(["fit", *DEMO, *SHORT])
    folder = "runs/demo/fairseg_dmoe/lightning_logs/version_0"
    assert sorted(p.name for p in Path(folder, "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    best = torch.load(Path(folder, "checkpoints", "best.ckpt"), weights_only=True)
    monitors = [c["monitor"] for name, c in best["callbacks"].items() if "es_dice" in name]
    assert monitors == ["val/es_dice/race"]
    assert Path(folder, "splits.csv").is_file()
    assert newest_checkpoint(Path("runs"), "best") == Path(folder, "checkpoints", "best.ckpt")
    main(["validate", *DEMO, "--ckpt_path=last", "--trainer.limit_val_batches=1"])


def test_checkpoints_of_the_command_line_reload_in_code():
    from fairdiff_lightning import DMoESegmenter

    main(["fit", *DEMO, *SHORT, "--trainer.max_epochs=1"])
    path = newest_checkpoint(Path(), "last")
    module = DMoESegmenter.load_from_checkpoint(path, weights_only=True)
    assert module.hparams["attribute"] == "race"
    for name, value in weights(path).items():
        assert torch.equal(module.state_dict()[name], value)


def test_asking_for_a_checkpoint_that_is_not_there_says_where_it_was_sought():
    with pytest.raises(FileNotFoundError, match=r"no 'best.ckpt' below .*fairseg_dmoe"):
        main(["test", *DEMO, "--ckpt_path=best"])


@pytest.mark.parametrize("root", ["nowhere", "."])
def test_a_missing_root_or_another_tree_ends_with_the_expected_tree(root):
    with pytest.raises(DatasetNotFoundError, match=r"data_00001.npz"):
        main(["fit", *DEMO, f"--data.init_args.root={root}"])


def test_bf16_trains_on_the_cpu():
    main(["fit", *DEMO, *SHORT, "--trainer.precision=bf16-mixed"])
    state = weights(newest_checkpoint(Path(), "last"))
    assert all(value.isfinite().all() for value in state.values())


KILLER = """
import os, signal, sys
from lightning.pytorch import Callback
from fairdiff_lightning.cli import main

class Killer(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    main(sys.argv[1:] + ["--trainer.callbacks=killer.Killer"])
"""


def test_killed_run_resumes_to_the_same_weights():
    arguments = [*DEMO, "--trainer.max_epochs=3", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
    main(["fit", *arguments, "--trainer.default_root_dir=whole"])
    Path("killer.py").write_text(KILLER)
    command = [sys.executable, "killer.py", "fit", *arguments, "--trainer.default_root_dir=killed"]
    process = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    assert torch.load(newest_checkpoint(Path("killed"), "last"), weights_only=True)["global_step"] == 3
    main(["fit", *arguments, "--trainer.default_root_dir=killed", "--ckpt_path=last"])
    assert [p.name for p in Path("killed").rglob("best.ckpt")] == ["best.ckpt"], "the best so far stays to be beaten"
    assert_same_weights(newest_checkpoint(Path("whole"), "last"), newest_checkpoint(Path("killed"), "last"))


def test_two_processes_train_together_and_test_to_the_numbers_of_one():
    def run_in_two(*arguments):
        command = [sys.executable, "-m", "fairdiff_lightning", *arguments]
        subprocess.run([*command, "--trainer.strategy=ddp", "--trainer.devices=2"], check=True, capture_output=True)

    run_in_two("fit", *DEMO, *SHORT, "--trainer.max_epochs=1", "--data.init_args.sampler=group_balanced")
    checkpoint = newest_checkpoint(Path(), "best").resolve()
    arguments = ["test", *DEMO, f"--ckpt_path={checkpoint}", "--data.init_args.batch_size=7"]
    main([*arguments, "--trainer.default_root_dir=one"])
    run_in_two(*arguments, "--trainer.default_root_dir=two")
    cases = [pd.read_csv(next(Path(name).rglob("cases.csv"))) for name in ("one", "two")]
    assert list(cases[0].columns) == ["id", "race", "dice_rim", "dice_cup", "iou_rim", "iou_cup"]
    pd.testing.assert_frame_equal(*cases, atol=1e-5)
    one, two = (next(Path(name).rglob("fairness.csv")).read_text().splitlines() for name in ("one", "two"))
    assert len(one) == len(two) > 10
    for a, b in zip(one[1:], two[1:], strict=True):
        *names_a, value_a, low_a, high_a, n_a = a.split(",")
        *names_b, value_b, low_b, high_b, n_b = b.split(",")
        assert (names_a, n_a) == (names_b, n_b)
        for x, y in ((value_a, value_b), (low_a, low_b), (high_a, high_b)):
            assert float(x or "nan") == pytest.approx(float(y or "nan"), abs=1e-6, nan_ok=True)
