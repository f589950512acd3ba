"""ResUNet3D against the authors' parameter counts and names, its equations on their tensors, and plain properties."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fairdiff_lightning.metrics import ExpertUsage
from fairdiff_lightning.networks import CheckpointMismatchError
from fairdiff_lightning.networks.resunet3d import ResUNet3D

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "dmoe.json").read_text())
COUNTS = REFERENCE["I2_param_counts_3d"]["counts"]
KEYS = {name: tuple(shape) for name, shape in REFERENCE["I4_state_dict_keys_3d_f48_in1"]["keys"]}
NARROW = {name: tuple(n // 6 if n % 48 == 0 else n for n in shape) for name, shape in KEYS.items()}  # feature_size 8
ENCODERS = ("encoder1", "encoder2", "encoder3", "encoder4", "encoder10")
SIDES = (64, 32, 32)


def tiny(**arguments) -> ResUNet3D:
    return ResUNet3D(**{"feature_size": 8, **arguments})


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def published_state() -> dict[str, Tensor]:
    """A narrow network in the authors' names, with routers that part the groups and without noise."""
    state = {name: torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5 for name, shape in NARROW.items()}
    for name, tensor in state.items():
        if "noise_linear" in name:
            tensor.fill_(-100 if name.endswith("bias") else 0)
    return state


# ---- the authors' numbers


@pytest.mark.parametrize("key", COUNTS)
def test_parameter_count_equals_the_reference(key):
    feature_size, in_channels, num_classes = map(int, re.fullmatch(r"fs(\d+)\|in(\d+)\|out(\d+)", key).groups())
    with torch.device("meta"):
        network = ResUNet3D(in_channels, num_classes, feature_size, num_groups=5)
        plain = ResUNet3D(in_channels, num_classes, feature_size)
    assert count(network) == COUNTS[key]["total"]
    assert count(plain) == COUNTS[key]["backbone"]
    assert [count(mixture) for mixture in network.mixtures] == COUNTS[key]["per_stage_moe"]


def test_names_and_shapes_are_those_of_the_authors_network():
    with torch.device("meta"):
        network = ResUNet3D(num_groups=5)
    assert {name: tuple(tensor.shape) for name, tensor in network.reference_tensors().items()} == KEYS


@pytest.mark.parametrize("feature_size", [24, 48])
def test_a_volume_of_the_paper_costs_what_the_reference_counts(feature_size):
    """Two FLOPs for a multiply-add at 384 x 384 x 128; of two experts and both linears of a router in a mixture."""
    cost = {
        name.split(maxsplit=2)[2]: value
        for name, value in REFERENCE["L1_flops"].items()
        if f"fs{feature_size} " in name
    }
    tokens: list[int] = []
    with torch.device("meta"):
        network = ResUNet3D(feature_size=feature_size, num_groups=5)
        for encoder in network.encoders:
            encoder.register_forward_hook(lambda _, __, features: tokens.append(features[0, 0].numel()))
        with torch.no_grad(), FlopCounterMode(display=False) as backbone:
            network(torch.empty(1, 1, 384, 384, 128))
    assert tokens == cost["tokens"]
    assert backbone.get_total_flops() / 1e9 == pytest.approx(cost["384x384x128 backbone GFLOPs"], abs=0.05)
    for mixture, count, expected in zip(network.mixtures, tokens, cost["moe GFLOPs per stage"], strict=True):
        expert, router = mixture.experts[0], mixture.router
        products = router.top_k * (expert.weight1.numel() + expert.weight2.numel()) + router.weight[0].numel()
        assert 2 * count * products / 1e9 == pytest.approx(expected, abs=0.006)
    first = network.mixtures[0]
    hidden = 4 * tokens[0] * first.router.top_k * len(first.experts[0].weight1)  # bytes of float32
    assert hidden / 2**30 == pytest.approx(cost["stage0 expert hidden activation GiB fp32 per volume"], abs=0.0051)


# ---- the equations, on tensors in the authors' names


def residual_block(state: dict[str, Tensor], prefix: str, x: Tensor, stride: int) -> Tensor:
    """conv3, IN, LeakyReLU, conv3, IN, plus conv1 and IN of the input, LeakyReLU."""
    w1, w2, w3 = (state[f"{prefix}.conv{i}.conv.weight"] for i in (1, 2, 3))
    h = F.leaky_relu(F.instance_norm(F.conv3d(x, w1, stride=stride, padding=1)), 0.01)
    h = F.instance_norm(F.conv3d(h, w2, padding=1))
    return F.leaky_relu(h + F.instance_norm(F.conv3d(x, w3, stride=stride)), 0.01)


def add_mixture(state: dict[str, Tensor], prefix: str, x: Tensor, group: list[int]) -> Tensor:
    """Every expert on every voxel, weighted by the softmax of the two largest logits of the group's router."""
    rows = []
    for h, g in zip(x.flatten(2).mT, group, strict=True):
        linear = f"{prefix}.router.{g}.topkroute_linear"
        logits = h @ state[f"{linear}.weight"].T + state[f"{linear}.bias"]
        second = logits.sort(-1, descending=True).values[:, 1:2]
        gates = logits.where(logits >= second, -torch.inf).softmax(-1)
        for i in range(8):
            w1, b1, w2, b2 = (
                state[f"{prefix}.experts.{i}.net.{n}"] for n in ("0.weight", "0.bias", "2.weight", "2.bias")
            )
            out = (h @ w1.T + b1).relu() @ w2.T + b2
            rows.append(gates[:, i : i + 1] * out)
    mixture = torch.stack(rows).view(len(x), 8, -1, x.shape[1]).sum(1)
    return x + mixture.mT.reshape(x.shape)


def reference_forward(state: dict[str, Tensor], image: Tensor, group: list[int]) -> Tensor:
    features, skips = image, []
    for i, name in enumerate(ENCODERS):
        features = residual_block(state, f"{name}.layer", features, 2)
        features = add_mixture(state, f"sparseMoE.{i}", features, group)
        skips.append(features)
    for i, skip in zip((4, 3, 2, 1), skips[-2::-1], strict=True):
        up = F.conv_transpose3d(features, state[f"decoder{i}.transp_conv.conv.weight"], stride=2)
        features = residual_block(state, f"decoder{i}.conv_block", torch.cat([up, skip], 1), 1)
    return F.conv_transpose3d(features, state["out.transp_conv.conv.weight"], stride=2)


@pytest.mark.parametrize("chunk_tokens", [None, 1000])
def test_loaded_network_computes_the_equations_of_the_paper(chunk_tokens):
    network, state = tiny(num_groups=5, chunk_tokens=chunk_tokens).eval(), published_state()
    report = network.load_reference_weights({"state_dict": {f"module.{name}": t for name, t in state.items()}})
    assert sorted(report.loaded) == sorted(KEYS)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.reference_tensors().items())
    image = torch.rand(2, 1, *SIDES)
    with torch.no_grad():
        torch.testing.assert_close(
            network(image, torch.tensor([3, 0])), reference_forward(state, image, [3, 0]), rtol=1e-3, atol=1e-4
        )


def test_checkpoint_that_does_not_fit_is_refused_by_name():
    state = published_state()
    del state["decoder3.conv_block.conv3.conv.weight"]
    state["encoder1.layer.conv1.conv.weight"] = torch.zeros(8, 2, 3, 3, 3)
    network = tiny(num_groups=4)
    before = network.head.weight.clone()
    with pytest.raises(CheckpointMismatchError) as caught:
        network.load_reference_weights(state)
    assert caught.value.missing == ["decoder3.conv_block.conv3.conv.weight"]
    assert caught.value.misshapen == {"encoder1.layer.conv1.conv.weight": ((8, 2, 3, 3, 3), (8, 1, 3, 3, 3))}
    fifth_routers = [name for name in KEYS if ".router.4." in name]
    assert caught.value.unexpected == sorted(fifth_routers)
    assert torch.equal(network.head.weight, before)
    with pytest.raises(CheckpointMismatchError, match="unexpected: sparseMoE"):
        tiny().load_reference_weights(published_state())


# ---- the network


def test_network_in_chunks_gives_the_logits_and_gradients_of_the_whole():
    network, image, group = tiny(num_groups=2).eval(), torch.rand(2, 1, *SIDES), torch.tensor([1, 0])
    results = []
    for chunk_tokens, recompute in ((None, False), (1000, True)):
        network.chunk_tokens, network.gradient_checkpointing = chunk_tokens, recompute
        network.zero_grad()
        logits = network(image, group)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in network.parameters())])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)


def test_logits_and_gates_have_their_shapes_and_every_parameter_a_gradient():
    network = tiny(in_channels=2, num_classes=3, num_groups=3, gradient_checkpointing=True)
    logits, gates = network(torch.rand(2, 2, *SIDES), torch.tensor([2, 0]), return_gates=True)
    assert logits.shape == (2, 3, *SIDES)
    assert gates.shape == (5, 2, 1, 8)
    torch.testing.assert_close(gates.sum(-1), torch.ones(5, 2, 1))
    usage = ExpertUsage(num_experts=8, num_groups=3)
    usage.update(gates, torch.tensor([2, 0]))
    torch.testing.assert_close(usage.compute()[[2, 0]], gates.detach().mean((0, 2)))
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_without_group_the_network_is_the_plain_one():
    routed, plain = tiny(num_groups=2).eval(), tiny().eval()
    plain.load_state_dict({name: t for name, t in routed.state_dict().items() if not name.startswith("mixtures")})
    image, group = torch.rand(2, 1, *SIDES), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(routed(image), plain(image))
        assert torch.equal(plain(image, group), plain(image))
        assert not torch.allclose(routed(image, group), plain(image))
    for call in (lambda: routed(image, return_gates=True), lambda: plain(image, group, return_gates=True)):
        with pytest.raises(ValueError, match="no gates to return"):
            call()


def test_evaluation_is_deterministic_follows_the_batch_order_and_looks_at_the_group():
    network = tiny(num_groups=3, chunk_tokens=3000).eval()
    image, group, order = torch.rand(3, 1, *SIDES), torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    with torch.no_grad():
        logits = network(image, group)
        assert torch.equal(network(image, group), logits)
        torch.testing.assert_close(network(image[order], group[order]), logits[order], rtol=1e-4, atol=1e-5)
        other = network(image, torch.tensor([2, 1, 1]))
    torch.testing.assert_close(other[[0, 2]], logits[[0, 2]], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[1], logits[1])


def test_evaluation_has_noise_where_the_reference_behaviour_is_asked_for():
    network = tiny(num_groups=2, noise_in_eval=True).eval()
    image, group = torch.rand(1, 1, *SIDES), torch.tensor([1])
    with torch.no_grad():
        assert not torch.equal(network(image, group), network(image, group))


def test_unknown_group_is_refused_or_routed_by_the_average_router():
    image, unknown = torch.rand(1, 1, *SIDES), torch.tensor([-1])
    with pytest.raises(ValueError, match=r"holds \[-1\].*routers for 0 to 1"):
        tiny(num_groups=2)(image, unknown)
    network = tiny(num_groups=2, unknown_group="prior").eval()
    network.set_group_prior(torch.tensor([0, 3]))
    assert all(mixture.router.group_prior.tolist() == [0, 1] for mixture in network.mixtures)
    with torch.no_grad():
        torch.testing.assert_close(network(image, unknown), network(image, torch.tensor([1])))


def test_bfloat16_autocast_trains():
    network = tiny(num_groups=2, chunk_tokens=4000)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.rand(1, 1, *SIDES), torch.tensor([1]))
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((64, 48, 32), "64 x 48 x 32 voxels, but each side must be a multiple of 32.*sliding window.*roi_size"),
        ((32, 32, 32), "32 x 32 x 32 voxels.*one of them more than 32"),
        ((64, 0, 32), "64 x 0 x 32 voxels"),
        ((64, 32), r"shape \(B, C, H, W, D\), but has \(1, 1, 64, 32\)"),
    ],
)
def test_bad_sides_are_refused(sides, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.rand(1, 1, *sides))


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="2 channels, but the network's in_channels is 1"):
        tiny()(torch.rand(1, 2, *SIDES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_size": 0}, "feature_size must be positive, but are 1, 2 and 0"),
        ({"num_classes": 0}, "num_classes"),
        ({"in_channels": -1}, "in_channels"),
        ({"moe_sharing": "shared"}, "differ in channels.*set moe_sharing='per_block'"),
        ({"chunk_tokens": 0}, "chunk_tokens must be positive, or None"),
        ({"num_groups": 0}, "num_groups"),
        ({"num_groups": 2, "top_k": 9}, "top_k"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        ResUNet3D(**arguments)
