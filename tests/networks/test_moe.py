"""Routing and mixing against the authors' numbers, a loop over every token and expert, and closed forms."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fairdiff_lightning.networks import CheckpointMismatchError, DistributionAwareMoE, GroupRouter, dispatch, moe

WAYS = ("split", "grouped", "blocks")
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture
def b1(reference):
    return reference("dmoe")["B1_sparse_moe"]


def sine_filled(names: list[str], shapes: dict[str, tuple[int, ...]], scale: float) -> dict[str, Tensor]:
    """The fill rule of the reference: value[k] = scale * sin(0.7 k + 1.3 p), p the position of the sorted name."""
    state = {}
    for p, name in enumerate(sorted(names)):
        k = torch.arange(torch.Size(shapes[name]).numel(), dtype=torch.float64)
        state[name] = (scale * torch.sin(0.7 * k + 1.3 * p)).float().view(shapes[name])
        if "noise_linear" in name:
            state[name].fill_(-100.0 if name.endswith("bias") else 0.0)
    return state


def reference_mixture(b1) -> DistributionAwareMoE:
    mixture = DistributionAwareMoE(4, num_groups=3).eval()
    shapes = {name: tuple(t.shape) for name, t in mixture.reference_tensors().items()}
    mixture.load_reference_weights(sine_filled(b1["sorted_keys"], shapes, 0.5))
    return mixture


def brute_force(mixture: DistributionAwareMoE, tokens: Tensor, gates: Tensor, indices: Tensor) -> Tensor:
    """The equation, token by token and expert by expert."""
    rows = []
    for token, gate, chosen in zip(tokens.flatten(0, 1), gates.flatten(0, 1), indices.flatten(0, 1), strict=True):
        rows.append(sum(gate[i] * mixture.experts[i](token) for i in chosen.tolist()))
    return torch.stack(rows).view_as(tokens)


def gradients(out: Tensor, mixture: nn.Module, tokens: Tensor) -> list[Tensor]:
    weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out) / out.numel()
    inputs = [tokens, *mixture.parameters()]
    return list(torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True, materialize_grads=True))


def routed(channels: int = 8, batch: int = 3, count: int = 5, top_k: int = 2) -> tuple:
    mixture = DistributionAwareMoE(channels, num_experts=5, top_k=top_k, num_groups=2, dropout=0.0)
    tokens = torch.randn(batch, count, channels, requires_grad=True)
    return mixture, tokens, mixture.route(tokens, torch.tensor([1] * batch), torch.randn(batch, count, 5))


# ---- the authors' numbers


def test_router_equals_the_reference(reference):
    check = reference("dmoe")["A1_router_noise_off"]
    router = GroupRouter(4)
    router.load_reference_weights({f"0.{name}": torch.tensor(value) for name, value in check["weights"].items()})
    gates, indices = router(torch.tensor(check["x"]).unsqueeze(0), torch.tensor([0]), noise=torch.zeros(1, 3, 8))
    close(gates[0], torch.tensor(check["gates"]))
    assert indices[0].tolist() == check["topk_indices"]


def test_fill_rule_gives_the_weights_of_the_reference(b1):
    filled = reference_mixture(b1).reference_tensors()
    for name, value in b1["weights"].items():
        close(filled[name], torch.tensor(value), msg=name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("groups", ["[0, 1]", "[2, 2]", "[1, 0]"])
def test_mixture_equals_the_reference(b1, groups, way):
    mixture, case = reference_mixture(b1), b1["cases"][groups]
    tokens = torch.tensor(b1["x"], requires_grad=True)
    gates, indices = mixture.route(tokens, torch.tensor(json.loads(groups)))
    out = mixture.mix(tokens, gates, indices, dispatch.prepare_experts(expert_weights(mixture), torch.float32, way))
    close(out, torch.tensor(case["y"]))
    close(gates, torch.tensor(case["gates"]))
    assert indices.tolist() == case["indices"]
    (out * torch.arange(40.0).view_as(out) / 10).sum().backward()
    close(tokens.grad, torch.tensor(case["grad_x_of_sum(y*arange(40)/10)"]))


def test_unknown_group_is_refused_where_the_reference_takes_the_last_router(reference, b1):
    assert reference("dmoe")["B2_negative_attribute"]["equal_to_router_2"]
    with pytest.raises(ValueError, match=r"holds \[-1\].*routers for 0 to 2"):
        reference_mixture(b1)(torch.tensor(b1["x"]), torch.tensor([-1, 2]))


def test_evaluation_repeats_unless_the_reference_noise_is_asked_for(reference):
    assert reference("dmoe")["B4_eval_not_deterministic"]["max_abs_diff_nonzero"]
    tokens, group = torch.randn(2, 5, 8), torch.tensor([0, 0])
    quiet, noisy = DistributionAwareMoE(8).eval(), DistributionAwareMoE(8, noise_in_eval=True).eval()
    assert torch.equal(quiet(tokens, group), quiet(tokens, group))
    assert not torch.equal(noisy(tokens, group), noisy(tokens, group))
    assert not torch.equal(quiet.train().route(tokens, group)[0], quiet.route(tokens, group)[0])


# ---- routing


def test_noise_enters_as_the_equation_says():
    router, tokens, noise = (
        GroupRouter(6, num_experts=4, top_k=3, num_groups=2),
        torch.randn(1, 7, 6),
        torch.randn(1, 7, 4),
    )
    weight, bias = router.weight[1], router.bias[1]
    std = torch.log1p(torch.exp(tokens[0] @ weight[1].T + bias[1]))
    noisy = tokens[0] @ weight[0].T + bias[0] + noise[0] * std
    dropped = noisy.argmin(-1, keepdim=True)
    expected = noisy.scatter(-1, dropped, -torch.inf).softmax(-1)
    for mode in (True, False):
        gates, indices = router.train(mode)(tokens, torch.tensor([1]), noise)
        close(gates[0], expected)
        assert torch.equal(indices[0], noisy.argsort(-1, descending=True)[:, :3])


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 2**16))
def test_router_ignores_batch_order(order, seed):
    torch.manual_seed(seed)
    router = GroupRouter(6, num_experts=4, num_groups=3)
    tokens, group, noise = torch.randn(5, 3, 6), torch.tensor([2, 0, 0, 2, 1]), torch.randn(5, 3, 4)
    gates, indices = router(tokens, group, noise)
    permuted, permuted_indices = router(tokens[order], group[order], noise[order])
    close(permuted, gates[order])
    assert torch.equal(permuted_indices, indices[order])


@pytest.mark.parametrize("policy", ["mean", "prior"])
@pytest.mark.parametrize("noisy", [False, True])
def test_unknown_group_is_routed_by_the_average_router(policy, noisy):
    router = GroupRouter(6, num_experts=4, num_groups=3, unknown_group=policy).eval()
    router.set_group_prior(torch.tensor([1, 0, 3]))
    share = torch.tensor([0.25, 0.0, 0.75]) if policy == "prior" else torch.full((3,), 1 / 3)
    average = GroupRouter(6, num_experts=4).eval()
    with torch.no_grad():
        average.weight.copy_(torch.einsum("g,gxec->xec", share, router.weight)[None])
        average.bias.copy_(torch.einsum("g,gxe->xe", share, router.bias)[None])
    tokens, noise = torch.randn(3, 5, 6), torch.randn(3, 5, 4) if noisy else None
    gates, _ = router(tokens, torch.tensor([-1, 1, -1]), noise)
    expected, _ = average(tokens, torch.tensor([0, 0, 0]), noise)
    close(gates[[0, 2]], expected[[0, 2]])
    known, _ = GroupRouterLike(router)(tokens, torch.tensor([1, 1, 1]), noise)
    close(gates[1], known[1])


def test_group_prior_is_stored_with_the_weights():
    router, other = GroupRouter(4, num_groups=2), GroupRouter(4, num_groups=2)
    router.set_group_prior(torch.tensor([3.0, 1.0]))
    other.load_state_dict(router.state_dict())
    close(other.group_prior, torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("counts", [[1.0, 2.0, 3.0], [0.0, 0.0], [-1.0, 2.0]])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="one number of samples for each of 2 groups"):
        GroupRouter(4, num_groups=2).set_group_prior(torch.tensor(counts))


@pytest.mark.parametrize(
    ("group", "message"),
    [([0, 3], r"holds \[3\]"), ([0, -2], r"holds \[-2\]"), ([0], "has shape"), ([0.0, 1.0], "type torch.float32")],
)
def test_bad_groups_are_named(group, message):
    for policy in ("error", "mean"):
        with pytest.raises(ValueError, match=message):
            GroupRouter(4, num_groups=3, unknown_group=policy)(torch.randn(2, 5, 4), torch.tensor(group))


@pytest.mark.parametrize("arguments", [{"top_k": 9}, {"top_k": 0}, {"num_groups": 0}, {"unknown_group": "last"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DistributionAwareMoE(4, **arguments)


# ---- mixing


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_sorted_dispatch_equals_the_loop_with_gradients(way, top_k):
    mixture, tokens, (gates, indices) = routed(top_k=top_k)
    expected = brute_force(mixture, tokens, gates, indices)
    experts = dispatch.prepare_experts(expert_weights(mixture), torch.float32, way)
    out = mixture.mix(tokens, gates, indices, experts)
    close(out, expected)
    for ours, theirs in zip(gradients(out, mixture, tokens), gradients(expected, mixture, tokens), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
def test_sorted_dispatch_equals_the_dense_weighted_sum(way):
    mixture, tokens, (gates, indices) = routed(batch=2, count=150)  # several blocks per expert
    dense = torch.stack([expert(tokens) for expert in mixture.experts], dim=-2)
    experts = dispatch.prepare_experts(expert_weights(mixture), torch.float32, way)
    close(mixture.mix(tokens, gates, indices, experts), (dense * gates.unsqueeze(-1)).sum(-2))


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("way", ["split", "blocks"])
def test_channels_need_no_alignment(way, channels):
    mixture, tokens, (gates, indices) = routed(channels=channels)
    experts = dispatch.prepare_experts(expert_weights(mixture), torch.float32, way)
    close(mixture.mix(tokens, gates, indices, experts), brute_force(mixture, tokens, gates, indices))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_any_split_among_experts_is_right(chosen):
    mixture, indices = DistributionAwareMoE(8, num_experts=5, top_k=1, dropout=0.0), torch.tensor(chosen).view(1, -1, 1)
    tokens, gates = torch.randn(1, len(chosen), 8), torch.rand(1, len(chosen), 5)
    expected = brute_force(mixture, tokens, gates, indices)
    for way in WAYS:
        experts = dispatch.prepare_experts(expert_weights(mixture), torch.float32, way)
        close(mixture.mix(tokens, gates, indices, experts), expected)


@pytest.mark.parametrize("limit", [1, 25, 4096])
@pytest.mark.parametrize("way", WAYS)
def test_blocks_that_share_the_experts_add_up_their_gradients(monkeypatch, way, limit):
    monkeypatch.setattr(dispatch._Ledger, "LIMIT", limit)
    mixture, tokens, _ = routed()
    noise, group = torch.randn(4, 3, 5, 5), torch.tensor([1, 0, 1])

    def chain(mix) -> Tensor:
        h = tokens
        for step in noise:
            h = h + mix(h, *mixture.route(h, group, step))
        return h

    experts = dispatch.prepare_experts(expert_weights(mixture), torch.float32, way)
    ours = gradients(chain(lambda *routed: mixture.mix(*routed, experts)), mixture, tokens)
    theirs = gradients(chain(lambda *routed: brute_force(mixture, *routed)), mixture, tokens)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, rtol=1e-4)


def test_interrupted_and_repeated_backward_passes_count_once():
    mixture, tokens, (gates, indices) = routed()
    gates = gates.detach()
    experts = mixture.prepare(tokens)
    middle = mixture.mix(tokens, gates, indices, experts)
    loss = mixture.mix(middle, gates, indices, experts).square().sum()
    expected = brute_force(mixture, brute_force(mixture, tokens, gates, indices), gates, indices).square().sum()
    weights = list(mixture.experts.parameters())
    expected_gradients = torch.autograd.grad(expected, weights)
    torch.autograd.grad(loss, middle, retain_graph=True)
    torch.autograd.grad(loss, tokens, retain_graph=True)
    for retain in (True, False):
        for ours, theirs in zip(
            torch.autograd.grad(loss, weights, retain_graph=retain), expected_gradients, strict=True
        ):
            close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_every_parameter_has_a_gradient_with_an_absent_group_and_idle_experts(monkeypatch, way):
    monkeypatch.setattr(moe, "fastest_dispatch", lambda tokens: way)
    mixture = DistributionAwareMoE(8, num_experts=5, num_groups=2)
    with torch.no_grad():
        mixture.router.bias[:, 0] = torch.tensor([9.0, 9.0, -9.0, -9.0, -9.0])  # only the first two are chosen
    mixture(torch.randn(3, 5, 8), torch.tensor([1, 1, 1]), torch.zeros(3, 5, 5)).square().sum().backward()
    assert all(p.grad is not None for p in mixture.parameters())
    assert not mixture.router.weight.grad[0].any()
    assert mixture.router.weight.grad[1].any()
    assert not any(p.grad.any() for expert in mixture.experts[2:] for p in expert.parameters())
    assert all(p.grad.any() for expert in mixture.experts[:2] for p in expert.parameters())


def test_frozen_experts_still_pass_gradients_to_the_tokens():
    mixture, tokens, (gates, indices) = routed()
    expected = torch.autograd.grad(brute_force(mixture, tokens, gates, indices).sum(), tokens, retain_graph=True)
    mixture.experts.requires_grad_(False)
    close(torch.autograd.grad(mixture.mix(tokens, gates, indices).sum(), tokens), expected)


def test_dropout_acts_on_each_expert_output_while_training():
    mixture = DistributionAwareMoE(8, num_experts=2, top_k=2, dropout=0.5)
    tokens, gates, indices = (
        torch.randn(1, 4000, 8),
        torch.full((1, 4000, 2), 0.5),
        torch.tensor([0, 1]).expand(1, 4000, 2),
    )
    out = mixture.mix(tokens, gates, indices)
    full = mixture.eval().mix(tokens, gates, indices)
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)  # both experts dropped
    close((out / full).median(), torch.tensor(1.0), rtol=0.2, atol=0.2)
    assert torch.equal(full, mixture.mix(tokens, gates, indices))


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_autocast_stays_close_and_keeps_types(monkeypatch, way):
    monkeypatch.setattr(moe, "fastest_dispatch", lambda tokens: way)
    mixture, tokens = DistributionAwareMoE(32, num_groups=2).eval(), torch.randn(2, 40, 32)
    group, expected = torch.tensor([0, 1]), None
    expected = mixture(tokens, group)
    with torch.autocast("cpu", torch.bfloat16):
        gates, _ = mixture.route(tokens, group)
        out = mixture(tokens, group)
    assert gates.dtype == out.dtype == torch.float32
    torch.testing.assert_close(gates, mixture.route(tokens, group)[0])  # routing keeps the parameters' precision
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.02)
    parameters = list(mixture.experts.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for found, exact in zip(torch.autograd.grad(out.square().sum(), parameters), wanted, strict=True):
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < 0.1  # single entries differ where a ReLU flips


def test_a_call_without_gradient_does_not_cost_the_others_theirs():
    mixture, tokens = DistributionAwareMoE(8, num_experts=3).eval(), torch.randn(2, 9, 8)
    routing = mixture.route(tokens, torch.zeros(2, dtype=torch.int64))
    experts = mixture.prepare(tokens)
    with torch.no_grad():
        mixture.mix(tokens, *routing, experts)
    mixture.mix(tokens, *routing, experts).square().sum().backward()
    found = [p.grad.clone() for p in mixture.experts.parameters()]
    mixture.zero_grad()
    mixture.mix(tokens, *mixture.route(tokens, torch.zeros(2, dtype=torch.int64))).square().sum().backward()
    for ours, alone in zip(found, mixture.experts.parameters(), strict=True):
        torch.testing.assert_close(ours, alone.grad)


def test_a_group_beyond_the_last_is_never_routed_by_the_average(monkeypatch):
    router, tokens = GroupRouter(8, num_groups=3, unknown_group="mean"), torch.randn(1, 2, 8)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # no check on the host, as on a GPU
    with pytest.raises((IndexError, RuntimeError)):
        router(tokens, torch.tensor([3]))


def test_half_precision_module_keeps_its_type():
    mixture = DistributionAwareMoE(16).to(torch.bfloat16).eval()
    assert (
        mixture(torch.randn(2, 3, 16, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)).dtype == torch.bfloat16
    )


@pytest.mark.parametrize(
    ("way", "dtype"), [("split", torch.float32), ("blocks", torch.float32), ("grouped", torch.bfloat16)]
)
def test_compiled_equals_eager(monkeypatch, way, dtype):
    monkeypatch.setattr(moe, "fastest_dispatch", lambda tokens: way)
    torch.compiler.reset()
    mixture = DistributionAwareMoE(8, num_experts=4, num_groups=2, dropout=0.0).to(dtype)
    tokens, group, noise = torch.randn(3, 5, 8, dtype=dtype), torch.tensor([0, 1, 1]), torch.randn(3, 5, 4, dtype=dtype)
    compiled = torch.compile(mixture, backend="aot_eager", fullgraph=way != "split")  # no break, so no host sync
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    outs, grads = [], []
    for module in (mixture, compiled):
        mixture.zero_grad()
        outs.append(module(tokens, group, noise))
        outs[-1].square().sum().backward()
        grads.append([p.grad.clone() for p in mixture.parameters()])
    torch.testing.assert_close(outs[0], outs[1], **tolerance)
    torch.testing.assert_close(grads[0], grads[1], **tolerance)


def test_module_can_be_copied_after_a_step():
    mixture = DistributionAwareMoE(8)
    mixture(torch.randn(2, 3, 8), torch.zeros(2, dtype=torch.int64)).sum().backward()
    twin = copy.deepcopy(mixture).eval()
    tokens, group = torch.randn(2, 3, 8), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(twin(tokens, group), mixture.eval()(tokens, group))


def test_start_is_that_of_linear_layers():
    mixture = DistributionAwareMoE(100, num_groups=3)
    for tensor, fan_in in ((mixture.router.weight, 100), (mixture.router.bias, 100), (mixture.experts[3].weight1, 100)):
        assert 0.9 * fan_in**-0.5 < tensor.abs().max().item() <= fan_in**-0.5
    assert 0.9 / 20 < mixture.experts[3].weight2.abs().max().item() <= 1 / 20
    assert sum(p.numel() for p in mixture.router.parameters()) == 3 * (16 * 100 + 16)
    assert sum(p.numel() for p in mixture.experts[0].parameters()) == 8 * 100**2 + 5 * 100


# ---- checkpoints


def test_wrong_checkpoints_are_refused_by_name(b1):
    mixture = reference_mixture(b1)
    state = {name: tensor.clone() for name, tensor in mixture.reference_tensors().items()}
    before = copy.deepcopy(mixture.state_dict())
    state["experts.8.net.0.bias"] = torch.zeros(16)
    state["experts.0.net.2.weight"] = torch.zeros(4, 15)
    del state["router.1.noise_linear.bias"]
    with pytest.raises(CheckpointMismatchError) as caught:
        mixture.load_reference_weights(state)
    assert caught.value.missing == ["router.1.noise_linear.bias"]
    assert caught.value.unexpected == ["experts.8.net.0.bias"]
    assert caught.value.misshapen == {"experts.0.net.2.weight": ((4, 15), (4, 16))}
    for name in ("router.1.noise_linear.bias", "experts.8.net.0.bias", "experts.0.net.2.weight"):
        assert name in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())


def expert_weights(mixture: DistributionAwareMoE) -> list[list[Tensor]]:
    return [list(expert.parameters()) for expert in mixture.experts]


def GroupRouterLike(router: GroupRouter) -> GroupRouter:
    """The same routers, without a policy for unknown groups."""
    twin = GroupRouter(router.channels, router.num_experts, router.top_k, router.num_groups).eval()
    twin.load_state_dict(router.state_dict())
    return twin
