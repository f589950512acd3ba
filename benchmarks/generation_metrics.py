"""Generation metrics against loops over the samples that read the definitions plainly.

2,000 x 2,000 features of 1,000 dimensions; 100 x 100 clouds of 512 points.
`python benchmarks/generation_metrics.py [--rounds 3]`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from timing import interleaved, print_table, ratio
from torch import Tensor
from torch.nn import functional as F

from fairdiff_lightning.metrics import (
    chamfer_distances,
    cosine_distances,
    coverage,
    generation_scores,
    minimum_matching_distance,
)

SAMPLES, DIMENSIONS = 2000, 1000
CLOUDS, POINTS = 100, 512


def plain_mmd_cov(generated: Tensor, real: Tensor) -> Tensor:
    """One generated sample after another against all real ones."""
    nearest_to_real = torch.full((len(real),), torch.inf)
    matched = set()
    for sample in generated:
        distance = (1 - F.cosine_similarity(sample[None], real)) / 2
        nearest_to_real = torch.minimum(nearest_to_real, distance)
        matched.add(int(distance.argmin()))
    return torch.stack([nearest_to_real.mean(), torch.tensor(len(matched) / len(real))])


def plain_scores(generated: Tensor, real: Tensor) -> Tensor:
    """The same, and every sample against all others for the leave-one-out accuracy."""
    everything = torch.cat([generated, real])
    correct = 0
    for i, sample in enumerate(everything):
        distance = (1 - F.cosine_similarity(sample[None], everything)) / 2
        distance[i] = torch.inf
        correct += (int(distance.argmin()) < len(generated)) == (i < len(generated))
    return torch.cat([plain_mmd_cov(generated, real), torch.tensor([correct / len(everything)])])


def plain_chamfer(generated: Tensor, real: Tensor) -> Tensor:
    """One pair of clouds after another, with PyTorch's own distances of points."""
    rows = []
    for cloud in generated:
        squares = [torch.cdist(cloud, other).square() for other in real]
        rows.append(torch.stack([s.amin(0).mean() + s.amin(1).mean() for s in squares]))
    return torch.stack(rows)


def matrix_mmd_cov(generated: Tensor, real: Tensor) -> Tensor:
    distances = cosine_distances(generated, real)
    return torch.stack([minimum_matching_distance(distances), coverage(distances)])


def matrix_scores(generated: Tensor, real: Tensor) -> Tensor:
    scores = generation_scores(generated, real)
    return torch.stack([scores["mmd"], scores["coverage"], scores["1nna"]])


def compare(
    what: str, ours: Callable[..., Tensor], loop: Callable[..., Tensor], sets: tuple[Tensor, Tensor], rounds: int
) -> tuple[str, ...]:
    torch.testing.assert_close(ours(*sets), loop(*sets), rtol=1e-4, atol=1e-5)
    seconds = interleaved({"ours": lambda: ours(*sets), "loop": lambda: loop(*sets)}, rounds, warmup=0)
    times = (f"{median(seconds[name]):.2f}" for name in ("ours", "loop"))
    return (what, *times, f"{ratio(seconds['loop'], seconds['ours']):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    features = torch.rand(SAMPLES, DIMENSIONS), torch.rand(SAMPLES, DIMENSIONS)
    clouds = torch.randn(CLOUDS, POINTS, 3), torch.randn(CLOUDS, POINTS, 3)
    rows = [
        compare(f"MMD, COV, {SAMPLES} x {SAMPLES}", matrix_mmd_cov, plain_mmd_cov, features, rounds),
        compare(f"MMD, COV, 1-NNA, {SAMPLES} x {SAMPLES}", matrix_scores, plain_scores, features, 1),
        compare(f"chamfer, {CLOUDS} x {CLOUDS} of {POINTS}", chamfer_distances, plain_chamfer, clouds, rounds),
    ]
    print_table(("what", "ours, s", "loop, s", "loop/ours"), rows)


if __name__ == "__main__":
    main()
