"""The strict loader: what it reads, what it refuses, and that it loads all or nothing."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fairdiff_lightning.networks.checkpoint import (
    CheckpointMismatchError,
    check_state_dict,
    load_strictly,
    read_state_dict,
)


def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([7.0, 8.0])}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_wrappers_of_training_code_come_off(tmp_path, prefix, wrapped):
    state = {f"{prefix}{name}": tensor for name, tensor in weights().items()}
    content = {"state_dict": state, "epoch": 3} if wrapped else state
    torch.save(content, tmp_path / "w.pth")
    for source in (content, tmp_path / "w.pth", str(tmp_path / "w.pth")):
        torch.testing.assert_close(read_state_dict(source), weights())


def test_safetensors_are_read(tmp_path):
    save_file(weights(), tmp_path / "w.safetensors")
    torch.testing.assert_close(read_state_dict(tmp_path / "w.safetensors"), weights())


def test_loading_fills_views_and_reports_names():
    layer = nn.Linear(3, 2)
    report = load_strictly(weights(), {"a.weight": layer.weight.detach(), "a.bias": layer.bias.detach()})
    torch.testing.assert_close(layer.weight.detach(), weights()["a.weight"])
    assert report.loaded == ("a.weight", "a.bias")
    assert str(report) == "2 tensors from the state dict"


def test_every_difference_is_named_and_nothing_is_loaded(tmp_path):
    torch.save(weights() | {"extra": torch.zeros(1)}, tmp_path / "w.pth")
    targets = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(3), "b": torch.zeros(1)}
    with pytest.raises(CheckpointMismatchError) as caught:
        load_strictly(tmp_path / "w.pth", targets)
    message = str(caught.value)
    for part in ("w.pth", "missing: b", "unexpected: extra", "shape of a.bias: found (2,), expected (3,)"):
        assert part in message
    assert not targets["a.weight"].any()
    with pytest.raises(CheckpointMismatchError, match="my file"):
        check_state_dict(weights(), targets, "my file")
    check_state_dict(weights(), weights(), "my file")


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at '.*absent.pth'"):
        read_state_dict(tmp_path / "absent.pth")
    torch.save(weights(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-200])
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "objects.pth").write_bytes(pickle.dumps({"a": object}))
    for name in ("cut", "text", "empty", "objects"):
        with pytest.raises(ValueError, match=f"{name}.pth' cannot be read as a PyTorch checkpoint"):
            read_state_dict(tmp_path / f"{name}.pth")


def test_other_content_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"epoch \(int\)"):
        read_state_dict({**weights(), "epoch": 3})
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        read_state_dict(tmp_path / "list.pth")
