from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from fairdiff_lightning.data import collate
from fairdiff_lightning.modules import LeFusionInpaint

TINY = {"image_size": (16, 8, 6), "width": 8, "multipliers": (1, 2), "num_steps": 6, "jump_length": 2, "textures": 2}


def module(**arguments):
    torch.manual_seed(0)
    return LeFusionInpaint(**{**TINY, **arguments})


def sample(k, num_classes=2):
    draws = torch.Generator().manual_seed(k)
    mask = torch.zeros(1, 16, 8, 6, dtype=torch.int64)
    mask[:, 4 : 6 + k % 4, 2:5, 1:4] = 1
    if num_classes > 2:
        mask[:, 4:6, 2:4, 1:4] = 2
    image = (0.3 * torch.rand(1, 16, 8, 6, generator=draws) + 0.5 * mask * (k % 2)).clamp(0, 1)
    return {"id": f"s{k}", "image": image, "mask": mask, "attributes": {}, "synthetic": torch.tensor(False)}


def batch(size=3, num_classes=2):
    return collate([sample(k, num_classes) for k in range(size)])


def requests(size=3, num_classes=2, **more):
    return {**batch(size, num_classes), "seed": torch.arange(size) + 5, **more}


def measured(**arguments):
    made = module(**arguments)
    made.bank.measure(made.histograms(batch(6, made.hparams["num_classes"])))
    return made.eval()


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_scan_outside_of_the_lesion_is_untouched(num_classes):
    made, asked = measured(num_classes=num_classes), requests(num_classes=num_classes)
    found = made.generate(asked)
    lesion = asked["mask"] > 0
    assert torch.equal(found["image"][~lesion], asked["image"][~lesion])
    assert not torch.equal(found["image"][lesion], asked["image"][lesion])
    assert (found["image"].min() >= 0) & (found["image"].max() <= 1)
    assert torch.equal(found["mask"], asked["mask"])


def test_only_the_asked_class_is_painted():
    made, asked = measured(num_classes=3, lesion_classes=(2,)), requests(num_classes=3)
    found, other = made.generate(asked)["image"], asked["mask"] != 2
    assert torch.equal(found[other], asked["image"][other])
    assert made.network.channels == 1


@pytest.mark.parametrize("roi", ["volume", "lesion"])
def test_a_lesion_depends_on_its_own_seed(roi):
    made, asked = measured(roi=roi), requests()
    whole = made.generate(asked)["image"]
    for k in range(3):
        alone = made.generate(
            {key: value[k : k + 1] for key, value in asked.items() if key != "attributes"} | {"attributes": {}}
        )
        torch.testing.assert_close(alone["image"][0], whole[k], atol=1e-5, rtol=0)
    assert not torch.equal(made.generate(asked | {"seed": torch.arange(3) + 50})["image"], whole)


@pytest.mark.parametrize("conditioning", ["film", "cross_attention"])
def test_texture_is_an_input(conditioning):
    made = measured(conditioning=conditioning, guidance_scale=2.0)
    dark, bright = torch.zeros(3, 16), torch.zeros(3, 16)
    dark[:, 1], bright[:, 14] = 1, 1
    found = [made.generate(requests(texture=texture))["image"] for texture in (dark, bright)]
    assert not torch.equal(*found)
    made.hparams["texture"] = "cluster:0"
    assert made.generate(requests())["image"].isfinite().all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (torch.full((16,), 5 / 16), r"'s1' has, for lesion class number 0, that sum \(0.3125 to 0.3125, sum 5\)"),
        (torch.zeros(16), r"'s1'.*\(0 to 0, sum 0\)"),
        (torch.eye(16)[0] * 3 - 2 / 15 * (1 - torch.eye(16)[0]), "'s1'.*not finite or below 0"),
        (torch.full((16,), float("nan")), "'s1'.*not finite or below 0"),
    ],
    ids=["sum of 5", "zeros", "below 0", "nan"],
)
def test_textures_that_are_no_histograms_are_refused(row, message):
    made, textures = measured(), torch.full((3, 16), 1 / 16)
    textures[1] = row
    with pytest.raises(ValueError, match=message):
        made.generate(requests(texture=textures))
    with pytest.raises(ValueError, match=r"textures of s0, s1, s2 have shape \(3, 8\), not \(3, 16\)"):
        made.generate(requests(texture=textures[:, :8]))


def test_a_class_that_is_not_painted_needs_no_histogram():
    made, textures = measured(num_classes=3), torch.zeros(3, 32)
    textures[:, 3] = 1
    found = made.generate(requests(texture=textures))  # masks of the first class alone
    assert found["image"].isfinite().all()
    with pytest.raises(ValueError, match="'s0' has, for lesion class number 1, that sum"):
        made.generate(requests(num_classes=3, texture=textures))


def test_without_conditioning_no_texture_is_needed():
    made = module(conditioning=None).eval()
    assert made.generate(requests())["image"].isfinite().all()
    assert made.losses(batch())["loss"].isfinite()


def test_the_loss_does_not_depend_on_what_is_outside(monkeypatch):
    made, given = module().eval(), batch() | {"seed": torch.arange(3)}
    expected = made.losses(given)["loss"]
    monkeypatch.setattr(
        made.network,
        "forward",
        lambda noisy, steps, condition, dropped, forward=made.network.forward: torch.where(
            given["mask"] > 0, forward(noisy, steps, condition, dropped), 99.0
        ),
    )
    assert torch.equal(made.losses(given)["loss"], expected)
    empty = given | {"mask": torch.zeros_like(given["mask"])}
    assert made.losses(empty)["loss"] == 0


def test_reference_behaviour_is_the_authors():
    made = module(reference_behaviour=True)
    s = made.settings
    assert (s["num_steps"], s["jump_length"], s["jump_n_sample"], s["normalise"]) == (300, 5, 5, "volume")
    assert type(made.make_sampler()).__name__ == "DDPMScheduler"
    assert float(made.noise.betas[-1]) == pytest.approx(0.9999)


def test_training_measures_textures_and_validation_paints_lesions_anew(tmp_path):
    made = module()
    loader = DataLoader([sample(k) for k in range(6)], batch_size=3, collate_fn=collate)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(made, loader, loader)
    logged = trainer.callback_metrics
    assert 0 <= float(logged["val/histogram_distance"]) <= 1
    assert 0 <= float(logged["val/reconstruction"]) <= 1
    assert len(made.bank.histograms) == 6
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = LeFusionInpaint.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    assert torch.equal(again.generate(requests())["image"], made.eval().generate(requests())["image"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 3}, "in_channels 3; expected is 1"),
        ({"image_size": (15, 8, 6)}, r"give multiples of \(2, 2, 1\)"),
        ({"sampler": "Magic"}, "scheduler 'Magic' is not known"),
        ({"sampler": "DPMSolverMultistepScheduler", "eta": 1.0}, "has none; take DDIMScheduler"),
        ({"jump_length": 6}, "no level can be jumped from"),
        ({"texture": "exempler:1"}, "texture 'exempler:1'; expected is"),
        ({"texture": "cluster:2"}, "there are 2, counted from 0"),
        ({"lesion_classes": (0,)}, "expected are different classes from 1 to 1"),
        ({"lesion_classes": (1, 1)}, "expected are different classes"),
        ({"texture": "group"}, "num_groups names none"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


def test_a_scan_whose_mask_is_empty_stays_as_it_is():
    made, asked = measured(), requests()
    whole = made.generate(asked)["image"]
    asked["mask"][1] = 0
    with pytest.warns(UserWarning, match="masks of s1 have no voxel of the lesion classes"):
        found = made.generate(asked)["image"]
    assert torch.equal(found[1], asked["image"][1])
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]], atol=1e-5, rtol=0)


def test_a_class_that_is_painted_has_a_histogram():
    made = module(num_classes=3).eval()
    rows = torch.zeros(8, 32)
    rows[:, 3] = 1
    rows[:2, 20] = 1
    made.bank.measure(rows)
    drawn = []
    made.paint = lambda condition, image, **rest: drawn.append(condition) or image
    made.generate(requests(8, 3))
    (histograms,) = drawn
    assert histograms.view(8, 2, 16).sum(-1).tolist() == [[1, 1]] * 8


def test_the_noise_is_the_papers_unless_another_is_given():
    plain, sample = module(), module(scheduler_args={"prediction_type": "sample"})
    assert plain.noise.config.num_train_timesteps == sample.noise.config.num_train_timesteps == 300
    assert torch.equal(plain.noise.betas, sample.noise.betas)
    assert sample.noise.config.prediction_type == "sample"
    assert module(scheduler_args={"num_train_timesteps": 50}, num_steps=6).noise.config.num_train_timesteps == 50
    authors = module(reference_behaviour=True, compose="after", scheduler_args={"prediction_type": "sample"})
    assert (authors.settings["compose"], authors.noise.config.prediction_type) == ("before", "epsilon")
    solver = module(sampler="DPMSolverMultistepScheduler", jump_length=1, jump_n_sample=1)
    assert (solver.settings["eta"], plain.settings["eta"]) == (0.0, 1.0)


def test_labels_of_textures_that_are_not_painted_are_refused():
    from fairdiff_lightning.data import GenerationPlan, LIDCDataModule

    plan = GenerationPlan(per_group=1, masks="own", backgrounds="healthy")
    data = LIDCDataModule(image_size=(16, 8, 6), generate=plan)
    made = module(num_groups={"texture": 3})
    made._trainer = SimpleNamespace(datamodule=data)
    with pytest.raises(ValueError, match=r"--model\.texture=group"):
        made.setup("predict")
    other = module(num_groups={"texture": 3}, texture="group")
    other._trainer = SimpleNamespace(datamodule=data)
    other.setup("predict")


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_precisions_that_round_scans_do_not_generate(precision):
    made = module()
    made._trainer = SimpleNamespace(datamodule=None, precision=precision)
    with pytest.raises(ValueError, match=f"precision '{precision}' rounds the scan.*'bf16-mixed'"):
        made.setup("predict")
    made.setup("fit")
    made._trainer = SimpleNamespace(datamodule=None, precision="bf16-mixed")
    made.setup("predict")


def test_a_trainer_that_rounds_scans_does_not_generate(tmp_path):
    trainer = Trainer(accelerator="cpu", precision="bf16-true", logger=False, default_root_dir=tmp_path)
    loader = DataLoader([sample(0) | {"seed": torch.tensor(1)}], batch_size=1, collate_fn=collate)
    with pytest.raises(ValueError, match="precision 'bf16-true' rounds the scan"):
        trainer.predict(module(conditioning=None), loader)
