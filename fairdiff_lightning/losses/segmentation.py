"""Losses of a segmentation network's logits against a mask of class indices."""

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.nn import functional as F


class _FullPrecisionDiceCE(DiceCELoss):  # type: ignore[misc]  # MONAI is not followed by mypy
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = super().forward(input.to(torch.promote_types(input.dtype, torch.float32)), target)
        return loss


def dice_ce_loss(ce_weight: float = 0.5, dice_weight: float = 0.5, dice_background: bool = True) -> nn.Module:
    """Weighted sum of cross-entropy and soft Dice, as TransUNet, FairSeg and dMoE train with.

    Cross-entropy is the mean over all pixels. Dice takes the softmax, sums each class over the whole batch and has
    squares in its denominator: ``1 - (2 sum(p t) + 1e-5) / (sum(p^2) + sum(t^2) + 1e-5)``, mean over the
    classes. Sums are in float32 under mixed precision, where bfloat16 would lose small structures.

    Args:
        ce_weight: factor of the cross-entropy; 0.2 for SAMed.
        dice_weight: factor of the Dice loss; 0.8 for SAMed.
        dice_background: count the background as a class of the Dice loss, as the papers' code for pictures does; False
            for what dMoE trains with on volumes. The cross-entropy sees it in any case.

    Returns:
        MONAI's ``DiceCELoss``, called with logits (B, K, ...) and mask (B, 1, ...) of class indices, giving a scalar.
    """
    return _FullPrecisionDiceCE(
        include_background=dice_background,
        to_onehot_y=True,
        softmax=True,
        squared_pred=True,
        batch=True,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
        lambda_ce=ce_weight,
        lambda_dice=dice_weight,
    )


class FocalLoss(nn.Module):
    """Softmax focal loss, mean over pixels.

    ``-alpha_c (1 - p_c)^gamma log p_c`` with c the true class; Lin et al., ICCV 2017, equation 5. It equals K times
    MONAI's ``FocalLoss(use_softmax=True)``, which averages over the K classes too, without its one-hot tensor and
    its device synchronisation.

    Args:
        alpha: weight of background pixels, in [0, 1]; all other classes have ``1 - alpha``.
        gamma: how strongly well classified pixels are discounted; 0 is a weighted cross-entropy.
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the scalar loss of logits (B, K, ...) against class indices (B, 1, ...)."""
        target = mask.squeeze(1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cross_entropy = F.cross_entropy(logits, target, reduction="none")
        weight = torch.where(target == 0, self.alpha, 1 - self.alpha)
        return (weight * (1 - torch.exp(-cross_entropy)) ** self.gamma * cross_entropy).mean()
