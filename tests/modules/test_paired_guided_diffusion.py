import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from fairdiff_lightning.data import FairSegDataModule, GenerationPlan
from fairdiff_lightning.modules import PairedGuidedDiffusion
from fairdiff_lightning.networks.checkpoint import CheckpointMismatchError

sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))
from test_guided_unet import fill, wave

TINY = {"image_size": 16, "widths": (8, 16), "num_steps": 3}


def batch(size=3, side=16, num_classes=2, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(size, 1, side, side, generator=draws),
        "mask": torch.randint(num_classes, (size, 1, side, side), generator=draws),
        "attributes": {"race": torch.tensor([0, 1, -1])[:size]},
        "id": [str(k) for k in range(size)],
    }


def requests(size=3, **more):
    given = batch(size)
    return {"id": given["id"], "seed": torch.arange(size) + 7, "attributes": given["attributes"], **more}


def module(**arguments):
    torch.manual_seed(0)
    return PairedGuidedDiffusion(**{**TINY, **arguments})


def groups_told(made):
    """The groups (B,) that either network is told, in order."""
    told = []
    for network in (made.guider, made.target):
        network.register_forward_pre_hook(lambda _, arguments: told.append(arguments[3]["race"].clone()))
    return told


@pytest.fixture
def paper():
    """The reference's deterministic network, noise and pair; steps 100 and 923."""

    def build(stage):
        made = PairedGuidedDiffusion(
            stage, image_size=64, scheduler_args={}, optimizer=partial(torch.optim.Adam, lr=2e-4), channels_last=False
        )
        for network in (made.guider, made.target):
            if network is not None:
                with torch.no_grad():
                    fill(network.unet)
        return made

    return build


def paper_pair():
    mask = torch.zeros(2, 1, 64, 64, dtype=torch.int64)
    mask[0, :, 20:30, 24:44] = 1
    mask[1, :, 40:46, 10:26] = 1
    image = (wave((2, 1, 64, 64), 0.9, 0.9).float() + 1) / 2
    return {"image": image, "mask": mask, "attributes": {}, "id": ["a", "b"]}


@pytest.mark.parametrize("stage", ["guider", "target"])
def test_training_steps_are_the_papers(reference, paper, monkeypatch, stage):
    expected = reference("pig")["train_steps"]
    noises = {2.9: 1.2, 3.9: 1.2}
    made, drawn = paper(stage), iter([])

    def noise(like, random=None):
        nonlocal drawn
        phase = next(drawn, None)
        if phase is None:
            drawn = iter(noises)
            phase = next(drawn)
        return wave(like.shape, phase, noises[phase]).float()

    monkeypatch.setattr("fairdiff_lightning.modules.paired_guided_diffusion.gaussian", noise)
    monkeypatch.setattr(made, "_steps", lambda like, random: torch.tensor([100, 923]))
    name = "x" if stage == "guider" else "y"
    optimizer, losses, norm = made.optimizer(p for p in made.parameters() if p.requires_grad), [], None
    for _ in range(4):
        optimizer.zero_grad()
        loss = made.losses(paper_pair())["loss"]
        loss.backward()
        gradients = [p.grad for p in made.parameters() if p.grad is not None]
        norm = norm or float(torch.stack([g.norm() for g in gradients]).norm())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == pytest.approx(expected[f"stage_{name}_losses"], rel=1e-3)
    assert norm == pytest.approx(expected[f"stage_{name}_first_grad_norm"], rel=1e-3)


def test_the_loss_weighs_the_lesion_as_the_paper_does(reference):
    """With linear networks in both places the numbers are the reference's."""
    expected = reference("pig")["q_sample_and_loss"]
    made = module()
    shape = (2, 1, 8, 8)
    clean, noise, guide = wave(shape, 0.1).float(), wave(shape, 2.0, 1.3).float(), wave(shape, 4.0).float()
    steps = torch.tensor([10, 700])
    from fairdiff_lightning.diffusion import add_noise

    noisy = add_noise(made.noise, clean, noise, steps)
    assert noisy[0].flatten()[:6].tolist() == pytest.approx(expected["xt_item0_first6"], rel=1e-5, abs=1e-6)
    assert noisy[1].flatten()[:6].tolist() == pytest.approx(expected["xt_item1_first6"], rel=1e-5, abs=1e-6)
    predicted = 0.5 * noisy + 0.25 * guide + 0.1 * steps.view(-1, 1, 1, 1) / 1024
    plain, weighted = made._errors(predicted, noise, steps), made._errors(predicted, noise, steps, guide.sigmoid())
    assert plain.tolist() == pytest.approx(expected["per_sample_unweighted"], rel=1e-5)
    assert weighted.tolist() == pytest.approx(expected["per_sample_weighted"], rel=1e-5)


def test_the_schedule_is_the_papers(reference):
    expected = reference("pig")["betas"]["schedules"]["linear"]
    kept = module().noise.alphas_cumprod
    found = kept[[0, 1, 255, 511, 767, 1023]].tolist()
    assert found == pytest.approx(expected["T1024_alpha_bar_idx_[0,1,255,511,767,1023]"], rel=1e-5)
    sampler = module(sampler="DDIMScheduler", sampler_args={"steps_offset": 0, "clip_sample": False}).make_sampler()
    for steps in (1024, 256, 64, 4):
        sampler.set_timesteps(steps)
        walked, listed = sampler.timesteps.flip(0).tolist(), reference("pig")["timestep_lists"]["uniform"]
        wanted = listed[f"T=1024,S={steps}"]
        assert len(walked) == wanted["len"]
        assert walked[:3] == wanted["first3"]
        assert walked[-2:] == wanted["last2"]


def test_joint_training_keeps_the_guide_out_of_the_targets_gradient():
    made, given = module(lesion_weight=False), batch()
    terms, _ = made.terms(given)
    terms["target"].mean().backward()
    assert all(p.grad is None for p in made.guider.parameters())
    assert any(p.grad.abs().sum() > 0 for p in made.target.parameters())


def test_the_second_stage_trains_the_target_alone():
    made = module(stage="target")
    made.losses(batch())["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in made.guider.parameters())
    assert set(made.losses(batch())) == {"loss"}


@pytest.mark.parametrize("variant", ["mutual", "two_channel"])
def test_pairs_depend_on_their_own_seeds(variant):
    made = module(variant=variant, num_classes=3).eval()
    whole = made.generate(requests())
    assert whole["image"].shape == (3, 1, 16, 16)
    assert whole["mask"].shape == (3, 1, 16, 16)
    assert whole["mask"].dtype == torch.int64
    assert (whole["image"].min() >= 0) & (whole["image"].max() <= 1)
    for k in range(3):
        alone = made.generate({**requests(), "id": [str(k)], "seed": torch.tensor([k + 7])})
        torch.testing.assert_close(alone["image"][0], whole["image"][k], atol=1 / 255, rtol=0)
        assert torch.equal(alone["mask"][0], whole["mask"][k])
    other = made.generate(requests() | {"seed": torch.arange(3) + 70})
    assert not torch.equal(other["image"], whole["image"])


def test_an_image_follows_a_given_mask():
    made, mask = module().eval(), batch()["mask"]
    found = made.generate(requests(mask=mask))
    assert torch.equal(found["mask"], mask)
    assert not torch.equal(found["image"], made.generate(requests(mask=1 - mask))["image"])


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"guide": "raw"}, 1.0),
        ({"guide": "soft"}, math.tanh(2)),
        ({"guide": "soft", "reference_behaviour": True}, math.tanh(2)),
        ({"guide": "binary", "decode": "relative"}, 1.0),  # whole: the relative cut would take a pixel off its border
    ],
)
def test_the_target_sees_a_given_mask_as_it_saw_clean_masks_in_training(monkeypatch, arguments, seen):
    made, mask, guides = module(**arguments).eval(), torch.zeros(3, 1, 16, 16, dtype=torch.int64), []
    mask[:, :, 3:10, 4:12] = 1
    monkeypatch.setattr(made.target, "forward", lambda y, guide, *_: guides.append(guide) or y)
    found = made.generate(requests(mask=mask))
    assert len(guides) == 3
    for guide in guides:
        torch.testing.assert_close(guide, (mask * 2 - 1) * seen)
    assert torch.equal(found["mask"], mask)


def test_what_a_variant_cannot_answer_is_refused():
    with pytest.raises(ValueError, match="cannot follow a given mask"):
        module(variant="two_channel").generate(requests(mask=batch()["mask"]))
    with pytest.raises(ValueError, match="these requests have none"):
        module(stage="guider").generate(requests())


def test_masks_may_be_empty_and_images_are_not_stretched():
    made = module(decode="absolute")
    low = torch.full((2, 1, 16, 16), -0.3)
    bright = torch.stack([torch.full((1, 16, 16), 0.2), torch.full((1, 16, 16), 0.9)])
    decoded = made._decoded(low, bright)
    assert decoded["mask"].sum() == 0
    assert decoded["image"].flatten(1).mean(1).tolist() == pytest.approx([0.6, 0.95])


def test_groups_are_asked_for_and_guided_towards():
    arguments = {"num_groups": {"race": 3}, "attributes": ("race",)}
    made = module(**arguments).eval()
    assert made.attribute == "race"
    plain = made.sample(2, {"race": 1})[0]
    assert not torch.equal(plain, made.sample(2, {"race": 2})[0])
    assert torch.equal(plain, made.sample(3, {"race": 1})[0][:2])
    guided = module(**arguments, guidance_scale=3.0)
    guided.load_state_dict(made.state_dict())
    assert not torch.allclose(guided.sample(2, {"race": 1})[0], plain)
    torch.testing.assert_close(guided.sample(2)[0], made.sample(2)[0], atol=1e-5, rtol=1e-4)  # towards nothing


def test_hidden_groups_are_those_of_the_training_loss_alone():
    made = module(num_groups={"race": 3}, attributes=("race",), group_dropout=1.0)
    told = groups_told(made)
    made.train().losses(batch())
    assert [groups.tolist() for groups in told] == [[-1, -1, -1]] * 2
    told.clear()
    made.eval().losses(batch())
    made.train().generate(requests())
    assert [groups.tolist() for groups in told] == [[0, 1, -1]] * (2 + 2 * TINY["num_steps"])


def test_reference_behaviour_restores_guide_and_decoding():
    made = module(reference_behaviour=True)
    values = torch.linspace(-3, 3, 256).view(1, 1, 16, 16)
    assert torch.equal(made.guide_transform(values), values)
    assert set(made.sampling_transform(values).unique().tolist()) == {-1.0, 1.0}
    assert made.decode_mask(torch.full((1, 1, 16, 16), -0.95) + 0.01 * torch.rand(1, 1, 16, 16)).sum() > 0


def fit(tmp_path, made, **arguments):
    data = FairSegDataModule(attributes=["race"], image_size=16, batch_size=8, fractions=(0.7, 0.15, 0.15))
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **arguments,
    )
    trainer.fit(made, data)
    return trainer, data


def test_the_two_stages_follow_each_other(tmp_path):
    sizes = {"num_classes": 3, "num_groups": {"race": 3}, "attributes": ("race",)}
    first = module(stage="guider", **sizes)
    trainer, _ = fit(tmp_path, first)
    assert {"val/loss", "val/guider_by_noise/0", "val/plausibility/area"} <= set(trainer.callback_metrics)
    path = tmp_path / "guider.ckpt"
    trainer.save_checkpoint(path)
    second = module(stage="target", guider_checkpoint=str(path), **sizes)
    trainer, data = fit(tmp_path, second)
    for name, tensor in first.guider.state_dict().items():
        assert torch.equal(second.guider.state_dict()[name], tensor), name
    trainer.save_checkpoint(tmp_path / "target.ckpt")
    path.unlink()  # a checkpoint of the second stage holds both networks
    again = PairedGuidedDiffusion.load_from_checkpoint(tmp_path / "target.ckpt", weights_only=True)
    assert torch.equal(again.sample(2)[0], second.sample(2)[0])
    data.generate = GenerationPlan(per_group=1)
    made = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu").predict(again, data)[0]
    assert made["mask"].shape == (3, 1, 16, 16)
    assert made["attributes"]["race"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "guider", "variant": "two_channel"}, "one network has one stage, 'joint'"),
        ({"stage": "joint", "guider_checkpoint": "x.ckpt"}, "only stage='target' starts from one"),
        ({"attributes": ("race",)}, "num_groups names none"),
        ({"image_size": 15}, "cannot be halved"),
        ({"sampler": "DDPMScheduler", "sampler_args": {"order": 2}}, "takes no argument"),
        ({"guide": "hard"}, "guide 'hard'"),
        ({"decode": "foo"}, "decode='foo'; expected is one of absolute, relative"),
        ({"num_classes": 4, "ordinal_mask": True, "decode": "relative"}, "num_classes=4.*those of 2 or 3 classes"),
        (
            {"num_classes": 4, "ordinal_mask": True, "guide": "binary", "reference_behaviour": True},
            "reference_behaviour=True: relative levels are those of 2 or 3 classes",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


def test_a_guider_that_does_not_fit_is_refused(tmp_path):
    made = module(stage="target")
    with pytest.raises(ValueError, match="give guider_checkpoint"):
        made.load_guider(None)
    torch.save({"state_dict": module(stage="guider", widths=(8, 8)).state_dict()}, tmp_path / "narrow.ckpt")
    with pytest.raises(CheckpointMismatchError, match=r"shape of .*found \(8,.*expected \(16,"):
        made.load_guider(str(tmp_path / "narrow.ckpt"))
    torch.save({"state_dict": {"unet.conv_in.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="holds no guider"):
        made.load_guider(str(tmp_path / "other.ckpt"))
    with pytest.raises(ValueError, match="stage='guider' with variant='mutual' has no target"):
        module(stage="guider").load_reference_weights({}, "target")


def test_weights_of_the_authors_load_into_either_network(tmp_path):
    made, other = module(), module()
    torch.nn.init.normal_(other.target.unet.conv_out.weight)
    named = {f"module.{k}": w.clone() for k, w in other.target.reference_tensors().items()}
    report = made.load_reference_weights(named, "target")
    assert len(report.loaded) == len(named)
    assert torch.equal(made.target.unet.conv_out.weight, other.target.unet.conv_out.weight)


def test_ddim_of_the_paper_is_one_of_the_samplers():
    made = module(sampler="DDIMScheduler", sampler_args={"clip_sample": False}, eta=1.0)
    assert isinstance(made.make_sampler(), DDIMScheduler)
    assert made.eval().generate(requests())["image"].isfinite().all()


def test_the_best_checkpoint_holds_the_weights_of_the_best_epoch(tmp_path, reference, monkeypatch):
    """The reference keeps a reference to the weights, which go on changing until the file is written."""
    bug = reference("pig")["best_checkpoint_bug"]
    made, values = module(), iter([1.0, 2.0, 3.0, 4.0])
    kept = ModelCheckpoint(tmp_path, "best", monitor="val/loss")

    def validated(batch, batch_idx):
        made.log("val/loss", next(values))

    monkeypatch.setattr(made, "validation_step", validated)
    data = FairSegDataModule(attributes=["race"], image_size=16, batch_size=4, fractions=(0.7, 0.15, 0.15))
    monkeypatch.setattr(PairedGuidedDiffusion, "encode_mask", lambda self, mask: (mask > 0).float() * 2 - 1)
    monkeypatch.setattr("fairdiff_lightning.modules.paired_guided_diffusion.check_data", lambda *a, **k: None)
    Trainer(
        max_epochs=4,
        limit_train_batches=3,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[kept],
    ).fit(made, data)
    saved = torch.load(kept.best_model_path, weights_only=True)
    assert saved["epoch"] == bug["saved_epoch_label"]
    steps = {int(state["step"]) for state in saved["optimizer_states"][0]["state"].values()}
    assert steps == {bug["adam_step_expected"]}
    assert not torch.equal(saved["state_dict"]["target.unet.conv_in.weight"], made.target.unet.conv_in.weight)


def test_a_given_mask_comes_back_as_it_was_given():
    made, mask = module(decode="relative").eval(), torch.zeros(3, 1, 16, 16, dtype=torch.int64)
    mask[:, :, 4:12, 4:12] = 1
    assert torch.equal(made.generate(requests(mask=mask))["mask"], mask)


def test_pairs_claim_no_group_that_the_networks_do_not_know():
    known = module(num_groups={"race": 3}, attributes=("race",)).eval()
    assert module().eval().predict_step(requests())["attributes"]["race"].tolist() == [-1, -1, -1]
    assert known.predict_step(requests())["attributes"]["race"].tolist() == [0, 1, -1]
    for groups in ({"race": 3}, {"rice": 0}):
        with pytest.raises(ValueError, match=r"the networks know \{'race': 3\}"):
            known.sample(1, groups)


def test_a_guider_of_another_noise_is_refused(tmp_path):
    noise = {"prediction_type": "sample"}
    guider = module(stage="guider", scheduler_args=noise)
    torch.save({"state_dict": guider.state_dict(), "hyper_parameters": dict(guider.hparams)}, tmp_path / "guider.ckpt")
    module(stage="target", scheduler_args=noise).load_guider(str(tmp_path / "guider.ckpt"))
    with pytest.raises(ValueError, match=r"its scheduler_args is \{.*sample.*\}, here it is None"):
        module(stage="target").load_guider(str(tmp_path / "guider.ckpt"))


def test_a_guider_of_another_image_size_is_refused(tmp_path):
    """Its weights have the same shapes at any size."""
    path, guider = tmp_path / "guider.ckpt", module(stage="guider", image_size=16)
    torch.save({"state_dict": guider.state_dict(), "hyper_parameters": dict(guider.hparams)}, path)
    module(stage="target", image_size=(16, 16)).load_guider(str(path))
    with pytest.raises(ValueError, match=r"guider\.ckpt': its image_size is 16, here it is \(32, 16\)\. Train"):
        module(stage="target", image_size=(32, 16)).load_guider(str(path))


def test_samplers_do_not_clip_unless_asked_to():
    for sampler in ("DDIMScheduler", "DDPMScheduler"):
        assert not module(sampler=sampler).make_sampler().config.clip_sample
    assert module(sampler="DDIMScheduler", sampler_args={"clip_sample": True}).make_sampler().config.clip_sample
    assert module(sampler_args={"solver_order": 3}).make_sampler().config.use_lu_lambdas


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": 0.5}, "eta=0.5: DPMSolverMultistepScheduler has none"),
        ({"eta": 0.5, "variant": "two_channel"}, "eta=0.5: DPMSolverMultistepScheduler has none"),
        ({"guidance_scale": 2.0}, "guidance needs groups to go towards"),
    ],
)
def test_settings_without_effect_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)
