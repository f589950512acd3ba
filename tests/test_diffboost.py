"""DiffBoost through the command line: the shipped configurations and the pipeline's own commands, tiny."""

import json
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pipelines import REPOSITORY, pipeline, recorded
from test_cli import CONFIGS
from test_fairdiff import QUIET, SIZE, rows
from test_fairdiff import TINY as GENERATOR

from fairdiff_lightning.cli import main, newest_checkpoint
from fairdiff_lightning.data.busi import BUSI, BUSIDataModule
from fairdiff_lightning.networks.build import build_network

SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.max_steps=-1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.check_val_every_n_epoch=1",
]
TINY = {
    "segment": ["--model.network_args={channels: [4, 8], strides: [2]}"],
    "controlnet": [*GENERATOR["controlnet"], "--model.num_steps=2", "--model.num_validation_samples=2"],
}
ONE = ["--data.generate.masks=train", "--data.generate.total=4"]


def part(config):
    return "segment" if "segment" in config else "controlnet"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fairdiff"])
    for name in ("BUSI_ROOT", "HIPPOCAMPUS_ROOT", "SD15", "CONTROLNET", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)


def arguments(config, *more):
    return ["--config", f"configs/{config}", *SIZE, *TINY[part(config)], *QUIET, *more]


def small(words):
    """Arguments that make the data and the network of a command small."""
    return ["--data.image_size=32", *TINY[part(words[words.index("--config") + 1])]]


def at_hand(word):
    """The argument, with a sample of the phantom's first fold that another command would have made before it."""
    if word.startswith("--data.synthetic="):
        lesions = {"diagnosis": ["benign", "malignant"]}
        data = BUSIDataModule(image_size=32, fold=0, groups=lesions, fractions=(0.9, 0.1, 0.0))
        data.prepare_data()
        data.setup()
        sample = data._data("train")[0]
        made = {**sample, "id": "synthetic_0", "source": sample["id"], "synthetic": torch.tensor(True)}
        data.write_sample(word.split("=")[1].strip("[]"), made)
    return "--data.merge.patch_size=8" if word.startswith("--data.merge.patch_size=") else word


def splits(folder):
    (table,) = Path(folder).rglob("version_0/splits.csv")
    return pd.read_csv(table).groupby("split")["id"].agg(set)


def test_the_full_size_configurations_lead_from_edges_to_a_merged_segmenter():
    generator = arguments("busi/edges_controlnet.yaml", "--trainer.default_root_dir=generator")
    main(["fit", *generator, *SHORT])
    main(["predict", *generator, *ONE, "--ckpt_path=last"])
    synthetic = "--data.synthetic=[generator/synthetic]"
    segmenter = arguments("busi/segment.yaml", "--trainer.default_root_dir=run")
    merge = ["--data.merge=PatchMerge", "--data.merge.patch_size=8", "--data.merge.level=logits"]
    main(["fit", *segmenter, *SHORT, synthetic, *merge])
    main(["test", *segmenter, "--ckpt_path=last"])
    made = rows("generator/synthetic")
    assert [row["diagnosis"] for row in made] == ["benign"] * 2 + ["malignant"] * 2
    training = splits("generator")["train"]
    assert {row["source"] for row in made} == {row["condition"] for row in made} <= training
    with pytest.raises(ValueError, match=r"synthetic sample .* is derived from the validation or test case '"):
        main(["fit", *segmenter, *SHORT, synthetic, *merge, "--data.fold=1"])
    with pytest.raises(ValueError, match=r"the checkpoint was trained on \d+ validation or test cases: '"):
        main(["predict", *generator, *ONE, "--ckpt_path=last", "--data.fold=1"])


def test_the_authors_settings_stand_in_the_configurations():
    model, data = (
        yaml.safe_load((CONFIGS / "busi/segment.yaml").read_text())[k]["init_args"] for k in ("model", "data")
    )
    network = build_network(model["network"], 1, 2, data["image_size"], model["network_args"])
    assert sum(p.numel() for p in network.parameters()) == 2_742_830
    assert (data["image_size"], data["batch_size"], data["num_folds"]) == (384, 8, 3)
    settings = yaml.safe_load((CONFIGS / "busi/edges_controlnet.yaml").read_text())
    assert settings["model"]["init_args"]["optimizer"]["init_args"] == {"lr": 1e-6}
    assert (settings["data"]["init_args"]["batch_size"], settings["trainer"]["max_epochs"]) == (32, 1600)


def run(tmp_path, left_out=(), **settings):
    """Run the pipeline's commands, but those whose folder has a part that is left out; the table is of the others."""
    assert pipeline(tmp_path, "diffboost_pipeline.sh", **settings).returncode == 0
    *recorded_commands, table = recorded(tmp_path)
    commands = [command for command in recorded_commands if not any(p in w for p in left_out for w in command)]
    for file in [*tmp_path.rglob("last.ckpt"), *tmp_path.rglob("manifest.csv")]:
        file.unlink()
    for command in commands:
        config = command[command.index("--config") + 1]
        length = SHORT if command[1] == "fit" else []
        main([*command[1:], *SIZE, *TINY[part(config)], *QUIET[2:], *length])
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import compare_runs

    names = [name.split(",") for name in table[2 : table.index("--output")]]
    kept = [",".join(f for f in folders if not any(p in f for p in left_out)) for folders in names]
    compare_runs.main([run for run in kept if run], output=table[-1])
    return commands


def test_the_pipeline_leads_from_images_to_the_comparison_over_folds(tmp_path):
    commands = run(tmp_path, FOLDS="2", SAMPLES="1", PATCH="8")
    assert [command[1] for command in commands] == [*["fit", "test"] * 2, "fit", "predict", "fit", "test"] * 2
    tested = []
    for fold in ("fold_0", "fold_1"):
        folder = Path("runs/diffboost") / fold
        parts = [splits(folder / name) for name in ("baseline", "classical", "generator", "merged")]
        assert all(found["test"] == parts[0]["test"] for found in parts)
        assert all(found["train"] == parts[0]["train"] for found in parts), "merged samples are no samples of their own"
        tested.append(parts[0]["test"])
        made = rows(folder / "generator" / "synthetic")
        assert sorted(row["source"] for row in made) == sorted(parts[0]["train"]), "one for each training image"
    assert not tested[0] & tested[1]
    data = BUSIDataModule()
    lesions = {r.id for r in BUSI().index(data.folder).records if r.attributes["diagnosis"] < 2}
    assert tested[0] | tested[1] == lesions
    table = Path("runs/diffboost/comparison.md").read_text()
    assert all(f"| {name} |" in table for name in ("baseline", "classical", "DiffBoost"))
    synthetic = BUSI().index(Path("runs/diffboost/fold_0/generator/synthetic")).records
    image, mask = BUSI().read_arrays(synthetic[0])
    assert image.shape == mask.shape == (32, 32)
    state = torch.load(newest_checkpoint(Path("runs/diffboost/fold_0/merged"), "last"), weights_only=True)
    assert len(state["BUSIDataModule"]["training_cases"]) == len(parts[0]["train"])


def hippocampi(realdata, root, count=4, depth=6):
    """The middle slices of real cases, as a task of their own."""
    real = realdata / "MSD" / "Task04_Hippocampus"
    content = json.loads((real / "dataset.json").read_text())
    content["training"] = content["training"][:count]
    for file in [case[role] for case in content["training"] for role in ("image", "label")]:
        volume = nib.load(real / file)
        middle = volume.shape[2] // 2 - depth // 2
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        nib.save(volume.slicer[:, :, middle : middle + depth], root / file)
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_the_pipeline_scores_volumes_of_real_hippocampi(realdata, tmp_path):
    root = hippocampi(realdata, tmp_path / "Task04_Hippocampus")
    settings = {"KIND": "hippocampus", "DATA": str(root), "FOLDS": "2", "SAMPLES": "2", "PATCH": "8"}
    commands = run(tmp_path, ("fold_1", "classical"), **settings)
    assert all(f"--data.root={root}" in command for command in commands)
    folder = Path("runs/diffboost/fold_0")
    parts = splits(folder / "generator")
    made = Counter(row["source"] for row in rows(folder / "generator" / "synthetic"))
    assert made == dict.fromkeys(parts["train"], 2)
    table = pd.read_csv(next(folder.rglob("merged/**/cases.csv")))
    assert sorted(table["id"]) == sorted({name.rsplit("_z", 1)[0] for name in parts["test"]})
    names = [f"{score}_{label}" for score in ("dice", "iou", "hd95", "assd") for label in ("Anterior", "Posterior")]
    assert list(table.columns) == ["id", "all", *names]
    compared = Path("runs/diffboost/comparison.md").read_text().splitlines()
    assert compared[0] == "| run | cases | Dice | Dice minus baseline | p (Dice) |"
    assert [line.split(" | ")[:2] for line in compared[2:]] == [["| baseline", "2"], ["| DiffBoost", "2"]]
    import slices_to_volumes

    paths = slices_to_volumes.main(str(root), str(folder / "generator" / "synthetic"), "volumes")
    cases = {source.rsplit("_z", 1)[0] for source in parts["train"]}
    assert [path.name for path in paths] == [
        f"{case}_synthetic_{k:03d}.nii.gz" for case in sorted(cases) for k in range(2)
    ]
    written, scan = (nib.load(folder / "imagesTr" / name) for folder, name in
                     ((Path("volumes"), paths[0].name), (root, f"{min(cases)}.nii.gz")))  # fmt: skip
    assert (written.shape, written.affine.tolist()) == (scan.shape, scan.affine.tolist())
    assert np.ptp(written.get_fdata()) > 0.1 * np.ptp(scan.get_fdata()), "the scanner's unit, not [0, 1]"


def test_weights_of_the_edge_detector_go_to_all_that_draws_edges(tmp_path):
    assert pipeline(tmp_path, "diffboost_pipeline.sh", KIND="busi", FOLDS="1", HED="weights.pth").returncode == 0
    *commands, _ = recorded(tmp_path)
    wanted = [
        "--data.edges=fairdiff_lightning.networks.hed.HED",
        f"--data.edges.weights={Path('weights.pth').resolve()}",
    ]
    drawing = [command for command in commands if "configs/busi/edges_controlnet.yaml" in command]
    assert [command[1] for command in drawing] == ["fit", "predict"]
    assert all([word for word in command if "edges=" in word or "edges." in word][-2:] == wanted for command in drawing)
    assert not any(set(wanted) & set(command) for command in commands if command not in drawing)
    assert "--data.generate.per_source=4" in drawing[1]
    done = pipeline(tmp_path, "diffboost_pipeline.sh", KIND="liver")
    assert (done.returncode, done.stderr) == (2, "KIND=liver; expected is demo, busi or hippocampus.\n")


def test_a_killed_pipeline_goes_on(tmp_path):
    assert pipeline(tmp_path, "diffboost_pipeline.sh", KILL_AFTER="5").returncode != 0
    assert pipeline(tmp_path, "diffboost_pipeline.sh", SAMPLES="5").returncode == 2, "another run's folder"
    first = len(recorded(tmp_path))
    assert pipeline(tmp_path, "diffboost_pipeline.sh").returncode == 0
    again = recorded(tmp_path)[first:]
    assert all(any(w.startswith("--ckpt_path=") for w in command) for command in again[:5] if command[1] == "fit")
