"""PIG through the command line: the shipped configurations and the pipeline's own commands, tiny."""

import csv
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pipelines import REPOSITORY, pipeline, recorded
from test_cli import CONFIGS, GENERATORS
from test_fairdiff import QUIET, SIZE, TINY, kind

from fairdiff_lightning.cli import build_cli, main, newest_checkpoint
from fairdiff_lightning.data import DBT

SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fairdiff"])
    for name in ("DBT_ROOT", "GUIDER", "PAIRS_ROOT", "PL_GLOBAL_SEED"):
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


def test_every_row_of_the_papers_table_is_a_file_beside_the_segmenters(monkeypatch):
    monkeypatch.setenv("PAIRS_ROOT", "pairs")
    image, mask = torch.rand(1, 32, 32), torch.ones(1, 32, 32, dtype=torch.int64)
    for folder, view in product(("pairs_1024", "pairs_2048", "pairs_3072"), range(2)):
        made = {"id": f"synthetic_{view}", "attributes": {"view": torch.tensor(view)}, "synthetic": torch.tensor(True)}
        DBT().write(Path("pairs") / folder / "synthetic", {"image": image, "mask": mask, **made})
    for count in (0, 1024, 2048, 3072):
        configs = [f"--config={CONFIGS}/dbt/{name}.yaml" for name in ("segment", f"ratio/{count}")]
        arguments = [*configs, *SIZE, *TINY["segmenter"], *QUIET, "--data.fold=1"]
        cli = build_cli(arguments, run=False)
        assert cli.trainer.default_root_dir.endswith(f"runs/dbt/segment_{count}")
        cli.datamodule.prepare_data()
        cli.datamodule.setup()
        splits = cli.datamodule.splits
        assert [sum(r.synthetic for r in splits[part]) for part in splits] == [count // 1024 * 2, 0, 0]
        assert len({r.unit for r in splits["test"]}) == 8, "a fifth of the phantom's 40 patients"
    main(["fit", *arguments, "--trainer.fast_dev_run=1"])


def run(tmp_path, left_out=(), **settings):
    """Run the pipeline's commands, but those whose folder has a part that is left out; the table is of the others."""
    assert pipeline(tmp_path, "pig_pipeline.sh", **settings).returncode == 0
    *recorded_commands, picture, table = recorded(tmp_path)
    commands = [command for command in recorded_commands if not any(p in w for p in left_out for w in command)]
    for file in [*tmp_path.rglob("last.ckpt"), *tmp_path.rglob("manifest.csv")]:
        file.unlink()
    for command in commands:
        words = [made_by_now(word) for word in command[1:]]
        part = kind(" ".join(w for w in words if "configs" in w))
        length = [*SHORT, "--trainer.max_steps=-1"] if command[1] == "fit" else []
        main([*words, *SIZE, *TINY[part], *QUIET[2:], *length])
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import compare_runs
    import show_synthetic

    assert [picture[1], table[1]] == ["examples/show_synthetic.py", "examples/compare_runs.py"]
    root = next((word.split("=")[1] for word in picture if word.startswith("--root=")), None)
    show_synthetic.main(picture[2], picture[4], root, attribute=picture[8], dataset=picture[6])
    assert Path(picture[4]).stat().st_size > 10_000
    runs = [run.split(",")[0] for run in table[2 : table.index("--output")]]
    compare_runs.main([run for run in runs if not any(p in run for p in left_out)], output=table[-1])
    return recorded_commands


def made_by_now(word):
    """The argument, with the checkpoint of this run in place of the stand-in's."""
    name, _, file = word.partition("=")
    return f"{name}={newest_checkpoint(Path(file).parent, 'last')}" if file.endswith("last.ckpt") else word


def names_of_runs():
    table = Path("runs/pig/comparison.md").read_text().splitlines()[2:]
    return [line.split(" | ")[0].removeprefix("| ") for line in table]


def test_the_pipeline_leads_from_slices_to_the_comparison(tmp_path):
    commands = run(tmp_path, PAIRS="6")
    assert [command[1] for command in commands] == ["fit", "test", "fit", "fit", "predict", "fit", "test"]
    assert len(rows("runs/pig/fold_0/pairs_6/synthetic")) == 6
    assert names_of_runs() == ["real only", "real and 6 pairs"]


def test_numbers_of_pairs_are_compared_and_each_holds_the_smaller_ones(tmp_path):
    commands = run(tmp_path, ("fold_1", "mixed_4"), JOINT="1", PAIRS="10 4", FOLDS="2")
    first, second = ([command for command in commands if f"--data.fold={fold}" in command] for fold in ("0", "1"))
    assert [command[1] for command in first] == ["fit", "test", "fit", "predict", "predict", *["fit", "test"] * 2]
    swapped = [[w.replace("fold_0", "fold_1").replace("fold=0", "fold=1") for w in command] for command in first]
    assert (swapped, first + second) == (second, commands)
    fold = Path("runs/pig/fold_0")
    made = {count: rows(fold / f"pairs_{count}" / "synthetic") for count in (4, 10)}
    assert [len(found) for found in made.values()] == [4, 6]
    assert not {row["seed"] for row in made[4]} & {row["seed"] for row in made[10]}, "no pair is made twice"
    for name, count in (("real", 0), ("mixed_10", 10)):
        assert pd.read_csv(next((fold / name).rglob("splits.csv")))["synthetic"].sum() == count
    assert names_of_runs() == ["real only", "real and 10 pairs"]


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        *(("PAIRS", numbers, "expected are numbers from 1") for numbers in ("0 64", "many", "-4")),
        *(("FOLDS", number, "expected is a number from 1 to 5") for number in ("0", "6", "abc", "-1", "1 2")),
    ],
)
def test_numbers_of_pairs_and_folds_that_are_none_are_refused(tmp_path, setting, value, expected):
    refused = pipeline(tmp_path, "pig_pipeline.sh", **{setting: value})
    assert (refused.returncode, f"{setting}={value}; {expected}" in refused.stderr) == (2, True)
    assert not (tmp_path / "commands").exists()
    assert not (tmp_path / "runs").exists()


def test_the_pipeline_takes_real_mammograms(tmp_path, realdata):
    run(tmp_path, DATA=str(realdata / "CDD-CESM_mini_512"), JOINT="1", PAIRS="4")
    (image,) = list(Path("runs/pig/fold_0/pairs_4/synthetic").glob("*/*_A_00000.png"))[:1]
    assert np.asarray(Image.open(image)).dtype == np.uint8
