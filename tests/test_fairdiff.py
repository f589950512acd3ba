"""FairDiff through the command line: the shipped configurations and the pipeline's own commands, tiny."""

import csv
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from pipelines import REPOSITORY, pipeline, recorded
from test_cli import CONFIGS, DIFFBOOST, GENERATORS

from fairdiff_lightning.cli import main, newest_checkpoint
from fairdiff_lightning.data import FairSeg, FairSegDataModule
from fairdiff_lightning.data.provenance import read_training_cases

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SIZE = ["--data.image_size=32", "--data.batch_size=4", "--data.num_workers=0"]
TINY_UNET = "{block_out_channels: [16, 16, 32], norm_num_groups: 4, cross_attention_dim: 64}"
TINY = {
    "points": ["--data.num_points=32", "--model.num_points=32", "--model.num_steps=4", "--model.decoder=closing"],
    "controlnet": [
        "--model.base=tiny",
        f"--model.base_args={TINY_UNET}",
        "--model.trained=all",
        "--model.controlnet=null",
        "--model.negative_prompt=",
    ],
    "pig": ["--model.widths=[8,16]", "--model.num_steps=2"],
    "segmenter": ["--model.network=tiny"],
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fairdiff"])
    for name in ("FAIRSEG_ROOT", "SD15", "CONTROLNET", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)


def kind(text):
    parts = {
        "point": "points",
        "controlnet": "controlnet",
        "pig": "pig",
        "lesion_masks": "masks",
        "lefusion": "lesions",
    }
    return next((part for word, part in parts.items() if word in text), "segmenter")


def rows(folder):
    with (Path(folder) / "manifest.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    "config", [c for c in GENERATORS if kind(c) in ("points", "controlnet") and c not in DIFFBOOST]
)
def test_every_shipped_generator_trains_and_generates(config):
    arguments = [
        "--config",
        str(CONFIGS / config),
        *SIZE,
        *TINY[kind(config)],
        *QUIET,
        "--trainer.default_root_dir=run",
    ]
    length = ["--trainer.max_steps=2", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=1"]
    main(["fit", *arguments, *length, "--data.sampler=group_balanced"])  # so that two steps show every group
    main(["predict", *arguments, "--data.generate.per_group=2", "--data.generate.masks=train", "--ckpt_path=last"])
    made = rows("run/synthetic")
    assert [row["race"] for row in made] == [g for g in ("Asian", "Black", "White") for _ in range(2)]
    for row in made:
        with np.load(Path("run/synthetic") / row["file"]) as archive:
            assert archive["disc_cup_mask"].shape == (32, 32)
            assert set(np.unique(archive["disc_cup_mask"])) <= {0, -1, -2}
            assert ("slo_fundus" in archive.files) == (kind(config) == "controlnet")


def test_a_killed_pipeline_goes_on_from_the_last_checkpoint(tmp_path):
    assert pipeline(tmp_path, "fairdiff_pipeline.sh", KILL_AFTER="5").returncode == -signal.SIGKILL
    before = recorded(tmp_path)
    assert [command[1] for command in before] == ["fit", "test", "fit", "test", "fit"]
    (tmp_path / "commands").unlink()
    assert pipeline(tmp_path, "fairdiff_pipeline.sh").returncode == 0

    def folder(command):
        return next(word.split("=")[1] for word in command if "default_root_dir" in word)

    begun = {folder(command) for command in before if command[1] == "fit"}
    for command in recorded(tmp_path):
        if command[1] == "fit":
            assert (f"--ckpt_path={folder(command)}/last.ckpt" in command) == (folder(command) in begun)


def test_the_pipeline_refuses_the_folder_of_other_settings(tmp_path):
    assert pipeline(tmp_path, "fairdiff_pipeline.sh").returncode == 0
    (tmp_path / "commands").unlink()
    again = pipeline(tmp_path, "fairdiff_pipeline.sh", TOTAL="300")
    assert again.returncode == 2
    for words in ("TOTAL=477", "TOTAL=300", "set OUT to another folder"):
        assert words in again.stderr
    assert not (tmp_path / "commands").exists()
    assert pipeline(tmp_path, "fairdiff_pipeline.sh", TOTAL="300", OUT="runs/other").returncode == 0


def test_masks_and_images_are_learned_side_by_side(tmp_path):
    assert pipeline(tmp_path, "fairdiff_pipeline.sh").returncode == 0
    one_by_one = recorded(tmp_path)
    (tmp_path / "commands").unlink()
    shutil.rmtree(tmp_path / "runs")
    done = pipeline(tmp_path, "fairdiff_pipeline.sh", JOBS="2")
    assert done.returncode == 0
    assert sorted(recorded(tmp_path)) == sorted(one_by_one)
    assert recorded(tmp_path)[-5:-2] == one_by_one[-5:-2], "images come after both"
    assert all(f"{part}/7" in done.stdout for part in range(1, 8))


@pytest.mark.parametrize("part", ["points.yaml", "controlnet.yaml"])
def test_what_fails_beside_another_part_stops_the_pipeline(tmp_path, part):
    done = pipeline(tmp_path, "fairdiff_pipeline.sh", JOBS="2", FAIL_AT=part)
    assert done.returncode != 0
    assert "this part fails" in done.stderr
    assert not any(
        "equal_scale" in word for command in recorded(tmp_path) for word in command if "default_root" in word
    )


def test_the_pipelines_commands_lead_to_the_comparison(tmp_path, capsys, monkeypatch):
    assert pipeline(tmp_path, "fairdiff_pipeline.sh").returncode == 0
    commands = recorded(tmp_path)
    programs, commands = [c[0] for c in commands], [c[1:] for c in commands]
    assert programs == ["fairdiff"] * 10 + ["python"] * 2
    steps = [*["fit", "test"] * 2, *["fit", "predict"] * 2, "fit", "test"]
    assert [c[0] for c in commands] == [*steps, "examples/show_synthetic.py", "examples/compare_runs.py"]
    for file in [*tmp_path.rglob("last.ckpt"), *tmp_path.rglob("manifest.csv")]:
        file.unlink()
    adherence = str(Path("runs/fairdiff/real/last.ckpt"))
    for command in commands[:-2]:
        words = [w for w in command if "adherence" not in w and "max_steps" not in w and "max_epochs" not in w]
        part = kind(" ".join(w for w in words if "configs" in w))
        if adherence in " ".join(command):
            words.append(f"--model.adherence={newest_checkpoint(Path('runs/fairdiff/real'), 'last')}")
        length = ["--trainer.max_steps=3", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=1"]
        words = [w.replace("=477", "=180") for w in words]
        main([*words, *SIZE, *TINY[part], *QUIET[2:], *(length if command[0] == "fit" else [])])
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import adherence as show_adherence
    import compare_runs
    import show_synthetic

    (picture, table) = commands[-2:]
    show_synthetic.main(picture[1], picture[3])
    assert Path(picture[3]).stat().st_size > 10_000
    compare_runs.main(table[1:4], output=table[5])
    assert [line.split(" | ")[0] for line in Path(table[5]).read_text().splitlines()[2:]] == [
        "| real only",
        "| oversampled",
        "| Equal Scale",
    ]
    segmenter = str(newest_checkpoint(Path("runs/fairdiff/real"), "last"))
    judged = show_adherence.main([picture[1]], segmenter, image_size=32)
    assert [row[:2] for row in judged][-4:] == [
        ("real test images", "all"),
        ("synthetic images", "Asian"),
        ("synthetic images", "Black"),
        ("synthetic images", "all"),
    ]
    assert [count for _, name, count, _ in judged if name == "all"] == [100, len(rows(picture[1]))]
    assert all(0 <= score <= 1 for *_, score in judged)
    masks = {row["id"]: row for row in rows("runs/fairdiff/points/synthetic")}
    made = rows("runs/fairdiff/controlnet/synthetic")
    assert {row["condition"] for row in made} <= masks.keys()
    for row in made[:3]:
        files = f"points/synthetic/{masks[row['condition']]['file']}", f"controlnet/synthetic/{row['file']}"
        mask, image = (np.load(Path("runs/fairdiff", file))["disc_cup_mask"] for file in files)
        assert np.array_equal(mask, image)
    assert len(FairSeg().index(Path("runs/fairdiff/controlnet/synthetic")).records) == len(made)


def test_a_model_of_one_group_learns_and_generates_that_group_alone():
    config = ["--config", str(CONFIGS / "demo" / "fairseg_points.yaml")]
    only = ["--data.groups={race: [Black]}", "--model.conditional=false"]
    arguments = [*config, *SIZE, *TINY["points"], *QUIET, *only, "--trainer.default_root_dir=run"]
    main(["fit", *arguments, "--trainer.max_steps=2", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=1"])
    main(["predict", *arguments, "--data.generate.per_group=3", "--ckpt_path=last"])
    made = rows("run/synthetic")
    assert [(row["id"], row["race"]) for row in made] == [(f"synthetic_Black_{i:05d}", "Black") for i in range(3)]
    assert {path.stem for path in Path("run/synthetic").glob("*.npz")} == {row["id"] for row in made}
    everyone = FairSegDataModule(attributes=["race"], image_size=32)
    everyone.prepare_data()
    everyone.setup()
    races = {record.id: record.attributes["race"] for part in everyone.splits.values() for record in part}
    seen = {mark.partition("\t")[0] for mark in read_training_cases(Path("run/synthetic"))}
    assert len(seen) > 3
    assert {races[name] for name in seen} == {1}, "Black alone was learned from"
