"""PIG's training step (both networks) and joint reverse step: memory format, precision, compilation, timed in turns.

``python benchmarks/paired_step.py [--image-size 512] [--batch-size 1] [--rounds 3] [--skip-compiled]``; with
``--memory`` the peak memory of a bfloat16 step of batch 6 with gradient checkpointing instead.
"""

from __future__ import annotations

import argparse
import resource
import shutil
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from timing import interleaved, print_table, ratio
from torch import Tensor

from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.diffusion import sample_pairs
from fairdiff_lightning.modules import PairedGuidedDiffusion


def build(
    size: int, device: str, channels_last: bool, compiled: bool, checkpointing: bool = False
) -> PairedGuidedDiffusion:
    torch.manual_seed(0)
    module = PairedGuidedDiffusion(
        image_size=size, channels_last=channels_last, gradient_checkpointing=checkpointing
    ).to(device)
    if compiled and module.guider is not None and module.target is not None:
        module.guider.compile()
        module.target.compile()
    return module


def make_batch(count: int, size: int, device: str) -> Sample:
    return {
        "image": torch.rand(count, 1, size, size, device=device),
        "mask": torch.randint(2, (count, 1, size, size), device=device),
        "attributes": {},
        "id": [str(k) for k in range(count)],
    }


def train_step(module: PairedGuidedDiffusion, batch: Sample, device: str, dtype: torch.dtype) -> None:
    module.zero_grad()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = module.train().losses(batch)["loss"]
    loss.backward()


def reverse_step(module: PairedGuidedDiffusion, noise: Tensor, device: str, dtype: torch.dtype) -> None:
    """One step of the joint sampler: an evaluation of either network."""
    assert module.guider is not None
    assert module.target is not None
    networks = (module._predictor(network, {}) for network in (module.guider, module.target))
    with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        sample_pairs(*networks, x=noise, y=noise, scheduler=module.eval().make_sampler(), num_steps=1)


def time_all(args: argparse.Namespace) -> None:
    candidates: dict[str, Callable[[], None]] = {}
    kinds = [False] if args.skip_compiled or not shutil.which("c++") else [False, True]
    batch = make_batch(args.batch_size, args.image_size, args.device)
    settings = [(d, last, c) for d in (torch.float32, torch.bfloat16) for last in (False, True) for c in kinds]
    for dtype, last, compiled in settings:
        module = build(args.image_size, args.device, last, compiled)
        name = f"{str(dtype)[6:]}, {'channels last' if last else 'contiguous'}, {'compiled' if compiled else 'eager'}"
        candidates[f"training: {name}"] = partial(train_step, module, batch, args.device, dtype)
        candidates[f"reverse: {name}"] = partial(reverse_step, module, batch["image"], args.device, dtype)
    seconds = interleaved(candidates, args.rounds)
    rows = []
    for what in ("training", "reverse"):
        plain = seconds[f"{what}: float32, contiguous, eager"]
        found = [(name, values) for name, values in seconds.items() if name.startswith(what)]
        rows += [(name, f"{median(values):.2f}", f"{ratio(plain, values):.2f}") for name, values in found]
    print(f"{args.image_size} x {args.image_size}, batch {args.batch_size}, on {args.device}\n")
    print_table(("step", "seconds", "gain"), rows)


def measure_memory(args: argparse.Namespace) -> None:
    module = build(args.image_size, args.device, channels_last=True, compiled=False, checkpointing=True)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-4)
    for _ in range(2):
        train_step(module, make_batch(6, args.image_size, args.device), args.device, torch.bfloat16)
        optimizer.step()
    if args.device == "cuda":
        peak, of = torch.cuda.max_memory_allocated() / 2**30, "of the device's memory"
    else:
        peak, of = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "resident in the whole process"
    print(f"{args.image_size} x {args.image_size}, batch 6, bfloat16, gradient checkpointing: {peak:.1f} GiB {of}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-compiled", action="store_true", help="compiling takes minutes")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    args = parser.parse_args()
    (measure_memory if args.memory else time_all)(args)
