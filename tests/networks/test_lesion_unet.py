import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fairdiff_lightning.networks.checkpoint import CheckpointMismatchError
from fairdiff_lightning.networks.lesion_attention import (
    DepthAttention,
    LinearSliceAttention,
    Positions,
    SliceAttention,
    relative_buckets,
    rotary_angles,
    rotate,
)
from fairdiff_lightning.networks.lesion_blocks import sinusoidal
from fairdiff_lightning.networks.lesion_unet import LesionUNet
from fairdiff_lightning.networks.lesion_weights import reference_name

SIZES = {
    "lefusion_lidc(dim64,ch1,cond16)": {},
    "lefusion_emidec(dim72,ch2,cond32)": {"width": 72, "channels": 2, "cond_dim": 32},
    "diffmask_lidc(dim64,ch2->1,no cond)": {"channels": 2, "out_channels": 1, "cond_dim": None},
}
TINY = {"width": 8, "multipliers": (1, 2), "heads": 2, "head_dim": 8}


def fill(network):
    """The reference's weights, in its own names and shapes."""
    for name, tensor in network.reference_tensors().items():
        if name.endswith(("gamma", "norm.weight")):
            tensor.fill_(1)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            fan_in = 1 if name.startswith(("null", "time_rel_pos_bias")) else tensor[0].numel()
            index = torch.arange(tensor.numel(), dtype=torch.float64)
            tensor.copy_((torch.sin(0.7 * index + 0.3) / math.sqrt(fan_in)).view(tensor.shape))


@pytest.fixture(scope="module")
def filled():
    network = LesionUNet(width=16).eval()
    fill(network)
    return network


@pytest.fixture(scope="module")
def volume():
    """The reference's input, which has depth first, in our order."""
    return torch.sin(0.05 * torch.arange(1024.0)).view(1, 1, 4, 16, 16).permute(0, 1, 3, 4, 2)


UNIFORM = torch.full((1, 16), 1 / 16)


@torch.no_grad()
def outputs(network, volume, step=7, condition=UNIFORM):
    """What the network gives, in the reference's order."""
    return network(volume, torch.tensor([step]), condition).permute(0, 1, 4, 2, 3)


def tiny(**changes):
    torch.manual_seed(0)
    return LesionUNet(**TINY | changes)


def tiny_inputs(batch=3, channels=1, size=(12, 10, 5)):
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(batch, channels, *size, generator=generator)
    return noisy, torch.arange(batch) * 40, torch.rand(batch, 16, generator=generator)


@pytest.mark.parametrize("name", SIZES)
def test_the_papers_networks_have_their_parameters(reference, name):
    with torch.device("meta"):
        network = LesionUNet(**SIZES[name])
    assert sum(p.numel() for p in network.parameters()) == reference("lefusion")["param_counts"][name]


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("lidc_32x64x64", {}, (1, 64, 64, 32)),
        ("emidec_10x72x72", {"width": 72, "channels": 2, "cond_dim": 32}, (2, 72, 72, 10)),
    ],
)
def test_the_cost_is_that_of_the_papers_network_less_what_joined_projections_save(reference, name, arguments, size):
    """In heads of 32 and 256 features in all, values and outputs meet N voxels of a slice in 2 * 2 * 32 * 256 * N
    operations; joined with the projections of C channels first, in as many of C instead of N."""
    saved = []

    def note(module, inputs):
        _, depth, channels, height, width = inputs[0].shape
        saved.append(2 * 2 * 32 * 256 * depth * (height * width - channels))

    with torch.device("meta"), torch.no_grad():
        network = LesionUNet(**arguments).eval()
        for module in network.modules():
            if isinstance(module, LinearSliceAttention):
                module.register_forward_pre_hook(note)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *size), torch.zeros(1).long(), torch.zeros(1, arguments.get("cond_dim", 16)))
    assert sum(saved) > 0
    found = (counter.get_total_flops() + sum(saved)) / 1e9
    assert found == pytest.approx(reference("lefusion")["forward_GFLOPs_2xMAC_batch1"][name], abs=0.01)


def test_outputs_are_those_of_the_papers_network(reference, filled, volume):
    expected = reference("lefusion")["unet_small_lidc"]
    assert sum(p.numel() for p in filled.parameters()) == expected["params"]
    found = outputs(filled, volume)
    assert list(found.shape) == expected["out_shape"]
    assert found.flatten()[:6].tolist() == pytest.approx(expected["first6"], abs=1e-5)
    assert found.flatten()[-3:].tolist() == pytest.approx(expected["last3"], abs=1e-4)
    assert found.mean().item() == pytest.approx(expected["mean"], abs=1e-5)
    assert found.std().item() == pytest.approx(expected["std"], abs=1e-5)


def test_double_precision_is_that_of_the_papers_network(reference, filled, volume):
    expected = reference("lefusion")["unet_small_lidc_sensitivity_max_abs_change"]
    network = LesionUNet(width=16).eval().double()
    fill(network)
    found = outputs(network, volume.double(), condition=UNIFORM.double())
    first = found.flatten()[:3].tolist()
    assert first == pytest.approx(expected["float64_first3"], abs=5e-6)  # sines and cosines are float32 in both
    rounding = (outputs(filled, volume) - found).abs().max().item()
    assert rounding == pytest.approx(expected["float64 vs float32 max abs"], abs=1e-4)


def test_every_part_matters_as_much_as_in_the_papers_network(reference, filled, volume, monkeypatch):
    expected = reference("lefusion")["unet_small_lidc_sensitivity_max_abs_change"]
    before = outputs(filled, volume)
    one_hot, more = torch.zeros(1, 16), UNIFORM.clone()
    one_hot[0, -1], more[0, 0] = 1, more[0, 0] + 0.1

    def change(**arguments):
        return (outputs(filled, volume, **arguments) - before).abs().max().item()

    assert change(step=8) == pytest.approx(expected["t=8"], abs=1e-4)
    assert change(condition=one_hot) == pytest.approx(expected["cond one-hot last"], abs=1e-4)
    assert change(condition=more) == pytest.approx(expected["cond bin0 +0.1"], abs=1e-4)
    assert change(condition=None) == pytest.approx(expected["null cond"], abs=1e-4)
    table = filled.relative_bias.weight.data
    kept = table.clone()
    table.zero_()
    assert change() == pytest.approx(expected["no rel-pos bias"], abs=1e-4)
    table.copy_(kept)
    with monkeypatch.context() as patch:
        patch.setattr(
            "fairdiff_lightning.networks.lesion_unet.rotary_angles",
            lambda length, dim, like: (torch.ones(length, dim // 2), torch.zeros(length, dim // 2)),
        )
        assert change() == pytest.approx(expected["no rotary"], abs=1e-4)
    assert change() == expected["restored"]


def test_steps_are_embedded_as_in_the_papers_network(reference):
    block = reference("lefusion")["sinusoidal_dim64"]
    found = sinusoidal(torch.tensor(block["t"]), 64)[:, block["idx"]]
    torch.testing.assert_close(found, torch.tensor(block["out"]), rtol=1e-5, atol=0)


def test_buckets_are_those_of_the_papers_network(reference):
    block, found = reference("lefusion")["rel_pos_bucket"], relative_buckets(32)
    assert found[0].tolist() == block["row0_n32"]
    assert found[:, 0].tolist() == block["col0_n32"]
    assert found.max() == block["num_buckets"] - 1
    assert relative_buckets(90)[0, 32:].unique().tolist() == [31]  # farther is as far as 32


def test_rotation_is_that_of_the_papers_network(reference):
    block = reference("lefusion")["rotary_32"]
    q = torch.linspace(-1, 1, 96).view(1, 1, 3, 32)
    cos, sin = rotary_angles(3, 32, q)
    found = rotate(q, cos, sin)
    assert cos[1, :4].acos().tolist() == pytest.approx(block["freqs_first4"], rel=1e-5)
    assert found[0, 0, 1, :6].tolist() == pytest.approx(block["pos1_first6"], rel=1e-5)
    assert found[0, 0, 2, :6].tolist() == pytest.approx(block["pos2_first6"], rel=1e-5)
    assert torch.equal(found[0, 0, 0], q[0, 0, 0])


def plain(attention, tokens, positions=None):
    """Softmax attention as the textbook writes it, head by head; tokens (N, L, C)."""
    q, k, v = attention.heads_of(tokens)
    out = torch.empty_like(v)
    for head in range(attention.heads):
        a, b = q[:, head], k[:, head]
        bias = 0
        if positions is not None:
            a, b = (rotate(t, positions.cos, positions.sin) for t in (a, b))
            bias = positions.bias[head]
        out[:, head] = ((a @ b.mT) / a.shape[-1] ** 0.5 + bias).softmax(-1) @ v[:, head]
    return attention.out_of(out)


def test_attention_is_along_depth_or_within_slices():
    x = torch.randn(2, 5, 6, 4, 3)  # B, D, C, H, W
    along, within, linear = (kind(6, 2, 8).eval() for kind in (DepthAttention, SliceAttention, LinearSliceAttention))
    positions = Positions(torch.randn(2, 5, 5), *rotary_angles(5, 8, x))
    with torch.no_grad():
        found = along(x, positions) - x
        for b, h, w in ((0, 0, 0), (1, 3, 1), (1, 2, 2)):
            torch.testing.assert_close(found[b, :, :, h, w], plain(along, x[b, :, :, h, w][None], positions)[0])
        found = within(x) - x
        for b, d in ((0, 0), (1, 4)):
            tokens = x[b, d].flatten(1).T[None]
            torch.testing.assert_close(found[b, d].flatten(1).T[None], plain(within, tokens))
        found = linear(x) - x
        for b, d in ((0, 1), (1, 3)):
            tokens = x[b, d].flatten(1).T[None]
            q, k, v = linear.heads_of(tokens)
            weight = torch.einsum("nhqd,nhkd->nhqk", q.softmax(3), k.softmax(2)) / 8**0.5
            expected = linear.out_of(torch.einsum("nhqk,nhkd->nhqd", weight, v))
            torch.testing.assert_close(found[b, d].flatten(1).T[None], expected)


def test_columns_are_split_where_a_device_takes_no_more(monkeypatch):
    x, attention = torch.randn(2, 5, 6, 4, 3), DepthAttention(6, 2, 8)
    positions = Positions(torch.randn(2, 5, 5), *rotary_angles(5, 8, x))
    whole = attention(x, positions)
    monkeypatch.setattr("fairdiff_lightning.networks.lesion_attention._MOST_SEQUENCES", 7)
    torch.testing.assert_close(attention(x, positions), whole)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_checkpoints_of_the_authors_load_by_renaming(filled, tmp_path, weights):
    named = {f"denoise_fn.module.{name}": tensor.clone() for name, tensor in filled.reference_tensors().items()}
    columns = [name for name in named if name.endswith("fn.fn.fn.to_qkv.weight") and "spatial" not in name]
    named |= {name.replace("to_qkv.weight", "rotary_emb.freqs"): torch.ones(16) for name in columns}
    assert (len(columns), len(named)) == (10, 301)
    named |= {"betas": torch.ones(300), "posterior_mean_coef2": torch.ones(300), "sqrt_alphas_cumprod": torch.ones(300)}
    other = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
    raw, ema = (named, other) if weights == "raw" else (other, named)
    path = tmp_path / "lidc.pt"
    torch.save({"step": 50_000, "model": raw, "ema": ema, "scaler": {}}, path)
    fresh = LesionUNet(width=16)
    report = fresh.load_reference_weights(path, weights)
    assert (len(report.loaded), len(report.ignored)) == (291, 13)
    assert "lidc.pt" in report.source
    for name, tensor in filled.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_checkpoints_of_another_network_are_refused(filled):
    named = {f"module.{name}": tensor for name, tensor in filled.reference_tensors().items()}
    with pytest.raises(CheckpointMismatchError, match=r"shape of init_conv\.weight: found \(16, 1, 1, 7, 7\)"):
        LesionUNet(width=16, channels=2).load_reference_weights(named)
    del named["module.mid_spatial_attn.fn.norm.gamma"]
    with pytest.raises(CheckpointMismatchError, match=r"missing: mid_spatial_attn\.fn\.norm\.gamma"):
        LesionUNet(width=16).load_reference_weights(named)
    with pytest.raises(ValueError, match="has no 'ema', which weights='ema' asks for; it holds step, model"):
        LesionUNet(width=16).load_reference_weights({"step": 1, "model": named}, "ema")
    with pytest.raises(ValueError, match="weights 'best'; expected is raw or ema"):
        LesionUNet(width=16).load_reference_weights(named, "best")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("conv_in.weight", "init_conv.weight"),
        ("depth_in.norm.weight", "init_temporal_attn.fn.norm.gamma"),
        ("depth_in.to_qkv.weight", "init_temporal_attn.fn.fn.fn.to_qkv.weight"),
        ("relative_bias.weight", "time_rel_pos_bias.relative_attention_bias.weight"),
        ("time.2.bias", "time_mlp.3.bias"),
        ("null_condition", "null_cond_emb"),
        ("downs.1.block1.film.weight", "downs.1.0.mlp.1.weight"),
        ("downs.1.block2.conv1.bias", "downs.1.1.block1.proj.bias"),
        ("downs.2.block1.norm2.weight", "downs.2.0.block2.norm.weight"),
        ("downs.2.block1.shortcut.weight", "downs.2.0.res_conv.weight"),
        ("downs.0.within.to_out.bias", "downs.0.2.fn.fn.to_out.bias"),
        ("downs.0.within.norm.weight", "downs.0.2.fn.norm.gamma"),
        ("ups.3.along.to_out.weight", "ups.3.3.fn.fn.fn.to_out.weight"),
        ("halvings.2.weight", "downs.2.4.weight"),
        ("doublings.0.bias", "ups.0.4.bias"),
        ("middle.block2.film.bias", "mid_block2.mlp.1.bias"),
        ("middle.within.to_qkv.weight", "mid_spatial_attn.fn.fn.fn.to_qkv.weight"),
        ("middle.along.norm.weight", "mid_temporal_attn.fn.norm.gamma"),
        ("block_out.conv2.weight", "final_conv.0.block2.proj.weight"),
        ("conv_out.bias", "final_conv.1.bias"),
    ],
)
def test_names_are_those_of_the_authors_code(ours, theirs):
    assert reference_name(ours) == theirs


@pytest.mark.parametrize("conditioning", ["film", "cross_attention"])
def test_samples_do_not_see_each_other(conditioning):
    network = tiny(conditioning=conditioning).eval()
    noisy, steps, condition = tiny_inputs()
    with torch.no_grad():
        together = network(noisy, steps, condition)
        assert together.shape == noisy.shape
        for sample in range(3):
            one = slice(sample, sample + 1)
            torch.testing.assert_close(network(noisy[one], steps[sample], condition[one]), together[one])


@pytest.mark.parametrize("conditioning", ["film", "cross_attention"])
def test_dropped_conditions_are_the_null_condition(conditioning):
    network = tiny(conditioning=conditioning).eval()
    noisy, steps, condition = tiny_inputs()
    dropped = torch.tensor([True, False, True])
    with torch.no_grad():
        found, kept = network(noisy, steps, condition, dropped), network(noisy, steps, condition)
        null = network(noisy, steps)
    torch.testing.assert_close(found, torch.where(dropped.view(3, 1, 1, 1, 1), null, kept))
    assert (null - kept).abs().amax((1, 2, 3, 4)).min() > 1e-3


@pytest.mark.parametrize("conditioning", ["film", "cross_attention"])
def test_every_parameter_has_a_gradient(conditioning):
    network = tiny(conditioning=conditioning)
    noisy, steps, condition = tiny_inputs()
    network(noisy, steps, condition).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert [n for n, p in network.named_parameters() if not p.grad.any()] == ["null_condition"]


def test_checkpointing_changes_no_gradient():
    noisy, steps, condition = tiny_inputs()
    gradients = []
    for checkpointing in (False, True):
        network = tiny(checkpointing=checkpointing)
        network(noisy, steps, condition).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients)


def test_depth_is_mixed_by_attention_and_norms_alone():
    """Without attention along depth, and with norms over whole volumes, slices that change places take theirs along."""
    network = tiny().eval()
    noisy, steps, condition = tiny_inputs()
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        assert not torch.allclose(
            network(noisy[..., order], steps, condition), network(noisy, steps, condition)[..., order]
        )
        for module in network.modules():
            if isinstance(module, DepthAttention):
                module.to_out.weight.zero_()
        found, expected = network(noisy[..., order], steps, condition), network(noisy, steps, condition)[..., order]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close():
    network, inputs = tiny().eval(), tiny_inputs()
    with torch.no_grad():
        exact = network(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = network(*inputs)
        pure = network.bfloat16()(inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16())
    assert pure.dtype == torch.bfloat16
    for found in (mixed.float(), pure.float()):
        assert (found - exact).square().mean().sqrt() < 0.05 * exact.std()


@pytest.mark.parametrize("conditioning", ["film", "cross_attention"])
def test_it_is_captured_as_one_graph(conditioning):
    network, inputs = tiny(conditioning=conditioning).eval(), tiny_inputs()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), network(*inputs))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            tiny_inputs(size=(12, 9, 5)),
            "slices of 12 x 9 cannot be halved 1 times; pad height and width to multiples of 2",
        ),
        (tiny_inputs(channels=2), r"noisy has shape \(3, 2, 12, 10, 5\); expected is \(B, 1, H, W, D\), depth last"),
        ((torch.ones(1, 1, 8, 8), torch.zeros(1)), "expected is"),
        ((*tiny_inputs()[:2], torch.ones(3, 32)), r"condition has shape \(3, 32\); expected is \(3, 16\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny()(*inputs)


def test_networks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="width 12; expected is a multiple of 8"):
        LesionUNet(width=12)
    with pytest.raises(ValueError, match="conditioning 'concat'; expected is film or cross_attention"):
        LesionUNet(conditioning="concat")
