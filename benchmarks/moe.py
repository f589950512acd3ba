"""The mixture of experts against a per-sample, per-expert loop that reads the equations plainly.

Forward and backward at (B, 196, 768), 8 experts, top 2, 3 groups. `python benchmarks/moe.py [--rounds 9]`
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from statistics import median

import torch
from timing import interleaved, print_table, ratio
from torch import Tensor, nn
from torch.nn import functional as F

from fairdiff_lightning.networks import DistributionAwareMoE

GROUPS, TOKENS, CHANNELS = 3, 196, 768


class PlainMoE(nn.Module):
    """A list of routers, one sample after another; a list of experts, one mask after another."""

    def __init__(self, channels: int, num_experts: int, top_k: int, num_groups: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.logits = nn.ModuleList(nn.Linear(channels, num_experts) for _ in range(num_groups))
        self.spread = nn.ModuleList(nn.Linear(channels, num_experts) for _ in range(num_groups))
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, channels), nn.Dropout(0.1)
            )
            for _ in range(num_experts)
        )

    @torch.no_grad()
    def copy_from(self, other: DistributionAwareMoE) -> None:
        for g, linears in enumerate(zip(self.logits, self.spread, strict=True)):
            for row, linear in enumerate(linears):
                linear.weight.copy_(other.router.weight[g, row])
                linear.bias.copy_(other.router.bias[g, row])
        for plain, expert in zip(self.experts, other.experts, strict=True):
            plain[0].weight.copy_(expert.weight1)
            plain[0].bias.copy_(expert.bias1)
            plain[2].weight.copy_(expert.weight2.t())
            plain[2].bias.copy_(expert.bias2)

    def route(self, tokens: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for sample, g in zip(tokens, group.tolist(), strict=True):
            logits = self.logits[g](sample)
            rows.append(logits + torch.randn_like(logits) * F.softplus(self.spread[g](sample)))
        noisy = torch.stack(rows)
        kept, indices = noisy.topk(self.top_k, dim=-1)
        sparse = torch.full_like(noisy, -torch.inf).scatter(-1, indices, kept)
        return sparse.softmax(-1), indices

    def forward(self, tokens: Tensor, group: Tensor) -> Tensor:
        gates, indices = self.route(tokens, group)
        mixture = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            sent = (indices == i).any(-1)
            if sent.any():
                mixture[sent] += (expert(tokens[sent]) * gates[sent][:, i : i + 1]).to(mixture.dtype)
        return mixture


def training_step(layer: nn.Module, tokens: Tensor, group: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad()
        leaf = tokens.clone().requires_grad_()
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            out = layer(leaf, group)
        out.square().mean().backward()

    return step


def host_syncs(step: Callable[[], None]) -> int:
    """How often the host waits for the GPU in one step."""
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def compare(device: str, batch_size: int, dtype: torch.dtype, rounds: int) -> tuple[str, ...]:
    torch.manual_seed(0)
    ours = DistributionAwareMoE(CHANNELS, num_groups=GROUPS).to(device)
    plain = PlainMoE(CHANNELS, 8, 2, GROUPS).to(device)
    plain.copy_from(ours)
    tokens = torch.randn(batch_size, TOKENS, CHANNELS, device=device)
    group = torch.arange(batch_size, device=device) % GROUPS
    steps = {"ours": training_step(ours, tokens, group, dtype), "loop": training_step(plain, tokens, group, dtype)}
    seconds = interleaved(steps, rounds, warmup=2)
    syncs = " / ".join(str(host_syncs(step)) for step in steps.values()) if device == "cuda" else "-"
    what = f"{device} {str(dtype).removeprefix('torch.')}, B={batch_size}"
    times = (f"{1e3 * median(seconds[name]):.1f}" for name in steps)
    return (what, *times, f"{ratio(seconds['loop'], seconds['ours']):.2f}", syncs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    cases = [("cpu", 2, torch.float32), ("cpu", 16, torch.float32), ("cpu", 2, torch.bfloat16)]
    if torch.cuda.is_available():
        cases += [("cuda", 42, torch.bfloat16), ("cuda", 42, torch.float32)]
    rows = [compare(device, batch_size, dtype, rounds) for device, batch_size, dtype in cases]
    print_table(("forward + backward", "ours, ms", "loop, ms", "loop/ours", "host syncs, ours / loop"), rows)


if __name__ == "__main__":
    main()
