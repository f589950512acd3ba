import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from fairdiff_lightning import DMoESegmenter, Segmenter
from fairdiff_lightning.data import collate
from fairdiff_lightning.losses import dice_ce_loss
from fairdiff_lightning.metrics.functional import dice_score, equity_scaled, group_means
from fairdiff_lightning.modules import PolynomialDecay
from fairdiff_lightning.networks import CheckpointMismatchError

SMALL = {"network": "tiny", "image_size": 32, "in_channels": 1, "num_classes": 3}


def sample(i, size=32):
    random = torch.Generator().manual_seed(i)
    image = torch.rand(1, size, size, generator=random)
    return {
        "image": image,
        "mask": (image * 2.999).long(),
        "attributes": {"race": torch.tensor(-1 if i == 6 else i % 3)},
        "id": f"s{i}",
    }


class Contract(LightningDataModule):
    """A data module of somebody else's: samples of the contract, nothing more."""

    def __init__(self, count=7, **facts):
        super().__init__()
        self.samples = [sample(i) for i in range(count)]
        for name, value in facts.items():
            setattr(self, name, value)

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=3, collate_fn=collate)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def trainer(tmp_path, **arguments):
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"enable_checkpointing": False, "max_epochs": 1} | arguments),
    )


def modules():
    yield Segmenter(**SMALL, num_groups={"race": 3})
    yield DMoESegmenter(**SMALL, num_groups={"race": 3}, unknown_group="mean", num_experts=3)
    yield DMoESegmenter(**SMALL, num_groups={"race": 3}, routing="shared", num_experts=3)
    yield Segmenter(**SMALL | {"network": "unet"})
    yield Segmenter(**SMALL, num_groups={"race": 3}, loss="febs")


@pytest.mark.parametrize("module", modules(), ids=["plain", "dmoe", "moe", "unet", "febs"])
def test_every_parameter_gets_a_gradient_with_a_group_absent(module):
    batch = collate([sample(i) for i in (0, 3)])
    module.losses(batch)["loss"].backward()
    without = [name for name, p in module.named_parameters() if p.grad is None]
    assert not without, "so that DDP runs without find_unused_parameters"


@pytest.mark.parametrize("module", modules(), ids=["plain", "dmoe", "moe", "unet", "febs"])
def test_evaluation_is_deterministic_and_permuting_a_batch_permutes_the_output(module):
    module.eval()
    batch = collate([sample(i) for i in range(4)])
    order = torch.tensor([2, 0, 3, 1])
    group = batch["attributes"]["race"]
    with torch.no_grad():
        logits = module(batch["image"], group)
        assert torch.equal(logits, module(batch["image"], group))
        torch.testing.assert_close(module(batch["image"][order], group[order]), logits[order], atol=1e-5, rtol=1e-5)


def test_logged_metrics_are_the_definitions(tmp_path):
    module, data = Segmenter(**SMALL, num_groups={"race": 3}), Contract()
    run = trainer(tmp_path)
    run.test(module, data, verbose=False)
    batch = collate(data.samples)
    with torch.no_grad():
        prediction = module.eval()(batch["image"]).argmax(1, keepdim=True)
    dice, group = dice_score(prediction, batch["mask"], 3), batch["attributes"]["race"]
    groups = group_means(dice, group, 3)
    expected = {
        "test/dice": dice.nanmean(0).mean(),
        "test/dice/class_2": dice[:, 1].nanmean(),
        "test/dice/race/1": groups[1].mean(),
        "test/es_dice/race": equity_scaled(dice.nanmean(0), groups).mean(),
        "test/worst_dice/race": groups.amin(0).mean(),
        "test/gap_dice/race": (groups.amax(0) - groups.amin(0)).mean(),
        "test/iou": (dice / (2 - dice)).nanmean(0).mean(),
    }
    logged = {name: float(run.callback_metrics[name]) for name in expected}
    assert logged == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)


def test_group_names_come_from_the_data(tmp_path):
    data = Contract(attribute_groups={"race": ["Asian", "Black", "White"]})
    run = trainer(tmp_path)
    run.validate(Segmenter(**SMALL, num_groups={"race": 3}), data, verbose=False)
    assert {"val/dice/race/Asian", "val/dice/race/White", "val/es_dice/race"} <= run.callback_metrics.keys()


@pytest.mark.parametrize("module", [Segmenter, DMoESegmenter])
def test_programmatic_checkpoints_reload_with_weights_only(tmp_path, module):
    arguments = {"num_groups": {"race": 3}} | ({"unknown_group": "prior"} if module is DMoESegmenter else {})
    built = module(**SMALL, **arguments, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(built, Contract())
    again = module.load_from_checkpoint(run.checkpoint_callback.best_model_path, weights_only=True)
    for name, value in built.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_checkpoint_of_another_architecture_names_its_tensors(tmp_path):
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(Segmenter(**SMALL), Contract())
    path = run.checkpoint_callback.best_model_path
    with pytest.raises(CheckpointMismatchError, match=r"found \(3, \d+, 3, 3\), expected \(2, \d+, 3, 3\)"):
        trainer(tmp_path).test(Segmenter(**SMALL | {"num_classes": 2}), Contract(), ckpt_path=path)
    with pytest.raises(CheckpointMismatchError, match="missing: network"):
        trainer(tmp_path).test(Segmenter(**SMALL | {"network": "unet"}), Contract(), ckpt_path=path)


def test_training_starts_from_another_modules_network(tmp_path):
    run = trainer(tmp_path, enable_checkpointing=True)
    plain = Segmenter(**SMALL)
    run.fit(plain, Contract())
    source = run.checkpoint_callback.best_model_path
    fair = Segmenter(**SMALL, num_groups={"race": 3}, loss="febs", init_from=source)
    trainer(tmp_path, max_epochs=0).fit(fair, Contract())
    for name, value in plain.network.state_dict().items():
        assert torch.equal(fair.network.state_dict()[name], value)
    with pytest.raises(CheckpointMismatchError):
        trainer(tmp_path).fit(Segmenter(**SMALL | {"network": "unet"}, init_from=source), Contract())


def test_a_checkpoint_reloads_when_what_it_started_from_is_gone(tmp_path):
    first, second = trainer(tmp_path, enable_checkpointing=True), trainer(tmp_path / "2", enable_checkpointing=True)
    first.fit(Segmenter(**SMALL), Contract())
    source = Path(first.checkpoint_callback.best_model_path)
    second.fit(Segmenter(**SMALL, init_from=str(source)), Contract())
    source.unlink()
    again = Segmenter.load_from_checkpoint(second.checkpoint_callback.best_model_path)
    assert again.hparams["init_from"] == str(source)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_classes": 2}, "num_classes: Contract has 2, the module was built for 3"),
        ({"in_channels": 3}, "in_channels: Contract has 3"),
        ({"num_groups": {"race": 5}}, "'race': Contract has 5 groups, the module was built for 3"),
        ({"num_groups": {"age": 5}}, "no such attribute"),
    ],
)
def test_data_that_the_module_was_not_built_for_are_refused(tmp_path, facts, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(Segmenter(**SMALL, num_groups={"race": 3}), Contract(**facts))


def test_wrong_arguments_say_what_there_is():
    with pytest.raises(ValueError, match=r"attribute='age'.*race \(3 groups\)"):
        Segmenter(**SMALL, num_groups={"race": 3}, attribute="age")
    with pytest.raises(ValueError, match="num_groups names none"):
        Segmenter(**SMALL, loss="febs")
    with pytest.raises(ValueError, match="routing='shared'"):
        DMoESegmenter(**SMALL)
    with pytest.raises(ValueError, match=r"vit_b16.*unet"):
        Segmenter(**SMALL | {"network": "resnet"})
    with pytest.raises(ValueError, match=r"no argument \['depths'\]; it takes .*num_res_units"):
        Segmenter(**SMALL | {"network": "unet"}, network_args={"depths": 3})


def test_unknown_groups_are_an_error_before_training(tmp_path):
    counts = {"train": {"race": {"Asian": 3, "unknown": 2}}, "val": {"race": {"Asian": 1, "unknown": 0}}}
    data = Contract(group_counts={"race": [1, 2, 4]})
    data.counts = lambda: counts
    with pytest.raises(ValueError, match=r"'race' is unknown.*'train': 2.*drop_unknown"):
        trainer(tmp_path).fit(DMoESegmenter(**SMALL, num_groups={"race": 3}), data)
    module = DMoESegmenter(**SMALL, num_groups={"race": 3}, unknown_group="prior")
    trainer(tmp_path).fit(module, data)
    prior = next(b for name, b in module.network.named_buffers() if name.endswith("group_prior"))
    torch.testing.assert_close(prior, torch.tensor([1, 2, 4]) / 7)


def test_predictions_are_at_the_files_size():
    module = Segmenter(**SMALL).eval()
    batch = collate([sample(i) for i in range(2)])
    batch["region"] = torch.tensor([[4, 0, 50, 60], [0, 0, 32, 32]])
    batch["native_size"] = torch.tensor([[58, 60], [40, 32]])
    with torch.no_grad():
        prediction = module.predict_step(batch, 0)
    assert prediction["id"] == ["s0", "s1"]
    assert [tuple(m.shape) for m in prediction["mask"]] == [(1, 58, 60), (1, 40, 32)]
    assert not prediction["mask"][0][:, :4].any(), "outside the crop is background"


def test_the_background_may_be_left_out_of_the_dice_term():
    batch = collate([sample(i) for i in range(3)])
    module = Segmenter(**SMALL, dice_background=False).eval()
    expected = dice_ce_loss(0.5, 0.5, dice_background=False)(module(batch["image"]), batch["mask"])
    assert float(module.losses(batch)["loss"]) == pytest.approx(float(expected))


def test_balance_loss_has_a_weight_and_a_name():
    batch = collate([sample(i) for i in range(3)])
    module = DMoESegmenter(**SMALL, num_groups={"race": 3}, balance_weight=0.5).eval()
    losses = module.losses(batch)
    assert float(losses["loss"]) == pytest.approx(float(losses["segmentation"] + 0.5 * losses["balance"]))
    assert float(losses["balance"]) > 0
    assert DMoESegmenter(**SMALL, num_groups={"race": 3}).losses(batch).keys() == {"loss"}


def test_experts_of_their_own_are_balanced_block_by_block():
    arguments = {"num_groups": {"race": 3}, "balance_weight": 1.0, "moe_sharing": "per_block", "num_experts": 4}
    module = DMoESegmenter(**SMALL, **arguments).eval()
    blocks = len(module.network.mixtures)
    assert blocks == 4
    with torch.no_grad():
        for k, mixture in enumerate(module.network.mixtures):  # together even, each block on its own two experts
            mixture.router.bias[:, 0] = torch.tensor([50.0 if e in (k, (k + 1) % 4) else -50.0 for e in range(4)])
            mixture.router.weight.zero_()
    losses = module.losses(collate([sample(i) for i in range(3)]))
    assert float(losses["balance"]) == pytest.approx(4 / 3, abs=1e-3), "variance of (1/2, 1/2, 0, 0) over mean squared"


def test_reference_behaviour_restores_noise_and_empty_scores():
    module = DMoESegmenter(**SMALL, num_groups={"race": 3}, reference_behaviour=True).eval()
    batch = collate([sample(i) for i in range(2)])
    group = batch["attributes"]["race"]
    with torch.no_grad():
        assert not torch.equal(module(batch["image"], group), module(batch["image"], group))
    empty = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    assert module._scores(empty, empty)["dice"].tolist() == [[0, 0]]
    assert module._scores(empty + 1, empty)["iou"].tolist() == [[1, 0]]


@pytest.mark.parametrize(("interval", "length"), [("step", 3 * 2), ("epoch", 2)])
def test_schedules_learn_the_length_of_the_run(tmp_path, interval, length):
    module = Segmenter(**SMALL, lr_scheduler=PolynomialDecay, lr_interval=interval)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, Contract())
    assert run.lr_scheduler_configs[0].scheduler.total_steps == length
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_run_without_end_has_no_schedule(tmp_path):
    with pytest.raises(ValueError, match="max_epochs=-1"):
        trainer(tmp_path, max_epochs=-1).fit(Segmenter(**SMALL, lr_scheduler=PolynomialDecay), Contract())


def test_surface_metrics_are_logged_when_asked_for(tmp_path):
    run = trainer(tmp_path)
    run.test(Segmenter(**SMALL, num_groups={"race": 3}, surface_metrics=True), Contract(), verbose=False)
    assert float(run.callback_metrics["test/hd95"]) > 0
    assert 0 <= float(run.callback_metrics["test/nsd/race/0"]) <= 1
    assert "test/es_hd95/race" not in run.callback_metrics, "a distance has no equity scaling"


def test_expert_usage_is_counted_in_validation(tmp_path):
    module = DMoESegmenter(**SMALL, num_groups={"race": 3}, unknown_group="mean", num_experts=4)
    seen = []
    module.on_validation_epoch_end = lambda: seen.append(module.expert_usage.compute())
    trainer(tmp_path).validate(module, Contract(), verbose=False)
    assert seen[0].shape == (4, 4)
    torch.testing.assert_close(seen[0].sum(1), torch.ones(4), atol=1e-5, rtol=0)


def test_compiled_networks_keep_their_names_and_numbers(tmp_path):
    plain, compiled = Segmenter(**SMALL), Segmenter(**SMALL, compile=True)
    compiled.load_state_dict(plain.state_dict())
    compiled.network.compile = lambda: torch.nn.Module.compile(compiled.network, backend="aot_eager")
    runs = [trainer(tmp_path), trainer(tmp_path)]
    for run, module in zip(runs, (plain, compiled), strict=True):
        run.test(module, Contract(), verbose=False)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert float(runs[0].callback_metrics["test/loss"]) == pytest.approx(
        float(runs[1].callback_metrics["test/loss"]), abs=1e-5
    )
    assert math.isfinite(float(runs[0].callback_metrics["test/loss"]))
