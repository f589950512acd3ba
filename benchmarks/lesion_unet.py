"""LeFusion's training and reverse steps: our network against a plain reading of its equations, timed in turns.

``python benchmarks/lesion_unet.py [--width 32] [--size 64 64 32] [--rounds 3] [--steps reverse] [--batch-size 1]``:
both have the same weights, and are first seen to give the same output. A training step is forward, loss, backward and
Adam. On CUDA also compiled, with the memory of a step, and three textures in one batch against one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from statistics import median

import torch
from plain_lesion_unet import PlainLesionUNet
from timing import interleaved, print_table, ratio
from torch import Tensor, nn

from fairdiff_lightning.networks.lesion_unet import LesionUNet

Inputs = tuple[Tensor, Tensor, Tensor]
Step = Callable[[], object]
STEPS = ("training", "reverse")


def make_networks(width: int, device: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    ours = LesionUNet(width=width)
    return {"plain": PlainLesionUNet.with_weights_of(ours).to(device), "ours": ours.to(device)}


def make_inputs(batch: int, size: tuple[int, int, int], device: str) -> Inputs:
    """Noisy volumes (B, 1, H, W, D), steps, and histograms."""
    torch.manual_seed(1)
    histograms = torch.rand(batch, 16).softmax(1)
    return torch.randn(batch, 1, *size).to(device), torch.randint(300, (batch,)).to(device), histograms.to(device)


def as_taken(name: str, inputs: Inputs) -> Inputs:
    """The inputs in the order of axes that a network wants, in memory as well; the plain one has depth first."""
    noisy, *others = inputs
    return (noisy.permute(0, 1, 4, 2, 3).contiguous() if name.startswith("plain") else noisy, *others)


def check_equal(networks: dict[str, nn.Module], inputs: Inputs) -> None:
    with torch.inference_mode():
        plain, ours = (network.eval()(*as_taken(name, inputs)) for name, network in networks.items())
    difference = float((plain.permute(0, 1, 3, 4, 2) - ours).abs().max() / plain.std())
    if difference > 1e-4:
        raise SystemExit(f"the networks differ by {difference:.1e} standard deviations; expected is at most 1e-4.")
    print(f"largest difference of the outputs, in standard deviations of the plain network's: {difference:.1e}\n")


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs, dtype: torch.dtype) -> None:
    noisy = inputs[0]
    with torch.autocast(noisy.device.type, dtype, enabled=dtype != torch.float32):
        predicted = network.train()(*inputs)
    (predicted.float() - noisy).abs().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def reverse_step(network: nn.Module, inputs: Inputs, dtype: torch.dtype) -> None:
    with torch.inference_mode(), torch.autocast(inputs[0].device.type, dtype, enabled=dtype != torch.float32):
        network.eval()(*inputs)


def make_steps(networks: dict[str, nn.Module], inputs: Inputs, kinds: list[str]) -> dict[tuple[str, str, str], Step]:
    """What is timed, by step, precision and network."""
    steps: dict[tuple[str, str, str], Step] = {}
    for name, network in networks.items():
        taken, optimizer = as_taken(name, inputs), torch.optim.Adam(network.parameters(), lr=1e-4)
        for dtype in (torch.float32, torch.bfloat16):
            made = {
                "training": partial(train_step, network, optimizer, taken, dtype),
                "reverse": partial(reverse_step, network, taken, dtype),
            }
            steps |= {(kind, str(dtype)[6:], name): made[kind] for kind in kinds}
    return steps


def peak_memory(step: Step) -> str:
    """GiB on the GPU that a step needs beside weights and the optimizer's state."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}"


def compare(args: argparse.Namespace) -> None:
    networks = make_networks(args.width, args.device)
    inputs = make_inputs(args.batch_size, args.size, args.device)
    check_equal(networks, inputs)
    on_gpu = args.device == "cuda"
    if on_gpu and not args.skip_compiled:
        for name in tuple(networks):
            compiled = deepcopy(networks[name])
            compiled.compile()
            networks[f"{name}, compiled"] = compiled
    steps = make_steps(networks, inputs, args.steps)
    seconds = interleaved(steps, args.rounds, warmup=3 if on_gpu else 1)
    rows = []
    for kind, dtype, name in sorted(steps, key=lambda key: key[:2]):
        found = seconds[kind, dtype, name]
        gains = [f"{ratio(seconds[kind, d, 'plain'], found):.2f}" for d in ("float32", dtype)]
        memory = [peak_memory(steps[kind, dtype, name])] if on_gpu else []
        rows.append((kind, dtype, name, f"{1000 * median(found):.1f}", *gains, *memory))
    size = " x ".join(map(str, args.size))
    print(f"width {args.width}, {size} voxels, batch {args.batch_size}, on {args.device}\n")
    gains_of = ("gain on plain float32", "gain on plain, same precision")
    print_table(("step", "precision", "network", "ms", *gains_of, *(["step's GiB"] if on_gpu else [])), rows)


def compare_batches(args: argparse.Namespace) -> None:
    """Three textures of one scan in a batch, against one."""
    network = make_networks(args.width, args.device)["ours"]
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        steps = {b: partial(reverse_step, network, make_inputs(b, args.size, args.device), dtype) for b in (1, 3)}
        seconds = interleaved({str(b): step for b, step in steps.items()}, max(args.rounds, 10), warmup=3)
        one, three = (f"{1000 * median(seconds[b]):.1f}" for b in ("1", "3"))
        each = ratio(seconds["3"], seconds["1"]) / 3
        rows.append((str(dtype)[6:], one, three, f"{each:.2f}"))
    print("\nreverse step of our network, by batch\n")
    print_table(("precision", "ms for one", "ms for three", "time per volume, three to one"), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--width", type=int, default=64 if on_gpu else 32)
    parser.add_argument("--size", type=int, nargs=3, default=(64, 64, 32), help="height, width, depth")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20 if on_gpu else 3)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--skip-compiled", action="store_true", help="compiling takes minutes")
    args = parser.parse_args()
    compare(args)
    if args.device == "cuda":
        compare_batches(args)
