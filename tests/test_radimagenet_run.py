"""DiffBoost's stage 1 by the command line: the shipped configuration on the phantom, and what stage 2 takes of it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from pipelines import REPOSITORY
from test_cli import CONFIGS
from test_fairdiff import QUIET
from tiny_stable_diffusion import write_stable_diffusion

from fairdiff_lightning.cli import main, newest_checkpoint
from fairdiff_lightning.data import RadImageNetDataModule, ScharrEdges
from fairdiff_lightning.modules import ControlNetSynth
from fairdiff_lightning.networks import CheckpointMismatchError
from fairdiff_lightning.networks.hed import HED

CONFIG = "radimagenet/edges_controlnet.yaml"
SMALL = [
    *QUIET,
    "--data.image_size=16",
    "--data.batch_size=15",
    "--data.num_workers=0",
    "--model.negative_prompt=",
    "--model.text_dropout=0",
    "--model.num_steps=1",
    "--model.num_validation_samples=1",
    "--trainer.limit_val_batches=1",
    "--trainer.val_check_interval=0.5",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.logger=false",
    "--trainer.max_epochs=2",
    "--trainer.callbacks.every_n_train_steps=2",
]
STEPS = 4
"""In an epoch of the phantom: 59 images in batches of 15."""
STAGE_2 = {"condition": "edge", "num_classes": 2, "in_channels": 1, "image_size": 16, "prompt": "Breast, Ultrasound"}
PROMPTS = {"CT,abdomen,normal", "CT,lung,nodule", "MR,ankle,plantar fascia", "MR,hip,normal", "US,gallbladder"}


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    return str(write_stable_diffusion(tmp_path_factory.mktemp("stage_1")))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fairdiff"])
    for name in ("RADIMAGENET_ROOT", "SD15", "CONTROLNET", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def seen(monkeypatch):
    """The batches that were trained on, ids and prompts; training dies before the step that ``die_at`` numbers."""
    found, real = SimpleNamespace(batches=[], die_at=None), ControlNetSynth.training_step

    def step(self, batch, batch_idx):
        if len(found.batches) == found.die_at:
            raise RuntimeError("killed")
        found.batches.append((batch["id"], batch["prompt"]))
        return real(self, batch, batch_idx)

    monkeypatch.setattr(ControlNetSynth, "training_step", step)
    return found


def arguments(sd, folder, *more):
    return [
        "--config",
        str(CONFIGS / CONFIG),
        f"--model.base={sd}",
        *SMALL,
        f"--trainer.default_root_dir={folder}",
        *more,
    ]


def test_stage_1_that_was_killed_in_an_epoch_sees_what_an_unbroken_run_sees(sd, seen):
    main(["fit", *arguments(sd, "whole")])
    whole, seen.batches, seen.die_at = seen.batches, [], 3
    with pytest.raises(RuntimeError, match="killed"):
        main(["fit", *arguments(sd, "broken")])
    begun, seen.batches, seen.die_at = seen.batches, [], None
    main(["fit", *arguments(sd, "broken", "--ckpt_path=last")])
    assert len(whole) == 2 * STEPS
    assert begun == whole[:3]
    assert seen.batches == whole[2:], "from the checkpoint after step 2 on"
    epochs = [sorted(i for ids, _ in part for i in ids) for part in (whole[:STEPS], whole[STEPS:])]
    assert epochs[0] == epochs[1]
    assert len(set(epochs[0])) == 59
    assert {prompt for _, prompts in whole for prompt in prompts} == PROMPTS
    for run in ("whole", "broken"):
        state = torch.load(newest_checkpoint(Path(run), "last"), weights_only=True)
        assert state["global_step"] == 2 * STEPS
        assert {name.split(".")[0] for name in state["state_dict"]} == {"controlnet"}
        taken = ControlNetSynth(sd, **STAGE_2, controlnet=str(newest_checkpoint(Path(run), "last")))
        for name, tensor in taken.controlnet.state_dict().items():
            assert torch.equal(tensor, state["state_dict"][f"controlnet.{name}"]), name


def test_a_base_without_a_text_encoder_learns_each_prompt_and_resumes_with_them(seen):
    small = "{block_out_channels: [8, 16], attention_head_dim: 2, norm_num_groups: 4}"
    told = ("--model.base=tiny", "--model.trained=all", f"--model.base_args={small}", "--model.guidance_scale=1")
    main(["fit", *arguments("tiny", "run", *told), "--trainer.max_steps=2"])
    first = torch.load(newest_checkpoint(Path("run"), "last"), weights_only=True)
    assert set(first["hyper_parameters"]["learned_prompts"]) == PROMPTS
    assert first["state_dict"]["prompts.learned"].shape[0] == len(PROMPTS) + 1
    main(["fit", *arguments("tiny", "run", *told, "--ckpt_path=last"), "--trainer.max_steps=4"])
    module = ControlNetSynth.load_from_checkpoint(newest_checkpoint(Path("run"), "last"), weights_only=True)
    embeddings = module.prompts.encode(sorted(PROMPTS), module.device)
    assert embeddings.unique(dim=0).shape[0] == len(PROMPTS)
    assert not torch.equal(first["state_dict"]["prompts.learned"], module.prompts.learned), "they are trained"


def saved(module, path):
    """A checkpoint of Lightning's."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return str(path)


def test_a_stage_takes_the_control_branch_of_another_alone(sd, tmp_path, recwarn):
    first = ControlNetSynth(sd, condition="edge", num_classes=1, in_channels=3, image_size=16, prompt=None)
    for parameter in first.controlnet.parameters():
        torch.nn.init.normal_(parameter)
    checkpoint = saved(first, tmp_path / "stage_1.ckpt")
    second = ControlNetSynth(sd, **STAGE_2, controlnet=checkpoint)
    for name, tensor in first.controlnet.state_dict().items():
        assert torch.equal(tensor, second.controlnet.state_dict()[name]), name
    assert torch.equal(first.unet.conv_in.weight, second.unet.conv_in.weight)
    assert not [warning for warning in recwarn if "stay behind" in str(warning.message)]


def test_a_control_branch_that_does_not_fit_is_named(sd, tmp_path):
    masks = ControlNetSynth(sd, condition="one_hot", num_classes=5, image_size=16)
    message = (
        r"the control branch of '.*other\.ckpt' does not fit[\s\S]*shape of controlnet_cond_embedding\.conv_in\.weight"
        r": found \(16, 5, 3, 3\), expected \(16, 3, 3, 3\)"
    )
    with pytest.raises(CheckpointMismatchError, match=message):
        ControlNetSynth(sd, **STAGE_2, controlnet=saved(masks, tmp_path / "other.ckpt"))
    torch.save({"state_dict": {"controlnet.conv_in.bias": torch.zeros(8)}}, "cut.ckpt")
    with pytest.raises(CheckpointMismatchError, match=r"missing: conv_in\.weight"):
        ControlNetSynth(sd, **STAGE_2, controlnet="cut.ckpt")
    torch.save({"state_dict": {"network.head.bias": torch.zeros(8)}}, "segmenter.ckpt")
    with pytest.raises(
        ValueError, match=r"no ControlNetModel in the original cldm layout; its tensors begin with network"
    ):
        ControlNetSynth(sd, **STAGE_2, controlnet="segmenter.ckpt")


def test_a_unet_that_was_trained_with_the_branch_is_said_to_stay_behind(sd, tmp_path):
    checkpoint = saved(ControlNetSynth(sd, **STAGE_2, trained="controlnet+decoder"), tmp_path / "decoder.ckpt")
    with pytest.warns(UserWarning, match=r"\d+ tensors of the UNet were trained with it and stay behind.*base=folder"):
        ControlNetSynth(sd, **STAGE_2, controlnet=checkpoint)


def test_the_authors_settings_stand_in_the_configuration():
    settings = yaml.safe_load((CONFIGS / CONFIG).read_text())
    model, data = (settings[key]["init_args"] for key in ("model", "data"))
    assert model["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5}}
    assert (model["condition"], model["trained"], model["prompt"]) == ("edge", "controlnet", None)
    assert (data["image_size"], data["batch_size"], data["colour"]) == (256, 48, True)


def written(monkeypatch, *words):
    """What ``examples/write_shards.py`` asks the data module for."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import write_shards

    found = []
    monkeypatch.setattr(RadImageNetDataModule, "write_shards", lambda *given: found.append(given))
    write_shards.main(words)
    return found[0]


def test_shards_are_written_from_the_command_line(monkeypatch):
    edges = "--data.edges=fairdiff_lightning.networks.hed.HED"
    data, folder, count = written(monkeypatch, "shards", "--data.root=tree", "--data.colour=true", edges)
    assert (folder, count, data.root, data.in_channels) == ("shards", 1000, "tree", 3)
    assert isinstance(data.detector, HED)
    data, _, count = written(monkeypatch, "shards", "--data.edges=scharr", "--samples_per_shard=7", "--data.seed=3")
    assert (count, data.seed, data.detector) == (7, 3, ScharrEdges())


def test_shards_from_the_command_line_are_trained_on(sd, monkeypatch, seen):
    pytest.importorskip("litdata", reason="shards need the extra 'shards'")
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import write_shards

    write_shards.main(["shards", "--samples_per_shard=8", "--data.edges=scharr", "--data.colour=true"])
    main(["fit", *arguments(sd, "run", "--data.shards=shards", "--trainer.max_epochs=1")])
    assert len({i for ids, _ in seen.batches for i in ids}) == 59
