import warnings

import pytest
import torch
from callback_fakes import trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from fairdiff_lightning.callbacks import TrainableEMA, warn_about_lost_ema

BATCHES = 5


class Adapter(LightningModule):
    """A frozen body that stays out of checkpoints, and a small trainable head on it."""

    strict_loading = False

    def __init__(self, frozen=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.body.requires_grad_(not frozen)
        self.seen = {}

    def forward(self, x):
        return self.head(self.norm(self.body(x)))

    def training_step(self, batch, batch_idx):
        return (self(batch) - 1).square().mean()

    def _look(self, stage):
        self.seen[stage] = self.head.weight.detach().clone()

    def validation_step(self, batch, batch_idx):
        self._look("validate")
        self.log("val/loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self._look("test")

    def predict_step(self, batch, batch_idx):
        self._look("predict")

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 0.1)

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("body.")}

    def on_load_checkpoint(self, checkpoint):
        warn_about_lost_ema(checkpoint, self._trainer)


class Whole(Adapter):
    """Saves all of its weights."""

    def on_save_checkpoint(self, checkpoint):
        pass


class Record(Callback):
    """The raw head after each batch, as a callback behind the average sees it."""

    def __init__(self):
        self.raw = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.raw.append(pl_module.head.weight.detach().clone())


def loader():
    return DataLoader(torch.randn(2 * BATCHES, 3, generator=torch.Generator().manual_seed(1)), batch_size=2)


def fit(folder, module, *callbacks, epochs=1, resume=None, **arguments):
    fitter = trainer(folder, *callbacks, max_epochs=epochs, **arguments)
    fitter.fit(module, loader(), loader(), ckpt_path=resume)
    return fitter


def average_of(weights, decays):
    """The recursion, step by step."""
    average = weights[0]
    for weight, decay in zip(weights[1:], decays, strict=True):
        average = decay * average + (1 - decay) * weight
    return average


def saved(fitter, path):
    fitter.save_checkpoint(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("warmup", [True, False])
def test_average_follows_its_recursion(tmp_path, warmup):
    record = Record()
    fitter = fit(tmp_path, Adapter(), TrainableEMA(0.7, warmup), record, epochs=2)
    decays = [min(0.7, 1 - (1 + n) ** (-2 / 3)) if warmup else 0.7 for n in range(1, 2 * BATCHES)]
    average = saved(fitter, tmp_path / "a.ckpt")["state_dict"]["head.weight"]
    torch.testing.assert_close(average, average_of(record.raw, decays))


def test_updates_come_every_n_optimizer_steps_not_batches(tmp_path):
    record = Record()
    average = TrainableEMA(0.5, warmup=False, update_every_n_steps=2)
    fitter = fit(tmp_path, Adapter(), average, record, epochs=2, accumulate_grad_batches=2)
    assert fitter.global_step == 6  # after batches 2, 4 and 5 of each epoch
    after = [record.raw[batch - 1] for batch in (4, BATCHES + 2, BATCHES + 5)]
    found = saved(fitter, tmp_path / "a.ckpt")["state_dict"]["head.weight"]
    torch.testing.assert_close(found, average_of(after, [0.5, 0.5]))


def test_frozen_weights_are_neither_optimized_nor_averaged_nor_saved(tmp_path):
    module, average = Adapter(), TrainableEMA()
    body = module.body.weight.detach().clone()
    fitter = fit(tmp_path, module, average)
    checkpoint = saved(fitter, tmp_path / "a.ckpt")
    trainable = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert checkpoint["current_model_state"].keys() == trainable
    assert trainable < checkpoint["state_dict"].keys()
    assert not any(name.startswith("body.") for name in checkpoint["state_dict"])
    assert len(average._ema.shadow_params) == len(checkpoint["optimizer_states"][0]["state"]) == len(trainable)
    assert torch.equal(module.body.weight, body)
    numbers = sum(
        value.numel() for part in ("state_dict", "current_model_state") for value in checkpoint[part].values()
    )
    assert numbers == 2 * (8 + 10) + 9  # averages and raw weights, and the statistics of the normalisation


def test_average_is_in_the_module_while_it_evaluates_and_leaves_it_afterwards(tmp_path):
    module = Adapter()
    fitter = fit(tmp_path, module, TrainableEMA(0.9))
    checkpoint = saved(fitter, tmp_path / "a.ckpt")
    raw, average = (checkpoint[part]["head.weight"] for part in ("current_model_state", "state_dict"))
    assert not torch.allclose(raw, average)
    fitter.validate(module, loader(), verbose=False)
    fitter.test(module, loader(), verbose=False)
    fitter.predict(module, loader())
    for stage in ("validate", "test", "predict"):
        assert torch.equal(module.seen[stage], average), stage
        assert torch.equal(module.head.weight, raw)


def test_validation_within_fit_sees_the_average_and_training_goes_on_from_the_raw_weights(tmp_path):
    record, averages, module = Record(), [], Adapter()

    class Keep(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            averages.append((len(record.raw), pl_module.seen["validate"]))

    fit(tmp_path, module, TrainableEMA(0.5, warmup=False), record, Keep(), val_check_interval=2, num_sanity_val_steps=0)
    assert [batches for batches, _ in averages] == [2, 4]
    for batches, seen in averages:
        torch.testing.assert_close(seen, average_of(record.raw[:batches], [0.5] * (batches - 1)))
    plain = Record()
    fit(tmp_path, Adapter(), plain, val_check_interval=2, num_sanity_val_steps=0)
    for ours, theirs in zip(record.raw, plain.raw, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_raw_weights_come_back_after_an_error(tmp_path, error):
    module, record = Adapter(), Record()

    def fails(batch, batch_idx):
        module._look("validate")
        raise error

    module.validation_step = fails
    with pytest.raises((RuntimeError, SystemExit)):
        fit(tmp_path, module, TrainableEMA(0.5, warmup=False), record, num_sanity_val_steps=0)
    assert not torch.equal(module.seen["validate"], record.raw[-1])
    assert torch.equal(module.head.weight, record.raw[-1])


@pytest.mark.parametrize("moment", ["on_validation_epoch_end", "on_train_epoch_end"])
def test_checkpoints_hold_both_kinds_of_weights_whichever_is_in_the_module(tmp_path, moment):
    record = Record()
    saver, path = Callback(), tmp_path / "a.ckpt"
    setattr(saver, moment, lambda trainer, pl_module: trainer.save_checkpoint(path))
    fit(tmp_path, Adapter(), TrainableEMA(0.5, warmup=False), record, saver, num_sanity_val_steps=0)
    checkpoint = torch.load(path, weights_only=True)
    assert torch.equal(checkpoint["current_model_state"]["head.weight"], record.raw[-1])
    average = average_of(record.raw, [0.5] * (BATCHES - 1))
    torch.testing.assert_close(checkpoint["state_dict"]["head.weight"], average)


def test_resumed_run_reaches_the_weights_and_averages_of_an_unbroken_one(tmp_path):
    """Stopped after five steps, in the middle of a pair of steps between updates."""

    def average():
        return TrainableEMA(0.9, update_every_n_steps=2)

    unbroken = saved(fit(tmp_path, Adapter(), average(), epochs=3), tmp_path / "unbroken.ckpt")
    saved(fit(tmp_path, Adapter(), average(), epochs=1), tmp_path / "first.ckpt")
    module = Adapter()
    resumed = fit(tmp_path, module, average(), epochs=3, resume=tmp_path / "first.ckpt")
    checkpoint = saved(resumed, tmp_path / "resumed.ckpt")
    assert resumed.global_step == 3 * BATCHES
    assert checkpoint["trainable_ema"] == unbroken["trainable_ema"] == {"updates": 7}
    for part in ("state_dict", "current_model_state"):
        assert checkpoint[part].keys() == unbroken[part].keys()
        for name, value in unbroken[part].items():
            assert torch.equal(checkpoint[part][name], value), f"{part}: {name}"
    assert torch.equal(module.head.weight, unbroken["current_model_state"]["head.weight"])


def test_average_needs_no_callback_to_be_loaded(tmp_path):
    average = saved(fit(tmp_path, Adapter(), TrainableEMA(0.9)), tmp_path / "a.ckpt")["state_dict"]["head.weight"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*averaged")
        loaded = Adapter.load_from_checkpoint(tmp_path / "a.ckpt")
        module = Adapter()
        trainer(tmp_path).test(module, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(loaded.head.weight, average)
    assert torch.equal(module.seen["test"], average)


def test_another_checkpoint_is_tested_with_its_own_weights(tmp_path):
    """Not with the average that the callback still holds from fit."""
    early = saved(fit(tmp_path, Adapter(), TrainableEMA(0.9)), tmp_path / "early.ckpt")
    module = Adapter()
    fitter = fit(tmp_path, module, TrainableEMA(0.9), epochs=2)
    fitter.test(module, loader(), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert torch.equal(module.seen["test"], early["state_dict"]["head.weight"])


@pytest.mark.parametrize(
    ("callback", "name"), [(TrainableEMA, "TrainableEMA"), (EMAWeightAveraging, "EMAWeightAveraging")]
)
def test_resuming_without_the_callback_warns(tmp_path, callback, name):
    saved(fit(tmp_path, Whole(), callback()), tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=f"trained with {name}.*Add {name} to the Trainer"):
        fit(tmp_path, Whole(), epochs=2, resume=tmp_path / "a.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was trained with")
        fit(tmp_path, Whole(), callback(), epochs=2, resume=tmp_path / "a.ckpt")


def test_resuming_with_other_trainable_weights_or_without_an_average_is_told(tmp_path):
    saved(fit(tmp_path, Adapter(), TrainableEMA()), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"only in the module: \['body.bias', 'body.weight'\].*Freeze what was frozen"):
        fit(tmp_path, Adapter(frozen=False), TrainableEMA(), epochs=2, resume=tmp_path / "a.ckpt")
    saved(fit(tmp_path, Adapter()), tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="holds no average"):
        fit(tmp_path, Adapter(), TrainableEMA(), epochs=2, resume=tmp_path / "plain.ckpt")


def test_average_of_bfloat16_weights_is_kept_in_float32(tmp_path):
    """In bfloat16 a step of 1 - decay = 0.001 would be lost to rounding."""
    module, record = Adapter().bfloat16(), Record()
    average = TrainableEMA(0.999, warmup=False)
    fit(tmp_path, module, average, record, precision="bf16-true")
    expected = average_of([weight.double() for weight in record.raw], [0.999] * (BATCHES - 1))
    (found,) = (shadow for shadow in average._ema.shadow_params if shadow.shape == expected.shape)
    torch.testing.assert_close(found, expected.float())
    assert module.seen["validate"].dtype == torch.bfloat16


def test_shared_weights_are_averaged_under_all_their_names(tmp_path):
    module = Adapter()
    module.twin = module.head
    fitter = fit(tmp_path, module, TrainableEMA(0.9))
    state = saved(fitter, tmp_path / "a.ckpt")["state_dict"]
    assert torch.equal(state["twin.weight"], state["head.weight"])
    assert not torch.equal(state["twin.weight"], module.head.weight)


def test_fit_that_goes_on_keeps_its_average(tmp_path):
    module, average = Adapter(), TrainableEMA(0.9)
    fitter = fit(tmp_path, module, average)
    fitter.fit_loop.max_epochs = 2
    fitter.fit(module, loader(), loader())
    assert average._ema.optimization_step == 2 * BATCHES


def test_what_cannot_work_is_refused_or_warned_about(tmp_path):
    with pytest.raises(ValueError, match=r"decay is 1\.5 .* expected a decay in \[0, 1\)"):
        TrainableEMA(1.5)
    with pytest.raises(ValueError, match="no parameter of Adapter requires a gradient"):
        TrainableEMA().on_fit_start(trainer(tmp_path), Adapter().requires_grad_(False))
    keep = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="they hold the raw weights"):
        fit(tmp_path, Adapter(), TrainableEMA(), keep, enable_checkpointing=True)
    with pytest.raises(ValueError, match="FSDPStrategy shards the parameters"):
        TrainableEMA().setup(type("Sharded", (), {"strategy": _fsdp()})(), Adapter(), "fit")


def _fsdp():
    from lightning.pytorch.strategies import FSDPStrategy

    return FSDPStrategy()
