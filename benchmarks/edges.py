"""Edges of a stack of slices: drawn together and looked up, against slice by slice as DiffBoost's code draws them.

``python benchmarks/edges.py [--slices 32] [--size 384] [--rounds 3] [--device cpu]``; HED has random weights, the time
is that of the published ones. Slice by slice is: to the device, the network in its plain layout, back, 8-bit levels;
for contours, a complex convolution by scipy. All are single precision except where the row says otherwise.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.signal import convolve2d
from timing import interleaved, print_table, ratio
from torch import Tensor

from fairdiff_lightning.data.edges import EdgeReader, edges_of, label_contour
from fairdiff_lightning.networks.hed import HED

KERNEL = np.array([[-3, 0, 3], [-10, 0, 10], [-3, 0, 3]])
KERNEL = KERNEL + 1j * KERNEL.T


def one_by_one(network: HED, images: Tensor, device: str) -> NDArray[np.uint8]:
    """8-bit levels (B, H, W) of images (B, 1, H, W), each by a pass of its own."""
    levels = []
    for image in images:
        with torch.no_grad():
            x = 255 * image[None].to(device).expand(-1, 3, -1, -1) - network.mean
            sides = []
            for stage, score in zip(network.stages, network.scores, strict=True):
                x = stage(x)
                sides.append(F.interpolate(score(x), image.shape[-2:], mode="bilinear"))
            edge = torch.sigmoid(network.fuse(torch.cat(sides, 1)))
        levels.append((edge[0, 0].cpu().numpy() * 255).clip(0, 255).astype(np.uint8))
    return np.stack(levels)


def contours_one_by_one(masks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Contours (B, H, W) of masks (B, H, W), each by a convolution of its own."""
    found = [np.abs(convolve2d(mask, KERNEL, mode="same", boundary="symm")).clip(0, 1) for mask in masks]
    return np.stack(found)


def make_slices(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Smooth random slices (B, 1, H, W) in [0, 1], all different, with a bright disk that the mask marks."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, 8, 8, generator=generator)
    images = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    y, x = np.mgrid[:size, :size] - size // 2
    mask = torch.from_numpy((x**2 + y**2 < (size // 5) ** 2).astype(np.int64)).expand(count, 1, size, size)
    return (images + 0.2 * mask).clamp(0, 1), mask.contiguous()


def time_all(args: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(0)
    network = HED().eval().to(args.device)
    plain_network = deepcopy(network).to(memory_format=torch.contiguous_format)
    images, masks = make_slices(args.slices, args.size)
    labels, size = masks[:, 0].numpy(), args.batch_size
    kept = EdgeReader(network, folder, size)
    kept.prepare({"image": i, "mask": m, "attributes": {}, "id": ""} for i, m in zip(images, masks, strict=True))

    def in_bfloat16() -> Tensor:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            return edges_of(images, None, network, size)

    candidates: dict[str, Callable[[], object]] = {
        "HED: slice by slice": lambda: one_by_one(plain_network, images, args.device),
        "HED: batched": lambda: edges_of(images, None, network, size),
        "HED: batched, bfloat16": in_bfloat16,
        "HED and contour: stored": lambda: kept(images, masks),
        "contour: slice by slice": lambda: contours_one_by_one(labels),
        "contour: batched": lambda: label_contour(masks),
    }
    seconds = interleaved(candidates, args.rounds)
    rows = []
    for name, values in seconds.items():
        plain = seconds[f"{'contour' if name.startswith('contour') else 'HED'}: slice by slice"]
        rows.append((name, f"{1e3 * median(values) / args.slices:.2f}", f"{ratio(plain, values):.2f}"))
    print(f"{args.slices} slices of {args.size} x {args.size}, batches of {size}, on {args.device}\n")
    print_table(("edges", "ms a slice", "times as fast"), rows)
    plain = torch.from_numpy(one_by_one(plain_network, images, args.device).astype(np.float32))
    for name, edges in (("batched", edges_of(images, None, network, size)), ("batched, bfloat16", in_bfloat16())):
        print(f"{name}: at most {(255 * edges[:, 0] - plain).abs().max():.0f} of 255 levels from slice by slice")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    with tempfile.TemporaryDirectory() as name:
        time_all(parser.parse_args(), Path(name))
