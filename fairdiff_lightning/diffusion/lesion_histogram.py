"""Grey-level histograms of lesions, LeFusion's control of texture."""

from __future__ import annotations

from collections.abc import Sequence

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


def check_histograms(histograms: Tensor, present: Tensor, bins: int, names: Sequence[str]) -> None:
    """Check that histograms are shares: finite, none below 0, and of sum 1 for each class that is there.

    Args:
        histograms: (B, K * bins), as :func:`lesion_histogram` gives them, flattened.
        present: (B, K) bool, the classes that have voxels; rows of the others may be zeros.
        bins: of each class.
        names: of the samples, for the message.

    Raises:
        ValueError: naming the first sample that is wrong, with what was found.
    """
    count, classes = present.shape
    expected = f"expected are shares of {bins} bins for each of {classes} classes, from 0 on and of sum 1 in each class"
    if histograms.shape != (count, classes * bins):
        raise ValueError(
            f"the textures of {', '.join(names[:5])} have shape {tuple(histograms.shape)}, not "
            f"{(count, classes * bins)}; {expected}."
        )
    rows, named = histograms.float().cpu().view(count, classes, bins), present.cpu()
    sums, odd = rows.sum(-1), ~(rows.isfinite() & (rows >= 0)).all(-1)
    wrong = odd | (named & ((sums - 1).abs() > 1e-3))
    if wrong.any():
        sample, lesion_class = wrong.nonzero()[0].tolist()
        found = "a value that is not finite or below 0" if odd[sample, lesion_class] else "that sum"
        raise ValueError(
            f"the texture of '{names[sample]}' has, for lesion class number {lesion_class}, {found} "
            f"({rows[sample, lesion_class].min():g} to {rows[sample, lesion_class].max():g}, sum "
            f"{sums[sample, lesion_class]:g}); {expected}. Take them from `module.histograms(batch)`, or divide by the "
            "sum."
        )


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
