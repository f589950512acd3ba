"""How alike generated images are to each other."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

SSIM_SIDE, MS_SSIM_SIDE = 11, 176
"""Smallest sides: the window of SSIM, and 11 pixels left after the four halvings of MS-SSIM."""
_CHUNK = 16


def ssim_between(images: Tensor, num_pairs: int = 50, seed: int = 0, multiscale: bool = False) -> Tensor:
    """Mean structural similarity of random pairs of images; high means little diversity.

    An image is in one pair at most, so at most N // 2 pairs are drawn.

    Args:
        images: (N, C, H, W) in [0, 1], N at least 2.
        num_pairs: largest number of pairs.
        seed: of the permutation that the pairs come from.
        multiscale: MS-SSIM (Wang et al. 2003) instead of SSIM.

    Returns:
        Scalar, at most 1.

    Raises:
        ValueError: the images have another shape, are fewer than two, or a side is below 11 pixels (MS-SSIM: 176).
    """
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure,
        structural_similarity_index_measure,
    )

    if images.dim() != 4 or len(images) < 2:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (N, C, H, W) with N at least 2.")
    smallest = MS_SSIM_SIDE if multiscale else SSIM_SIDE
    if min(images.shape[-2:]) < smallest:
        raise ValueError(
            f"images of {images.shape[-2]} x {images.shape[-1]} pixels are too small for "
            f"{'MS-SSIM' if multiscale else 'SSIM'}, which needs sides of at least {smallest}."
        )
    similarity = multiscale_structural_similarity_index_measure if multiscale else structural_similarity_index_measure
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    count = min(num_pairs, len(images) // 2)
    firsts, seconds = images[order[:count]].float(), images[order[count : 2 * count]].float()
    values = [
        cast(Tensor, similarity(first, second, data_range=1.0, reduction="none")).reshape(-1)
        for first, second in zip(torch.split(firsts, _CHUNK), torch.split(seconds, _CHUNK), strict=True)
    ]
    return torch.cat(values).mean()
