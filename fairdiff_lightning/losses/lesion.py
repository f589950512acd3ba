"""The noise loss of a diffusion that learns lesions alone (LeFusion)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Norm = Literal["l1", "l2"]
Normalise = Literal["volume", "lesion"]


def lesion_noise_loss(
    predicted: Tensor, noise: Tensor, mask: Tensor, loss: Norm = "l1", normalise: Normalise = "lesion"
) -> Tensor:
    """Error of predicted noise inside of lesions, one channel for each lesion class, summed over the classes.

    Zhang et al., *LeFusion*, ICLR 2025, arXiv:2403.14066, equation 4, where the error is squared; the authors' code has
    ``loss="l1", normalise="volume"``.

    Args:
        predicted: (B, K, *S).
        noise: (B, K, *S), or what else the network is to predict.
        mask: (B, K, *S) or (B, 1, *S), other than 0 in the voxels that count.
        loss: absolute or squared error.
        normalise: ``lesion`` takes the mean over each lesion's own voxels, then over the samples that have that class,
            so that lesions weigh the same whatever their size; ``volume`` divides by the number of all voxels.

    Returns:
        Scalar, float32 or wider; 0, with zero gradients, where no voxel counts.

    Raises:
        ValueError: for another loss or normalisation, or shapes that do not fit.
    """
    for name, value, known in (("loss", loss, Norm), ("normalise", normalise, Normalise)):
        if value not in get_args(known):
            raise ValueError(f"{name}={value!r}; expected is {' or '.join(get_args(known))}.")
    fits = mask.dim() == predicted.dim() and mask.shape[1] in (1, predicted.shape[1])
    fits = fits and mask.shape[0] == predicted.shape[0] and mask.shape[2:] == predicted.shape[2:]
    if not fits or predicted.shape != noise.shape:
        raise ValueError(
            f"predicted has shape {tuple(predicted.shape)}, noise {tuple(noise.shape)} and mask {tuple(mask.shape)}; "
            "expected are the same, or one channel in the mask."
        )
    wide = torch.promote_types(predicted.dtype, torch.float32)
    difference = predicted.to(wide) - noise.to(wide)
    error = difference.abs() if loss == "l1" else difference.square()
    inside = (mask != 0).expand_as(error).flatten(2)
    error = torch.where(inside, error.flatten(2), 0)
    if normalise == "volume":
        return error.mean((0, 2)).sum()
    voxels = inside.sum(2)
    lesions = error.sum(2) / voxels.clamp(min=1)
    return (lesions.sum(0) / (voxels > 0).sum(0).clamp(min=1)).sum()
