"""PIG through the command line: the shipped configurations and the pipeline's own commands, tiny."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipelines import REPOSITORY, pipeline, recorded
from test_cli import CONFIGS, GENERATORS
from test_fairdiff import QUIET, SIZE, TINY, kind

from fairdiff_lightning.cli import main, newest_checkpoint
from fairdiff_lightning.data import DBT

SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fairdiff"])
    for name in ("DBT_ROOT", "GUIDER", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)


def rows(folder):
    with (Path(folder) / "manifest.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("config", [config for config in GENERATORS if "pig" in config])
def test_every_shipped_stage_trains_and_generates(config):
    arguments = ["--config", str(CONFIGS / config), *SIZE, *TINY["pig"], *QUIET]
    if "target" in config:
        guider = ["--config", str(CONFIGS / config.replace("target", "guider"))]
        main(["fit", *guider, *arguments[2:], *SHORT, "--trainer.default_root_dir=guider"])
        arguments.append(f"--model.guider_checkpoint={newest_checkpoint(Path('guider'), 'last')}")
    arguments.append("--trainer.default_root_dir=run")
    main(["fit", *arguments, *SHORT])
    predict = ["predict", *arguments, "--data.generate.per_group=2", "--ckpt_path=last"]
    if "guider" in config:
        with pytest.raises(ValueError, match="stage='guider' makes no pairs"):
            main(predict)
        return
    main(predict)
    made = rows("run/synthetic")
    index = DBT().index(Path("run/synthetic"))
    assert len(made) == len(index.records) == (8 if "demo" in config else 4)
    assert all(record.synthetic for record in index.records)
    image, mask = DBT().read_arrays(index.records[0])
    assert image.shape == mask.shape == (32, 32)
    assert set(np.unique(mask)) <= {0, 1}


def run(tmp_path, **settings):
    assert pipeline(tmp_path, "pig_pipeline.sh", **settings).returncode == 0
    commands = recorded(tmp_path)
    for file in [*tmp_path.rglob("last.ckpt"), *tmp_path.rglob("manifest.csv")]:
        file.unlink()
    for command in commands[:-2]:
        words = [w for w in command[1:] if "guider_checkpoint" not in w]
        if len(words) + 1 < len(command):
            words.append(f"--model.guider_checkpoint={newest_checkpoint(Path('runs/pig/guider'), 'last')}")
        part = kind(" ".join(w for w in words if "configs" in w))
        length = [*SHORT, "--trainer.max_steps=-1"] if command[1] == "fit" else []
        main([*words, *SIZE, *TINY[part], *QUIET[2:], *length])
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import compare_runs
    import show_synthetic

    picture, table = commands[-2:]
    assert [picture[1], table[1]] == ["examples/show_synthetic.py", "examples/compare_runs.py"]
    root = next((word.split("=")[1] for word in picture if word.startswith("--root=")), None)
    show_synthetic.main(picture[2], picture[4], root, attribute=picture[8], dataset=picture[6])
    assert Path(picture[4]).stat().st_size > 10_000
    compare_runs.main(table[2:4], output=table[5])
    return [command[1] for command in commands[:-2]]


@pytest.mark.parametrize("joint", ["", "1"])
def test_the_pipeline_leads_from_slices_to_the_comparison(tmp_path, joint):
    given = run(tmp_path, JOINT=joint, PAIRS="6")
    assert given == ["fit", "test", *["fit"] * (1 if joint else 2), "predict", "fit", "test"]
    assert len(rows("runs/pig/pairs/synthetic")) == 6
    table = Path("runs/pig/comparison.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[0] for line in table] == ["| real only", "| real and pairs"]


def test_the_pipeline_takes_real_mammograms(tmp_path, realdata):
    run(tmp_path, DATA=str(realdata / "CDD-CESM_mini_512"), JOINT="1", PAIRS="4")
    (image,) = list(Path("runs/pig/pairs/synthetic").glob("*/*_A_00000.png"))[:1]
    assert np.asarray(Image.open(image)).dtype == np.uint8
