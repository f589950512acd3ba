"""A training step of TransUNet (ViT-B/16) with experts, as a fraction of the machine's own matmul rate.

Forward, backward and SGD, timed in turns with square matmuls. `python benchmarks/step.py [--batch-size 2] [--rounds 5]`
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from statistics import median

import torch
from timing import interleaved, print_table, ratio
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fairdiff_lightning.networks import TransUNet

CLASSES, GROUPS, SIZE = 3, 3, 224


def flops_per_image() -> int:
    """Two for each multiply-add of one image, forward and backward, counted on the CPU, where products are matmuls."""
    network, image = TransUNet("vit_b16", num_classes=CLASSES, num_groups=GROUPS), torch.rand(1, 3, SIZE, SIZE)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(image, torch.tensor([0])).mean().backward()
    return counter.get_total_flops()


def training_step(network: nn.Module, batch_size: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True)
    image = torch.rand(batch_size, 3, SIZE, SIZE, device=device)
    mask = torch.randint(CLASSES, (batch_size, SIZE, SIZE), device=device)
    group = torch.arange(batch_size, device=device) % GROUPS

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(network(image, group), mask)
        loss.backward()
        optimizer.step()

    return step


def square_matmul(device: str, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """A product of two square matrices, and its FLOPs."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * side**3


def compare(
    dtype: torch.dtype, compiled: bool, batch_size: int, device: str, rounds: int, flops: int
) -> tuple[str, ...]:
    torch.manual_seed(0)
    torch.compiler.reset()
    network: nn.Module = TransUNet("vit_b16", num_classes=CLASSES, num_groups=GROUPS).to(device)
    if compiled:
        network.compile()
    product, product_flops = square_matmul(device, dtype)
    step = training_step(network, batch_size, device, dtype)
    seconds = interleaved({"step": step, "matmul": product}, rounds, warmup=2)
    rate = product_flops / median(seconds["matmul"])
    fraction = ratio(seconds["matmul"], seconds["step"]) * flops * batch_size / product_flops
    what = f"{str(dtype).removeprefix('torch.')}, {'compiled' if compiled else 'eager'}"
    times = (
        f"{median(seconds['step']):.2f}",
        f"{flops * batch_size / median(seconds['step']) / 1e9:.0f}",
        f"{rate / 1e9:.0f}",
    )
    return (what, *times, f"{100 * fraction:.0f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="2 on a CPU, 42 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-compiled", action="store_true", help="compiling takes minutes")
    args = parser.parse_args()
    batch_size = args.batch_size or (42 if args.device == "cuda" else 2)
    modes = [False, True]
    if args.skip_compiled or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        print("Compiled steps are left out: " + ("asked for." if args.skip_compiled else "there is no C++ compiler."))
        modes = [False]
    flops = flops_per_image()
    print(f"{flops / 1e9:.1f} GFLOP per image, forward and backward; batch {batch_size} on {args.device}\n")
    rows = [
        compare(dtype, compiled, batch_size, args.device, args.rounds, flops)
        for dtype in (torch.float32, torch.bfloat16)
        for compiled in modes
    ]
    print_table(("step", "seconds", "GFLOP/s", "matmul GFLOP/s", "fraction"), rows)


if __name__ == "__main__":
    main()
