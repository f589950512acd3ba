import numpy as np
import pytest
import torch

from fairdiff_lightning.networks.checkpoint import CheckpointMismatchError
from fairdiff_lightning.networks.guided_unet import GuidedUNet, reference_name


def wave(shape, phase, amplitude=1.0):
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (amplitude * torch.sin(0.7 * index + phase)).view(shape)


def hashed(numel, key):
    """The reference's numbers: murmur3's finaliser of (i + 40503 k) mod 2^32, over 2^32, minus a half."""
    h = (np.arange(numel, dtype=np.uint64) + np.uint64(40503 * key)) % np.uint64(2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h ^= h >> np.uint64(shift)
        h = (h * np.uint64(factor)) % np.uint64(2**32)
    return torch.from_numpy(h.astype(np.float64) / 2**32 - 0.5)


def fill(unet):
    for key, name in enumerate(sorted(unet.state_dict())):
        tensor = unet.state_dict()[name]
        u = hashed(tensor.numel(), key).view(tensor.shape)
        if name.endswith("bias"):
            value = 0.2 * u
        elif "norm" in name:
            value = 1 + 0.4 * u
        else:
            value = u * (12 / tensor[0].numel()) ** 0.5
        tensor.copy_(value)


@pytest.fixture(scope="module")
def filled():
    network = GuidedUNet(image_size=64).double()
    fill(network.unet)
    return network


def test_the_papers_network_has_its_parameters(reference):
    expected = reference("pig")["unet"]
    with torch.device("meta"):
        network = GuidedUNet()
    assert sum(p.numel() for p in network.parameters()) == expected["n_params"] == 7_125_409
    assert len(network.state_dict()) == expected["n_tensors"]
    assert sorted(network.unet.state_dict())[:3] == expected["first_sorted_keys"]


def test_outputs_are_those_of_the_papers_network(reference, filled):
    expected = reference("pig")["unet"]
    drawn = [float(hashed(i + 1, k)[i]) for i, k in ((0, 0), (1, 0), (2, 0), (0, 1), (5, 7))]
    assert drawn == pytest.approx(expected["u_check_(i,k)"]["(0,0),(1,0),(2,0),(0,1),(5,7)"], abs=1e-9)
    shape = (2, 1, 64, 64)
    with torch.no_grad():
        found = filled(wave(shape, 0.4), wave(shape, 2.4, 0.8), torch.tensor([3, 900]))
    assert found[0].flatten()[:6].tolist() == pytest.approx(expected["out_item0_first6"], abs=1e-5)
    assert found[1].flatten()[:6].tolist() == pytest.approx(expected["out_item1_first6"], abs=1e-5)
    assert found.mean((1, 2, 3)).tolist() == pytest.approx(expected["out_mean_per_item"], abs=1e-5)
    assert found.std((1, 2, 3)).tolist() == pytest.approx(expected["out_std_per_item"], abs=1e-5)


def test_checkpoints_of_the_authors_load_by_renaming(filled, tmp_path):
    named = {f"module.{name}": tensor.clone() for name, tensor in filled.reference_tensors().items()}
    path = tmp_path / "best_epoch120.pth"
    torch.save([named, {"state": {}, "param_groups": []}, 120], path)
    fresh = GuidedUNet(image_size=64).double()
    report = fresh.load_reference_weights(path)
    assert len(report.loaded) == 450
    for name, tensor in filled.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    del named["module.mid.attn_1.q.weight"]
    with pytest.raises(CheckpointMismatchError, match=r"missing: mid\.attn_1\.q\.weight"):
        fresh.load_reference_weights(named)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("time_embedding.linear_2.bias", "temb.dense.1.bias"),
        ("down_blocks.3.resnets.1.conv_shortcut.weight", "down.3.block.1.nin_shortcut.weight"),
        ("down_blocks.0.downsamplers.0.conv.weight", "down.0.downsample.conv.weight"),
        ("up_blocks.0.attentions.2.to_out.0.weight", "up.5.attn.2.proj_out.weight"),
        ("up_blocks.4.resnets.0.time_emb_proj.bias", "up.1.block.0.temb_proj.bias"),
        ("up_blocks.1.upsamplers.0.conv.bias", "up.4.upsample.conv.bias"),
        ("mid_block.attentions.0.group_norm.weight", "mid.attn_1.norm.weight"),
        ("mid_block.resnets.1.norm2.bias", "mid.block_2.norm2.bias"),
        ("conv_norm_out.weight", "norm_out.weight"),
        ("conv_in.weight", "conv_in.weight"),
    ],
)
def test_names_are_the_cards(ours, theirs):
    assert reference_name(ours, levels=6) == theirs


def test_matrices_of_attention_are_convolutions_in_the_reference(filled):
    tensors = filled.reference_tensors()
    assert tensors["mid.attn_1.q.weight"].shape == (128, 128, 1, 1)
    assert tensors["mid.attn_1.norm.weight"].shape == (128,)
    assert tensors["temb.dense.0.weight"].shape == (128, 32)


def test_any_channels_widths_and_groups():
    torch.manual_seed(0)
    network = GuidedUNet(3, 2, 24, (8, 16, 16), {"density": 4, "view": 2}).eval()
    noisy, guide = torch.randn(3, 3, 24, 24), torch.randn(3, 2, 24, 24)
    steps = torch.tensor([1, 5, 9])
    groups = {"density": torch.tensor([0, 3, -1]), "view": torch.tensor([1, -1, -1])}
    with torch.no_grad():
        found = network(noisy, guide, steps, groups)
        unknown = network(noisy, guide, steps)
        partly = network(noisy, guide, steps, {"density": groups["density"]})
    assert found.shape == noisy.shape
    assert torch.equal(found[2], unknown[2])
    assert torch.equal(found[1], partly[1])
    assert not torch.allclose(found[:2], unknown[:2])


def test_an_image_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="image_size 48 cannot be halved 5 times"):
        GuidedUNet(image_size=48)
