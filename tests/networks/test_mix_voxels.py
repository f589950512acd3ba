"""Mixtures on voxels chunk by chunk: results, gradients, draws, and what is computed again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fairdiff_lightning.losses import load_balance_loss
from fairdiff_lightning.networks import DistributionAwareMoE, moe
from fairdiff_lightning.networks.resunet3d import mix_voxels


def mixture_and_features(dtype: torch.dtype = torch.float32) -> tuple[DistributionAwareMoE, Tensor, Tensor]:
    mixture = DistributionAwareMoE(8, num_groups=3, dropout=0.3).to(dtype)
    return mixture, torch.randn(2, 8, 5, 3, 4, dtype=dtype, requires_grad=True), torch.tensor([2, 0])


def gradients(out: Tensor, gates: Tensor, mixture: nn.Module, features: Tensor) -> list[Tensor]:
    weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()
    balance = load_balance_loss(gates)
    return list(torch.autograd.grad((out * weight).sum() + balance, [features, *mixture.parameters()]))


@pytest.mark.parametrize("chunk_tokens", [1, 2, 15, 50, 119])
def test_chunks_give_the_results_and_gradients_of_the_whole(chunk_tokens):
    mixture, features, group = mixture_and_features()
    mixture.eval()
    whole, gates = mix_voxels(mixture, features, group)
    tokens = features.flatten(2).mT
    torch.testing.assert_close(whole, features + mixture(tokens, group).mT.reshape(features.shape))
    torch.testing.assert_close(gates, mixture.route(tokens, group)[0].mean(1, keepdim=True))
    out, chunk_gates = mix_voxels(mixture, features, group, chunk_tokens)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(chunk_gates, gates, rtol=0, atol=1e-6)
    ours = gradients(out, chunk_gates, mixture, features)
    for found, expected in zip(ours, gradients(whole, gates, mixture, features), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_recomputed_chunks_draw_the_noise_and_dropout_of_the_first_time():
    """Against the same chunks with nothing recomputed; both modes go on from the same state of the generator."""
    mixture, features, group = mixture_and_features()

    def results(recompute: bool) -> list[Tensor]:
        torch.manual_seed(3)
        if recompute:
            out, gates = mix_voxels(mixture, features, group, chunk_tokens=50)
        else:
            parts = [mix_voxels(mixture, part, group) for part in features.flatten(2).split(25, dim=2)]
            out = torch.cat([part for part, _ in parts], 2).view_as(features)
            counts = (25, 25, 10)
            gates = sum(gate * n / 60 for (_, gate), n in zip(parts, counts, strict=True))
        return [out.detach(), *gradients(out, gates, mixture, features), torch.rand(3)]

    for found, expected in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_noisy_chunks_is_the_slope():
    mixture, features, group = mixture_and_features(torch.float64)
    direction, step = torch.randn_like(features), 1e-7

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        out, _ = mix_voxels(mixture, x, group, chunk_tokens=50)
        return (out * torch.arange(out.numel()).view_as(out).cos()).sum()

    (gradient,) = torch.autograd.grad(value(features), features)
    with torch.no_grad():
        slope = (value(features + step * direction) - value(features - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-5)


def test_only_chunks_are_recomputed(monkeypatch):
    mixture, features, group = mixture_and_features()
    calls, mix = [], DistributionAwareMoE.mix

    def counted(self, tokens: Tensor, *arguments) -> Tensor:
        calls.append(tokens.shape[1])
        return mix(self, tokens, *arguments)

    monkeypatch.setattr(DistributionAwareMoE, "mix", counted)
    for chunk_tokens, expected in ((120, [60]), (100, [50, 10, 10, 50])):
        calls.clear()
        mix_voxels(mixture, features, group, chunk_tokens)[0].sum().backward()
        assert calls == expected


def test_mean_gates_have_the_balance_of_all_gates():
    mixture, features, group = mixture_and_features()
    mixture.eval()
    _, gates = mix_voxels(mixture, features, group)
    everything, _ = mixture.route(features.flatten(2).mT, group)
    torch.testing.assert_close(load_balance_loss(gates), load_balance_loss(everything))


@pytest.mark.parametrize("dispatch", ["blocks", "split"])
def test_chunks_compile_as_one_graph_but_for_the_cpus_reading_of_sizes(monkeypatch, dispatch):
    monkeypatch.setattr(moe, "fastest_dispatch", lambda tokens: dispatch)
    torch.compiler.reset()
    mixture, features, group = mixture_and_features()
    mixture.eval()
    expected, _ = mix_voxels(mixture, features, group, 60)
    compiled = torch.compile(mix_voxels, backend="eager", fullgraph=dispatch == "blocks")
    torch.testing.assert_close(compiled(mixture, features, group, 60)[0], expected)
