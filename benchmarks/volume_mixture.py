"""Memory and time of the 3-D mixture in chunks that are recomputed, against all voxels at once, forward and backward.

`python benchmarks/volume_mixture.py [--part mixture|network] [--sizes 128x128x128 ...] [--batch-size 1]`
The part is the mixture of the first encoder stage, or a training step of the whole network; chunks are as long as the
network's own default makes them. Each peak is that of a process of its own: on a GPU all that PyTorch has allocated; on
a CPU what one step allocates on top of weights and optimizer, or with `--memory resident` by how much the process
grows, allocator's waste and oneDNN's scratch included. A line through the peaks of three sizes or more tells what a
batch of 384 x 384 x 128 voxels needs; only sizes of several chunks lie on it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from math import prod
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from timing import interleaved, print_table, ratio
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from fairdiff_lightning.networks.resunet3d import ResUNet3D, mix_voxels

SMALLEST, FULL = (64, 64, 32), (384, 384, 128)
SIZES = ("128x128x64", "128x128x128", "160x160x128", "192x192x128")
SHIPPED = inspect.signature(ResUNet3D).parameters["chunk_tokens"].default
GROUPS = 5
GIB = 2**30
Size = tuple[int, ...]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("mixture", "network"), default="mixture")
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[parse_size(size) for size in SIZES])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--feature-size", type=int, default=48)
    parser.add_argument("--chunk-tokens", type=int, default=SHIPPED, help=f"the network's own is {SHIPPED}")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--memory", choices=("allocated", "resident"), default="allocated", help="on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=("chunks", "whole"), help=argparse.SUPPRESS)
    return parser.parse_args()


def parse_size(text: str) -> Size:
    return tuple(int(side) for side in text.split("x"))


def show(size: Size) -> str:
    return "x".join(map(str, size))


def build(options: argparse.Namespace, variant: str) -> Callable[[Size], Callable[[], None]]:
    """Network of the variant; of it, a function that makes the training step of a size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = ResUNet3D(
        feature_size=options.feature_size,
        num_groups=GROUPS,
        chunk_tokens=options.chunk_tokens if variant == "chunks" else None,
        gradient_checkpointing=options.gradient_checkpointing,
    ).to(device)
    dtype, count = getattr(torch, options.dtype), options.batch_size
    group = torch.arange(count, device=device) % GROUPS
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def mixture_step(size: Size) -> Callable[[], None]:
        features = torch.randn(count, options.feature_size, *(side // 2 for side in size), device=device, dtype=dtype)

        def step() -> None:
            leaf = features.detach().requires_grad_()
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                out, _ = mix_voxels(network.mixtures[0], leaf, group, network.chunk_tokens)
            out.backward(torch.ones_like(out))

        return step

    def network_step(size: Size) -> Callable[[], None]:
        image = torch.rand(count, 1, *size, device=device)
        mask = torch.randint(2, (count, *size), device=device)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(network(image, group), mask)
            loss.backward()
            optimizer.step()

        return step

    return mixture_step if options.part == "mixture" else network_step


def measure(options: argparse.Namespace) -> int:
    """Peak bytes of one step in this process; a first step of the smallest size loads what PyTorch loads late."""
    make = build(options, options.measure)
    make(SMALLEST)()
    step = make(options.sizes[0])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    return allocated(step) if options.memory == "allocated" else grown(step)


def allocated(step: Callable[[], None]) -> int:
    """Most bytes that tensors made by a step take at once, from the record of PyTorch's allocator for the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def grown(step: Callable[[], None]) -> int:
    """Bytes by which a step raises the most memory that this process has had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)


def measured_apart(options: argparse.Namespace, variant: str, size: Size) -> float:
    """Peak GiB of a step in a new process, NaN where it runs out of memory."""
    passed = ("part", "batch_size", "feature_size", "chunk_tokens", "dtype", "memory")
    command = [sys.executable, __file__, "--measure", variant, "--sizes", show(size)]
    command += [word for name in passed for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    command += ["--gradient-checkpointing"] * options.gradient_checkpointing
    # glibc would keep freed tensors for later ones, in pieces; so it gives each back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout) / GIB
    killed = done.returncode in (-9, 137)
    if killed or "OutOfMemoryError" in done.stderr or "can't allocate memory" in done.stderr:
        return float("nan")
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def fit(options: argparse.Namespace, variant: str, peaks: list[float]) -> str:
    """The line through the peaks of the sizes that were split into chunks, and what it says of full-size volumes."""
    voxels = np.array([options.batch_size * prod(size) / 1e6 for size in options.sizes])
    known = np.isfinite(peaks) & (chunk_counts(options) > 1)
    if known.sum() < 3:
        return f"{variant}: a line needs three sizes of several chunks that fit into memory."
    slope, start = np.polyfit(voxels[known], np.array(peaks)[known], 1)
    rest = np.abs(start + slope * voxels[known] - np.array(peaks)[known]).max()
    full = start + slope * options.batch_size * prod(FULL) / 1e6
    return (
        f"{variant}: {start:.3f} GiB + {slope:.4f} GiB per million voxels (at most {rest:.3f} GiB off the line), "
        f"that is {full:.1f} GiB for {options.batch_size} x {show(FULL)} in {options.dtype}"
    )


def chunk_counts(options: argparse.Namespace) -> NDArray[np.int64]:
    """How many chunks the first stage has at each size."""
    tokens = np.array([options.batch_size * prod(side // 2 for side in size) for size in options.sizes])
    return -(-tokens // options.chunk_tokens)


def main() -> None:
    options = arguments()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    variants = ("chunks", "whole")
    # Memory first: a process starts from the peak of the one that starts it.
    peaks = {v: [measured_apart(options, v, size) for size in options.sizes] for v in variants}
    makers = {v: build(options, v) for v in variants}
    rows, counts = [], chunk_counts(options)
    for i, size in enumerate(options.sizes):
        chunks, whole = (peaks[v][i] for v in variants)
        fitting = {v: makers[v](size) for v in variants if np.isfinite(peaks[v][i])}
        seconds = interleaved(fitting, options.rounds)
        times = [f"{median(seconds[v]):.2f}" if v in fitting else "-" for v in variants]
        slower = f"{ratio(seconds['chunks'], seconds['whole']):.2f}" if len(fitting) == 2 else "-"
        rows.append(
            (show(size), str(counts[i]), f"{chunks:.3f}", f"{whole:.3f}", f"{whole / chunks:.1f}", *times, slower)
        )
    of = f"{options.part}, {options.dtype}, B={options.batch_size}, chunks of {options.chunk_tokens}"
    header = (of, "chunks", "chunks, GiB", "whole, GiB", "whole/chunks", "chunks, s", "whole, s", "chunks/whole")
    print_table(header, rows)
    print("\n" + "\n".join(fit(options, v, peaks[v]) for v in variants))


if __name__ == "__main__":
    main()
