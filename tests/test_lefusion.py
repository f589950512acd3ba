"""LeFusion through the command line: the shipped configurations and the pipeline's own commands, tiny."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from pipelines import REPOSITORY, pipeline, recorded
from test_cli import CONFIGS, VOLUMES

from fairdiff_lightning.cli import build_cli, main, newest_checkpoint
from fairdiff_lightning.data import LIDC, Emidec, EmidecDataModule, paste_roi, read_volume

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.max_steps=-1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.accumulate_grad_batches=1",
]
NETWORK = ["--model.width=8", "--model.multipliers=[1,2]", "--model.num_steps=4", "--model.num_validation_samples=2"]
TINY = {
    "lefusion": [*NETWORK, "--model.jump_length=1", "--model.jump_n_sample=1"],
    "lesion_masks": NETWORK,
    "segment": ["--model.network_args={filters: [4, 8, 8]}"],
}
SETS = {
    "p": [],
    "p_and_p_prime": ["p_prime"],
    "p_and_n_prime": ["n_prime"],
    "p_and_n_double_prime": ["n_double_prime"],
    "p_and_p_prime_and_n_double_prime": ["p_prime", "n_double_prime"],
}
"""Training sets of the paper -> the generated ones in each."""
LESIONS = [config for config in VOLUMES if "lidc" in config or "emidec" in config]


def size(config):
    sides = "[32,32,8]" if "emidec" in config else "[16,16,8]"
    spacing = [] if "emidec" in config else ["--data.spacing=[2.8,2.8,5.0]"]
    return [f"--data.image_size={sides}", *spacing, "--data.batch_size=4", "--data.num_workers=0"]


def part(config):
    return next(part for part in TINY if config.endswith(f"{part}.yaml"))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fairdiff"])
    for name in ("LIDC_ROOT", "EMIDEC_ROOT", "LESIONS_ROOT", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)


def rows(folder):
    with (Path(folder) / "manifest.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("config", LESIONS)
def test_every_shipped_configuration_trains(config):
    arguments = ["--config", str(CONFIGS / config), *size(config), *TINY[part(config)], *QUIET]
    main(["fit", *arguments, *SHORT])
    assert newest_checkpoint(Path(), "last").stat().st_size > 1000
    if part(config) == "segment":
        main(["test", *arguments, "--ckpt_path=last"])
        assert list(Path().rglob("fairness.json"))


@pytest.mark.parametrize("config", [config for config in LESIONS if part(config) == "segment"])
@pytest.mark.parametrize("root", [None, "made, here"])
def test_the_papers_training_sets_are_files_on_top_of_every_segmenter(config, root, monkeypatch):
    if root:
        monkeypatch.setenv("LESIONS_ROOT", root)
    assert {file.stem for file in (CONFIGS / "lefusion" / "sets").iterdir()} == {*SETS}
    parser = build_cli([f"--config={CONFIGS}/{config}", *QUIET], run=False).parser
    for name, parts in SETS.items():
        read = parser.parse_args([f"--config={CONFIGS}/{file}" for file in (config, f"lefusion/sets/{name}.yaml")])
        assert read.data.init_args.synthetic == [f"{root or 'runs/lefusion'}/{part}/synthetic" for part in parts]
        assert read.trainer.default_root_dir == f"{root or 'runs/lefusion'}/{name}"
        assert read.model.init_args.network == "dynunet"


def run(tmp_path, **settings):
    assert pipeline(tmp_path, "lefusion_pipeline.sh", **settings).returncode == 0
    commands = recorded(tmp_path)
    for file in [*tmp_path.rglob("last.ckpt"), *tmp_path.rglob("manifest.csv")]:
        file.unlink()
    for command in commands[:-2]:
        words = [word for word in command[1:] if not word.startswith("--ckpt_path")]
        config = words[words.index("--config") + 1]
        folder = Path(next(w.split("=")[1] for w in words if w.startswith("--trainer.default_root_dir=")))
        trained = folder if list(folder.rglob("last.ckpt")) else Path("runs/lefusion/lefusion")
        given = [] if command[1] == "fit" else [f"--ckpt_path={newest_checkpoint(trained, 'last')}"]
        length = SHORT if command[1] == "fit" else []
        main([*words, *given, *size(config), *TINY[part(config)], *QUIET[2:], *length])
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import compare_runs
    import show_lesions

    picture, table = commands[-2:]
    folders = picture[2 : picture.index("--output")]
    root = next((word.split("=")[1] for word in picture if word.startswith("--root=")), None)
    show_lesions.main(folders, picture[picture.index("--output") + 1], root, picture[picture.index("--dataset") + 1])
    assert Path("runs/lefusion/samples.png").stat().st_size > 10_000
    compare_runs.main(table[2 : table.index("--output")], output=table[-1])
    return [command[1] for command in commands[:-2]]


def test_the_pipeline_leads_from_scans_to_the_comparison(tmp_path):
    given = run(tmp_path, LESIONS="3")
    assert given == ["fit", "test", "fit", "fit", *["predict"] * 4, *["fit", "test"] * 4]
    sets = {name: rows(f"runs/lefusion/{name}/synthetic") for name in ("p_prime", "n_prime", "n_double_prime")}
    assert all(len(found) == 3 for found in sets.values())
    assert all("_CVol_" in row["source"] for row in sets["n_prime"] + sets["n_double_prime"])
    assert all("_CVol_" not in row["source"] for row in sets["p_prime"])
    masks = {row["id"] for row in rows("runs/lefusion/lesion_masks/synthetic")}
    assert {row["condition"] for row in sets["n_double_prime"]} <= masks
    records = LIDC().index(Path("runs/lefusion/n_double_prime/synthetic")).records
    image, mask = LIDC().read_volumes(records[0])
    assert image.shape == mask.shape == (16, 16, 8)
    assert -1000 <= image.array.min() < image.array.max() <= 400
    np.testing.assert_allclose(image.spacing, (2.8, 2.8, 5.0), atol=1e-3)
    table = Path("runs/lefusion/comparison.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[0] for line in table][::4] == ["| P", "| P and all"]


def test_the_pipeline_puts_infarcts_into_the_walls_of_healthy_hearts(tmp_path):
    data = EmidecDataModule()
    data.prepare_data()
    run(tmp_path, KIND="emidec", DATA=str(data.folder), LESIONS="2")
    made = Emidec().index(Path("runs/lefusion/n_double_prime/synthetic")).records
    assert [record.source[:6] for record in made] == ["Case_N"] * 2
    healthy = {record.id: record for record in Emidec().backgrounds(data.folder)}
    for record in made:
        image, mask = Emidec().read_volumes(record)
        scan, wall = Emidec().read_volumes(healthy[record.source])
        assert np.isin(mask.array, (3, 4)).any()
        start = np.round(np.linalg.solve(scan.affine, image.affine)[:3, 3]).astype(int)
        block = tuple(slice(s, s + n) for s, n in zip(start, image.shape, strict=True))
        assert (wall.array[block][np.isin(mask.array, (3, 4))] == 2).all(), "lesions lie in the heart's own wall"
        outside = ~np.isin(mask.array, (3, 4))
        np.testing.assert_allclose(image.array[outside], scan.array[block][outside], atol=1e-6)


def test_a_lesion_goes_into_a_real_scan_and_nothing_else_changes(realdata):
    config = str(CONFIGS / "demo" / "lidc_lefusion.yaml")
    arguments = ["--config", config, *size(config), *TINY["lefusion"], *QUIET]
    main(["fit", *arguments, *SHORT, "--trainer.limit_train_batches=1"])
    folder = realdata / "IBSI" / "ibsi_1_ct_radiomics_phantom" / "nifti" / "image"
    plan = ["--data.generate.total=1", "--data.generate.masks=train", f"--data.generate.backgrounds={folder}"]
    main(["predict", *arguments, *plan, "--ckpt_path=last", "--data.spacing=null", "--trainer.default_root_dir=."])
    (record,) = LIDC().index(Path("synthetic")).records
    block, mask = LIDC().read_volumes(record)
    scan = read_volume(folder / "phantom.nii.gz").reoriented(LIDC.axes)
    whole = paste_roi(scan, block, mask.array)
    assert record.source == "phantom"
    assert 0 < (whole.array != scan.array).sum() <= mask.array.sum()
    start = np.round(np.linalg.solve(scan.affine, block.affine)[:3, 3]).astype(int)
    around = scan.array[tuple(slice(s, s + n) for s, n in zip(start, block.shape, strict=True))].clip(-1000, 400)
    assert np.abs(block.array - around)[mask.array == 0].max() <= 1, "what is around the lesion is the scan"


def test_a_killed_pipeline_goes_on(tmp_path):
    assert pipeline(tmp_path, "lefusion_pipeline.sh", KILL_AFTER="5").returncode != 0
    assert pipeline(tmp_path, "lefusion_pipeline.sh", LESIONS="4").returncode == 2, "another run's folder"
    first = len(recorded(tmp_path))
    assert pipeline(tmp_path, "lefusion_pipeline.sh").returncode == 0
    again = recorded(tmp_path)[first:]
    assert all(any(w.startswith("--ckpt_path=") for w in command) for command in again[:5] if command[1] == "fit")
