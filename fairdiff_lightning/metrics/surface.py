"""Distances between the surfaces of predicted and true masks, from MONAI's surface distances."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairdiff_lightning.metrics.grouped import GroupedMaskScores

SurfaceEmptyPolicy = Literal["skip", "reference"]


class SurfaceScores(NamedTuple):
    """Scores per image and foreground class, each (B, num_classes - 1)."""

    hausdorff95: Tensor
    average_distance: Tensor
    symmetric_distance: Tensor
    surface_dice: Tensor


def surface_scores(
    pred: Tensor,
    target: Tensor,
    num_classes: int,
    spacing: Sequence[float] | None = None,
    tolerance: float = 5.0,
    empty: SurfaceEmptyPolicy = "skip",
) -> SurfaceScores:
    """Surface distances of each image and foreground class.

    ``hausdorff95`` is the 95th percentile of the distances in both directions taken together, as MedPy (and so FairSeg
    and dMoE) defines it; MONAI's metric takes the larger of the two directions' percentiles, which is never lower.
    ``average_distance`` is the mean distance from the predicted to the true surface, ``symmetric_distance`` (ASSD) the
    mean over both directions' distances taken together. ``surface_dice`` is the share of both surfaces within the
    tolerance of the other (NSD).

    =============  ===================  ===================================  ==============================
    ``empty``      score                both empty                           one empty
    =============  ===================  ===================================  ==============================
    ``skip``       distances            NaN                                  diagonal of the image
    ``reference``  distances            0                                    0
    either         surface Dice         NaN                                  0
    =============  ===================  ===================================  ==============================

    The diagonal, the BraTS convention, keeps a missed structure from being rewarded.

    Args:
        pred: class indices (B, 1, ...) or (B, ...), 2-D or 3-D.
        target: the same, of the same size.
        num_classes: number of classes, the background (0) included.
        spacing: size of a pixel along each axis; 1 by default, distances then being in pixels.
        tolerance: of the surface Dice, in the unit of ``spacing``.
        empty: policy of the table above.
    """
    pred, target = (mask.flatten(0, 1) if mask.shape[1] == 1 else mask for mask in (pred, target))
    if pred.shape != target.shape:
        raise ValueError(f"pred has shape {tuple(pred.shape)} and target {tuple(target.shape)}, expected the same.")
    foreground = range(1, num_classes)
    scores = torch.stack(
        [
            torch.stack([_scores(p == index, t == index, spacing, tolerance, empty) for index in foreground])
            for p, t in zip(pred.cpu(), target.cpu(), strict=True)
        ]
    )
    return SurfaceScores(*scores.to(pred.device).unbind(-1))


def _scores(
    pred: Tensor, target: Tensor, spacing: Sequence[float] | None, tolerance: float, empty: SurfaceEmptyPolicy
) -> Tensor:
    """The four scores (4,) of two binary masks of one image."""
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    present = int(pred.any()) + int(target.any())
    if present < 2:
        size = torch.tensor(pred.shape) * torch.tensor(spacing or [1.0] * pred.dim())
        distance = 0.0 if empty == "reference" else float(size.norm()) if present else torch.nan
        return torch.tensor([distance, distance, distance, 0.0 if present else torch.nan])
    pred_edge, target_edge = get_mask_edges(pred, target)
    outward = get_surface_distance(pred_edge, target_edge, spacing=spacing)
    backward = get_surface_distance(target_edge, pred_edge, spacing=spacing)
    distances = torch.cat([outward, backward])
    near = (distances <= tolerance).float().mean()
    far = torch.tensor(np.percentile(distances.double().numpy(), 95))  # Tensor.quantile takes no more than 2**24
    return torch.stack([far.float(), outward.mean(), distances.mean(), near])


class GroupedHausdorff95(GroupedMaskScores):
    """95th-percentile Hausdorff distance per image, class and group; see :func:`surface_scores`.

    Args:
        num_classes: number of classes, the background included.
        num_groups: number of groups of the attribute.
        spacing: size of a pixel along each axis; 1 by default.
        empty: what an empty mask scores.
        kwargs: of ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(
        self,
        num_classes: int,
        num_groups: int,
        spacing: Sequence[float] | None = None,
        empty: SurfaceEmptyPolicy = "skip",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, num_groups, **kwargs)
        self.spacing = spacing
        self.empty: SurfaceEmptyPolicy = empty

    def score(self, pred: Tensor, target: Tensor) -> Tensor:
        """Distance of each image and foreground class."""
        return surface_scores(pred, target, self.num_classes, self.spacing, empty=self.empty).hausdorff95


class GroupedSurfaceDice(GroupedMaskScores):
    """Normalised surface Dice per image, class and group; see :func:`surface_scores`.

    Args:
        num_classes: number of classes, the background included.
        num_groups: number of groups of the attribute.
        spacing: size of a pixel along each axis; 1 by default.
        tolerance: accepted distance, in the unit of ``spacing``.
        kwargs: of ``torchmetrics.Metric``.
    """

    def __init__(
        self,
        num_classes: int,
        num_groups: int,
        spacing: Sequence[float] | None = None,
        tolerance: float = 5.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, num_groups, **kwargs)
        self.spacing = spacing
        self.tolerance = tolerance

    def score(self, pred: Tensor, target: Tensor) -> Tensor:
        """Surface Dice of each image and foreground class."""
        return surface_scores(pred, target, self.num_classes, self.spacing, self.tolerance).surface_dice
