"""Every command and every piece of Python in README and docs runs."""

import configparser
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_diffboost import at_hand as partners_at_hand
from test_diffboost import small
from test_fairdiff import TINY as PARTS
from test_fairdiff import kind
from test_lefusion import TINY as LESION_PARTS
from test_lefusion import part, size
from test_volume_runs import SMALL

from fairdiff_lightning.cli import main
from fairdiff_lightning.data import DBT, LIDC, FairSeg, write_volume
from fairdiff_lightning.data.phantoms_3d import chest
from fairdiff_lightning.modules import PairedGuidedDiffusion

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TINY = ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.devices=1"]
TINY += ["--trainer.precision=32-true", "--data.batch_size=2", "--data.num_workers=0"]
VOLUMES = re.compile(r"configs/(demo/)?(lidc|emidec|prostate|hippocampus)")
PATCHES = ["--data.spacing=[6,6,3]", "--data.patch_size=[32,32,64]", "--model.roi_size=[32,32,64]"]
PATCHES += ["--data.cache=memory"]


def blocks(language):
    for document in DOCUMENTS:
        for i, block in enumerate(re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)):
            yield pytest.param(block, id=f"{document.name}-{i}")


def commands():
    for block in blocks("bash"):
        for line in block.values[0].splitlines():
            yield pytest.param(line.split("#")[0].strip(), id=line[:90])


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with the configurations, a trained checkpoint's place and no data."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fairdiff"])
    named = ("FAIRSEG", "HAM10000", "DBT", "LIDC", "EMIDEC", "PROSTATE", "HIPPOCAMPUS", "BUSI", "RADIMAGENET")
    data = [f"{name}_ROOT" for name in named]
    for name in (*data, "GUIDER", "FAIRSEG_TRANSUNET", "SD15", "CONTROLNET"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("command", commands())
def test_commands_run(command, repository, monkeypatch):
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)  # a checkpoint or base that is not here: what it does is in tests/modules
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=REPOSITORY, check=True, capture_output=True)
    elif words[0] == "bash":
        # run by test_fairdiff.py, test_pig.py, test_lefusion.py and test_diffboost.py, command by command
        assert words[1:] in ([f"examples/{name}_pipeline.sh"] for name in ("fairdiff", "pig", "lefusion", "diffboost"))
        subprocess.run(["bash", "-n", words[1]], cwd=REPOSITORY, check=True)
    elif words[0] == "tensorboard":
        assert words[1:] == ["--logdir", "runs"]
    elif words[0] == ".":
        assert f"VENV := {words[1].split('/')[0]}" in (REPOSITORY / "Makefile").read_text()
    else:
        assert words[0] == "fairdiff"
        words += guider() if "configs/dbt/pig_target.yaml" in words else []
        given = [at_hand(w) for w in words[1:] if not w.startswith(("--data.root", "--ckpt_path", "--data.total"))]
        given += ["--data.total=30"] if "--data.balance=equal_scale" in words else []
        main([*given, *TINY, *tiny(words)])


def tiny(words):
    """Arguments that make the data and the network of a command small."""
    config = next((word for word in words if VOLUMES.match(word)), None)
    if config is not None:
        own = [word for word in words if word.startswith("--data.batch_size")]
        return [*tiny_volumes(config), *own]
    if any("busi" in word for word in words if "configs" in word):
        return small(words)
    if any("radimagenet" in w for w in words if "configs" in w):
        return ["--data.image_size=32", *PARTS["controlnet"], "--model.prompt="]
    named = kind(" ".join(w for w in words if "configs" in w))
    network = [] if any("unet.yaml" in w and "trans" not in w for w in words) else PARTS[named]
    return [*([] if "--data.image_size=null" in words else ["--data.image_size=32"]), *network]


def tiny_volumes(config):
    """Arguments that make a configuration of volumes small."""
    if "lidc" in config or "emidec" in config:
        untrained = ["--model.conditioning=null"] if part(config) == "lefusion" else []
        return [*size(config), *LESION_PARTS[part(config)], *untrained]
    network = ["--model.network_args.feature_size=4"]
    if "hippocampus" in config:
        # a fast development run validates, which the configuration does not
        return ["--data.fractions=[0.6,0.2,0.2]", *network]
    if "demo" in config:
        return [*SMALL, *network]
    return [*PATCHES, *network, *(["--model.num_experts=2"] if "dmoe" in config else [])]


def guider():
    """The argument with a guider's checkpoint, as another command would have made it."""
    widths = yaml.safe_load(PARTS["pig"][0].split("=")[1])
    groups = {"num_groups": {"view": 2}, "attributes": ("view",)}
    model = PairedGuidedDiffusion("guider", image_size=32, widths=tuple(widths), **groups)
    torch.save({"state_dict": model.state_dict()}, "guider.ckpt")
    return ["--model.guider_checkpoint=guider.ckpt"]


def at_hand(word):
    """The argument, with what another command would have made before it."""
    if "busi" in word or "--data.merge." in word:
        return partners_at_hand(word)
    if word.startswith("--data.synthetic="):
        sample = {"image": torch.rand(1, 32, 32), "mask": torch.ones(1, 32, 32), "synthetic": torch.tensor(True)}
        for folder in word.split("=")[1].strip("[]").split(","):
            for group in range(3):
                made = {**sample, "id": f"{Path(folder).name}-{group}"}
                if "lidc" in folder:
                    volume = {"image": torch.rand(1, 16, 16, 8), "mask": torch.ones(1, 16, 16, 8), "attributes": {}}
                    LIDC().write(Path(folder), {**made, **volume})
                elif "pairs" in folder or "pig" in folder:
                    DBT().write(Path(folder), {**made, "attributes": {"view": torch.tensor(group % 2)}})
                else:
                    FairSeg().write(Path(folder), {**made, "attributes": {"race": torch.tensor(group)}})
    if word == "--data.generate.backgrounds=scans":
        write_volume("scans/scan.nii.gz", chest(np.random.default_rng(0), nodules=0).image)
    if word.startswith("--data.generate.total="):
        return "--data.generate.total=120"
    if word.startswith("--data.generate.masks="):
        return "--data.generate.masks=train"
    if word == "--trainer.callbacks.extractor=inception":
        return "--trainer.callbacks.extractor=torch.nn.Flatten"
    return word


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_runs(document, repository):
    code = "\n".join(re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL))
    for clinic in ("north", "south"):
        (repository / "clinics" / clinic).mkdir(parents=True)
        for i in range(6):
            image = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(image).save(repository / "clinics" / clinic / f"p{i}_0.png")
            Image.fromarray((image[..., 0] > 99) * np.uint8(255)).save(
                repository / "clinics" / clinic / f"p{i}_0_mask.png"
            )
    names = {"__name__": "document"}
    exec(compile(code, "document", "exec"), names)
    if "Clinics" in names:
        names["data"].prepare_data()
        names["data"].setup()
        batch = next(iter(names["data"].train_dataloader()))
        assert batch["image"].shape == (4, 3, 32, 32)
        assert set(batch["attributes"]["clinic"].tolist()) <= {0, 1}


def test_links_lead_to_files():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).is_file(), f"{document.name}: {target}"


def test_own_dataset_example_learns(repository):
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import own_dataset

    metrics = own_dataset.main(max_epochs=3).callback_metrics
    assert float(metrics["val/dice"]) > 0.9
    assert float(metrics["val/es_dice/clinic"]) > 0.8


def test_own_module_example_reports(repository):
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import own_module

    trainer = own_module.main(max_epochs=1, output_dir="report")
    assert 0 <= float(trainer.callback_metrics["test/es_dice"]) <= 1
    assert {p.name for p in Path("report").iterdir()} == {"report.html", "fairness.csv", "fairness.json", "cases.csv"}


def test_every_requirement_says_why_it_is_bounded():
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    assert config["options.entry_points"]["console_scripts"].strip() == "fairdiff = fairdiff_lightning.cli:main"
    lines = (REPOSITORY / "setup.cfg").read_text().split("install_requires =")[1].split("\n[options")[0].splitlines()
    requirements = [i for i, line in enumerate(lines) if re.match(r"\s+[a-z]", line)]
    assert len(requirements) > 10
    for i in requirements:
        assert lines[i - 1].strip().startswith("#"), lines[i]
        assert "<" not in lines[i], "an upper cap"


def test_importing_the_package_is_light():
    code = (
        "import sys, fairdiff_lightning; "
        "heavy = {'torch', 'lightning', 'monai', 'timm', 'diffusers', 'transformers'} & sys.modules.keys(); "
        "assert not heavy, heavy; "
        "import fairdiff_lightning.networks, fairdiff_lightning.metrics, fairdiff_lightning.losses; "
        "assert not {'lightning', 'monai', 'timm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
