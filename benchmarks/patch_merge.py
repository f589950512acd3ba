"""Time of merging real and synthetic samples, as a part of the training step of MONAI's AttentionUnet.

Forward, backward and AdamW with the channels and batch size of DiffBoost's code, timed in turns with the merging of one
batch: images (one pass), logits (two passes). `python benchmarks/patch_merge.py [--size 384] [--batch-size 8]`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import AttentionUnet
from timing import interleaved, print_table, ratio
from torch import Tensor

from fairdiff_lightning.data.patch_merge import MergeLevel, PatchMerge

CLASSES = 2


def training_step(level: MergeLevel, merge: PatchMerge, pair: Tensor, mask: Tensor) -> Callable[[], None]:
    """A step on real and synthetic images (2, B, 1, H, W), the merging among it."""
    channels = (16, 32, 64, 128, 128, 256)
    network = AttentionUnet(2, 1, CLASSES, channels, (2,) * 5).to(pair.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loss_function = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)

    def step() -> None:
        optimizer.zero_grad()
        images = level == "input"
        logits = network(merge(*pair)) if images else merge(network(pair[0]), network(pair[1]))
        loss_function(logits, mask).backward()
        optimizer.step()

    return step


def compare(level: MergeLevel, pair: Tensor, mask: Tensor, patch_size: int, rounds: int) -> tuple[str, ...]:
    merge = PatchMerge(patch_size=patch_size, level=level)
    merged = pair if level == "input" else pair.expand(-1, -1, CLASSES, -1, -1).contiguous()
    candidates = {
        "merge": lambda: merge(*merged),
        "step": training_step(level, merge, pair, mask),
    }
    seconds = interleaved(candidates, rounds, warmup=2)
    times = (f"{1000 * median(seconds[name]):.3f}" for name in ("merge", "step"))
    return (level, *times, f"{100 * ratio(seconds['merge'], seconds['step']):.3f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=384, help="side of the image, a multiple of 32")
    parser.add_argument("--patch-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pair = torch.rand(2, arguments.batch_size, 1, arguments.size, arguments.size, device=arguments.device)
    mask = (pair[0] > 0.5).float()
    rows = [compare(level, pair, mask, arguments.patch_size, arguments.rounds) for level in ("input", "logits")]
    print_table(("level", "merge, ms", "step, ms", "merge / step"), rows)


if __name__ == "__main__":
    main()
