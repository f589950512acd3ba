"""Segmentation, fairness and expert-balance losses on plain tensors; names load on first use, MONAI with them."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fairdiff_lightning.losses.balance import cv_squared, load_balance_loss
    from fairdiff_lightning.losses.febs import FEBSLoss
    from fairdiff_lightning.losses.lesion import lesion_noise_loss
    from fairdiff_lightning.losses.segmentation import FocalLoss, dice_ce_loss

__all__ = ["FEBSLoss", "FocalLoss", "cv_squared", "dice_ce_loss", "lesion_noise_loss", "load_balance_loss"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "balance": ["cv_squared", "load_balance_loss"],
        "febs": ["FEBSLoss"],
        "lesion": ["lesion_noise_loss"],
        "segmentation": ["FocalLoss", "dice_ce_loss"],
    },
)
