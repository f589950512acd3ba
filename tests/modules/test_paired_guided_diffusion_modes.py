"""PIG outside of a plain run: drawn from in training, resumed, in another memory format, asked for the impossible."""

import pytest
import torch
from lightning.pytorch import Callback
from test_paired_guided_diffusion import batch, fit, groups_told, module, requests

from fairdiff_lightning.modules import PairedGuidedDiffusion

RACE = {"num_groups": {"race": 3}, "attributes": ("race",)}


def saved(tmp_path, made, name="guider.ckpt"):
    """A checkpoint of weights and hyperparameters."""
    path = tmp_path / name
    torch.save({"state_dict": made.state_dict(), "hyper_parameters": dict(made.hparams)}, path)
    return str(path)


class Modes(Callback):
    """Notes in which mode training steps begin."""

    def __init__(self):
        self.training = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training.append(all(part.training for part in (pl_module, pl_module.guider, pl_module.target)))


def test_training_goes_on_as_before_after_pairs_were_drawn(tmp_path):
    made, modes = module(**RACE, group_dropout=1.0, num_validation_samples=0, num_classes=3), Modes()
    made.sample(1)
    told = groups_told(made)
    fit(tmp_path, made, callbacks=[modes], num_sanity_val_steps=0, check_val_every_n_epoch=2)
    assert modes.training == [True, True]
    assert torch.cat(told).unique().tolist() == [-1]
    assert all(metric.compute().isnan().all() for metric in made.levels.values())
    made.eval().sample(1)
    assert not made.training


@pytest.mark.parametrize("attributes", [("race",), ("race", "sex")])
def test_pairs_are_the_same_in_every_mode_and_batch(attributes):
    made = module(num_groups={"race": 3, "sex": 2}, attributes=attributes, group_dropout=0.5).train()
    wanted = requests()
    wanted["attributes"]["sex"] = torch.tensor([1, 0, -1])
    first, again = made.generate(wanted), made.generate(wanted)
    asleep = made.eval().generate(wanted)
    for other in (again, asleep):
        assert torch.equal(first["image"], other["image"])
        assert torch.equal(first["mask"], other["mask"])
    made.train()
    whole, alone = (made.sample(count, {"race": 2}, seed=3) for count in (4, 1))
    torch.testing.assert_close(whole[0][:1], alone[0], atol=1 / 255, rtol=0)
    assert torch.equal(whole[1][:1], alone[1])


def test_a_checkpoint_of_the_second_stage_is_trained_on_without_the_guiders_file(tmp_path):
    guider = module(stage="guider", num_classes=3)
    for weight in guider.guider.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    path = saved(tmp_path, guider)
    target = module(stage="target", guider_checkpoint=path, num_classes=3, num_validation_samples=0)
    trainer, _ = fit(tmp_path, target, fast_dev_run=1)
    trainer.save_checkpoint(tmp_path / "target.ckpt")
    (tmp_path / "guider.ckpt").unlink()
    for given in ({}, {"guider_checkpoint": None}):
        again = PairedGuidedDiffusion.load_from_checkpoint(tmp_path / "target.ckpt", weights_only=True, **given)
        fit(tmp_path, again, fast_dev_run=1)
        for name, tensor in guider.guider.state_dict().items():
            assert torch.equal(again.guider.state_dict()[name], tensor), name
        assert not torch.equal(again.target.unet.conv_out.weight, target.target.unet.conv_out.weight)


def test_another_guider_than_the_checkpoints_is_read(tmp_path):
    guider, other = (module(stage="guider", num_classes=3) for _ in range(2))
    torch.nn.init.ones_(other.guider.unet.conv_out.bias)
    first = module(stage="target", guider_checkpoint=saved(tmp_path, guider), num_classes=3)
    first.load_guider(first.hparams["guider_checkpoint"])
    trainer, _ = fit(tmp_path, first, fast_dev_run=1)
    trainer.save_checkpoint(tmp_path / "target.ckpt")
    again = PairedGuidedDiffusion.load_from_checkpoint(
        tmp_path / "target.ckpt", weights_only=True, guider_checkpoint=saved(tmp_path, other, "other.ckpt")
    )
    fit(tmp_path, again, fast_dev_run=1)
    assert again.guider.unet.conv_out.bias.tolist() == [1.0, 1.0]


def test_a_guider_whose_noise_was_given_in_other_words_is_taken(tmp_path):
    words = {"beta_schedule": "linear", "beta_end": 0.02, "clip_sample": True}
    for guiders, targets in (({}, None), (words, None), (None, words), (words, {"num_train_timesteps": 1024})):
        guider = module(stage="guider", scheduler_args=guiders)
        torch.nn.init.ones_(guider.guider.unet.conv_out.bias)
        target = module(stage="target", scheduler_args=targets)
        target.load_guider(saved(tmp_path, guider))
        assert target.guider.unet.conv_out.bias.tolist() == [1.0]
    path = saved(tmp_path, module(stage="guider", scheduler_args=words | {"beta_end": 0.03}))
    with pytest.raises(ValueError, match=r"its scheduler_args is \{.*0\.03.*\}, here it is \{.*0\.02.*\}"):
        module(stage="target", scheduler_args=words).load_guider(path)
    path = saved(tmp_path, module(stage="guider", scheduler="DDIMScheduler"))
    with pytest.raises(ValueError, match="its scheduler is DDIMScheduler, here it is DDPMScheduler"):
        module(stage="target").load_guider(path)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(3, 1, 8, 16, dtype=torch.int64), r"'0'.*\(3, 1, 8, 16\); expected are \(3, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16, dtype=torch.int64), r"\(3, 16, 16\); expected are"),
        (torch.zeros(1, 1, 16, 16, dtype=torch.int64), r"\(1, 1, 16, 16\); expected are"),
        (torch.tensor([0, 7, 1]).view(3, 1, 1, 1).expand(3, 1, 16, 16), r"'1': its mask holds \[7\].*classes 0 to 1"),
        (torch.tensor([0, 1, -1]).view(3, 1, 1, 1).expand(3, 1, 16, 16), r"'2': its mask holds \[-1\]"),
    ],
)
def test_a_mask_that_the_networks_cannot_follow_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        module().generate(requests(mask=mask))


@pytest.mark.parametrize("num", [0, -2])
def test_no_pairs_cannot_be_asked_for(num):
    with pytest.raises(ValueError, match=f"num={num}; expected is at least 1"):
        module().sample(num)


def test_the_memory_format_changes_neither_keys_nor_pairs(tmp_path):
    formats = {last: module(**RACE, channels_last=last, gradient_checkpointing=True) for last in (False, True)}
    plain, last = formats[False], formats[True]
    assert list(plain.state_dict()) == list(last.state_dict())
    last.load_state_dict(plain.state_dict())
    for made in formats.values():
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        for _ in range(2):
            torch.manual_seed(3)
            optimizer.zero_grad()
            made.train().losses(batch())["loss"].backward()
            optimizer.step()
    for name, weight in last.named_parameters():
        torch.testing.assert_close(weight, plain.get_parameter(name), atol=1e-4, rtol=1e-3, msg=name)
    assert last.target.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(last.target.unet.conv_out.weight, module(**RACE).target.unet.conv_out.weight)
    again = PairedGuidedDiffusion(**last.hparams)
    again.load_state_dict(torch.load(saved(tmp_path, last), weights_only=True)["state_dict"])
    plain.load_state_dict(again.state_dict())
    pairs, expected = again.generate(requests()), plain.generate(requests())
    torch.testing.assert_close(pairs["image"], expected["image"], atol=1e-4, rtol=0)
    assert (pairs["mask"] != expected["mask"]).float().mean() < 0.01
    assert torch.equal(pairs["image"], last.generate(requests())["image"])
