"""Grey-level histograms of lesions, LeFusion's control of texture."""

from __future__ import annotations

import torch
from torch import Tensor


def lesion_histogram(image: Tensor, mask: Tensor, bins: int = 16) -> Tensor:
    """Shares of a lesion's voxels in equal bins of intensity on [-1, 1], the last one closed.

    Args:
        image: (B, 1, *S) or (B, K, *S) in [-1, 1]; what is outside counts in the first or last bin.
        mask: (B, K, *S), other than 0 in the voxels of class k (see
            :func:`~fairdiff_lightning.diffusion.lesion_channels.class_masks`).
        bins: number of bins.

    Returns:
        (B, K, bins) float32, each row of sum 1; zeros for a class without voxels. Networks take ``.flatten(1)``.

    Raises:
        ValueError: for shapes that do not fit.
    """
    fits = image.dim() == mask.dim() and image.shape[1] in (1, mask.shape[1])
    if not fits or image.shape[0] != mask.shape[0] or image.shape[2:] != mask.shape[2:]:
        raise ValueError(
            f"image has shape {tuple(image.shape)} and mask {tuple(mask.shape)}; expected are the same, or one channel "
            "in the image."
        )
    inside = (mask != 0).flatten(2)
    place = ((image.float().flatten(2) + 1) / 2 * bins).long().clamp(0, bins - 1).expand(inside.shape)
    counts = inside.new_zeros(*inside.shape[:2], bins, dtype=torch.float32).scatter_add_(2, place, inside.float())
    return counts / inside.sum(2, keepdim=True).clamp(min=1)


def jitter(histogram: Tensor, noise: Tensor, amount: float = 0.1, renormalise: bool = True) -> Tensor:
    """A histogram with every bin changed by up to a share of itself; empty bins stay empty.

    Args:
        histogram: (..., bins).
        noise: standard normal, of a shape that broadcasts to it; one row of noise for a batch is LeFusion's way.
        amount: largest relative change of a bin.
        renormalise: scale the result back to the sum of ``histogram``; LeFusion's code does not.

    Returns:
        The same shape.
    """
    centred = noise - noise.mean(-1, keepdim=True)
    tiny = torch.finfo(noise.dtype).tiny
    changed = histogram * (1 + amount * centred / centred.abs().amax(-1, keepdim=True).clamp(min=tiny))
    if not renormalise:
        return changed
    return changed * (histogram.sum(-1, keepdim=True) / changed.sum(-1, keepdim=True).clamp(min=tiny))
