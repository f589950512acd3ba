"""FID and KID of features that are already there, by torchmetrics, finite for small and degenerate sets too."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities import rank_zero_warn


class _GivenFeatures(nn.Identity):
    """Stands where torchmetrics expects a feature network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(generated: Tensor, real: Tensor) -> Tensor:
    """Fréchet distance (FID) of the normal distributions fitted to two sets of features.

    With fewer samples than dimensions a covariance is singular and the value is biased upwards: a warning says so. One
    sample has covariance 0.

    Args:
        generated: (G, D) features.
        real: (R, D) features.

    Returns:
        Scalar, at least 0, finite; worked out in float64, in the features' dtype.

    Raises:
        ValueError: a set is empty, is not of that shape, or holds NaN or infinity.
    """
    sets = _checked(generated, real)
    count, width = min(map(len, sets)), generated.shape[1]
    if count <= width:
        rank_zero_warn(
            f"FID of {len(generated)} generated and {len(real)} real samples with {width} features: a covariance is "
            f"singular and the value biased upwards. Compare it only with values of the same numbers, or take more than"
            f" {width} samples, fewer features, or KID."
        )
    # Not synchronised: every process has all features already.
    metric = FrechetInceptionDistance(_GivenFeatures(width), sync_on_compute=False).to(generated.device)
    for features, is_real in zip(sets, (False, True), strict=True):
        metric.update(features, real=is_real)
    distance: Tensor = metric.compute()
    return distance.clamp(min=0).to(generated.dtype)


def kernel_distance(
    generated: Tensor, real: Tensor, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> Tensor:
    """Kernel distance (KID): squared maximum mean discrepancy with a cubic kernel, unbiased, mean over random subsets.

    Subsets are as large as the smaller set where that has fewer than ``subset_size`` samples. Two sets of that size
    have one subset.

    Args:
        generated: (G, D) features.
        real: (R, D) features.
        subset_size: samples of a subset.
        subsets: number of subsets.
        seed: of their draw; the global generator is left as it is.

    Returns:
        Scalar, finite; below 0 is possible, as for any unbiased estimate.

    Raises:
        ValueError: a set is empty, is not of that shape, or holds NaN or infinity.
    """
    sets = _checked(generated, real)
    size = min(subset_size, *map(len, sets))
    if max(map(len, sets)) == size:
        subsets = 1
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        torch.default_generator.manual_seed(seed)
        metric = KernelInceptionDistance(
            _GivenFeatures(generated.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
        for features, is_real in zip(sets, (False, True), strict=True):
            metric.update(features, real=is_real)
        distance: Tensor = metric.compute()[0]
    return distance.to(generated.dtype)


def _checked(generated: Tensor, real: Tensor) -> list[Tensor]:
    """Both sets in float64, on the CPU where the device has none; a single sample comes twice."""
    checked = []
    for kind, features in (("generated", generated), ("real", real)):
        if features.dim() != 2 or features.shape[1] != generated.shape[1] or features.numel() == 0:
            raise ValueError(
                f"{kind} features have shape {tuple(features.shape)}, expected (N, {generated.shape[-1]}) with N at "
                "least 1 and the same width for generated and real."
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"{kind} features hold NaN or infinity: look at the images or the extractor first.")
        if len(features) == 1:
            rank_zero_warn(f"only one {kind} sample: its spread is taken as 0, and the value says little.")
            features = features.expand(2, -1)
        checked.append((features.cpu() if features.device.type == "mps" else features).double())
    return checked
