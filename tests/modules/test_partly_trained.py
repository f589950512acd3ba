import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from fairdiff_lightning.modules.partly_trained import PartlyTrained
from fairdiff_lightning.networks import CheckpointMismatchError


def block():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


class Base(LightningModule):
    def on_load_checkpoint(self, checkpoint):
        checkpoint["seen"] = True


class Half(PartlyTrained, Base):
    def __init__(self, thaw=True):
        super().__init__()
        self.trained, self.frozen = block(), nn.ModuleDict({"body": block(), "head": block()})
        self.freeze_parts(self.frozen, but=[self.frozen["head"]] if thaw else [])


def test_only_what_is_trained_learns_and_is_saved_buffers_included():
    module = Half().train()
    wanted = {n for n in module.state_dict() if n.startswith(("trained.", "frozen.head."))}
    assert any("running_mean" in name for name in wanted)
    assert module.trained_names() == wanted
    learning = {name for name, p in module.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in module.named_parameters() if name in wanted}
    assert module.frozen["head"].training
    assert not module.frozen["body"].training
    assert not module.eval().frozen["head"].training
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == wanted


def test_a_checkpoint_meets_the_frozen_part_of_the_module_and_every_base_class():
    module, other = Half(), Half()
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert checkpoint["seen"]
    other.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(other.trained[0].weight, module.trained[0].weight)
    assert not torch.equal(other.frozen["body"][0].weight, module.frozen["body"][0].weight)
    small = {"state_dict": module.state_dict()}
    Half(thaw=False).on_save_checkpoint(small)
    with pytest.raises(CheckpointMismatchError, match=r"missing: frozen\.head\.0\.bias"):
        other.on_load_checkpoint(small)
