"""The default mask codec against FairDiff's (farthest-point sampling, closing 15 x 15 twenty times), at 664 x 798.

Both on one core, as in a loader's worker: a second thread gives little, and waits on a busy machine.
`python benchmarks/geometry.py [--rounds 9]`
"""

from __future__ import annotations

import argparse
from statistics import median

import cv2
import torch
from timing import interleaved, print_table, ratio
from torch import Tensor

from fairdiff_lightning.geometry import masks_to_points, points_to_masks

SIZE = (664, 798)


def ellipse(centre: Tensor, axes: Tensor) -> Tensor:
    """Pixels (B, H, W) inside ellipses with centres (B, 2) and semi-axes (B, 2)."""
    row, col = torch.meshgrid(*(torch.arange(length) for length in SIZE), indexing="ij")
    offsets = (row, col)
    terms = [
        ((x - c[:, None, None]) / a[:, None, None]) ** 2 for x, c, a in zip(offsets, centre.T, axes.T, strict=True)
    ]
    return sum(terms, torch.zeros(())) <= 1


def draw_masks(count: int) -> Tensor:
    """Discs and cups (B, 1, H, W) about as large as the card's reference mask, in different places."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.tensor([332.0, 400.0]) + 60 * (torch.rand(count, 2, generator=generator) - 0.5)
    axes = torch.tensor([140.0, 120.0]) * (0.9 + 0.2 * torch.rand(count, 2, generator=generator))
    return (ellipse(centre, axes).long() + ellipse(centre + 4, axes / 2))[:, None]


def overlap(decoded: Tensor, masks: Tensor) -> str:
    """Mean Dice of rim and cup."""
    scores = []
    for k in (1, 2):
        a, b = decoded == k, masks == k
        scores.append((2 * (a & b).sum((1, 2, 3)) / (a.sum((1, 2, 3)) + b.sum((1, 2, 3)))).mean().item())
    return " / ".join(f"{score:.4f}" for score in scores)


def compare(count: int, rounds: int) -> list[tuple[str, ...]]:
    masks = draw_masks(count)
    clouds, thinned = masks_to_points(masks), masks_to_points(masks, method="fps")
    encode = {
        "ours": lambda: masks_to_points(masks),
        "reference": lambda: masks_to_points(masks, method="fps"),
    }
    decode = {
        "ours": lambda: points_to_masks(clouds, SIZE),
        "reference": lambda: points_to_masks(thinned, SIZE, method="closing"),
    }
    dice = [overlap(run(), masks) for run in decode.values()]
    rows = []
    for what, candidates, scores in (("encode", encode, ["-", "-"]), ("decode", decode, dice)):
        seconds = interleaved(candidates, rounds)
        times = (f"{1e3 * median(seconds[name]):.1f}" for name in candidates)
        rows.append((f"{what}, B={count}", *times, f"{ratio(seconds['reference'], seconds['ours']):.1f}", *scores))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows = [row for count in (1, 16) for row in compare(count, rounds)]
    header = ("mask codec", "ours, ms", "reference, ms", "reference/ours", "Dice rim / cup, ours", "reference")
    print_table(header, rows)


if __name__ == "__main__":
    main()
