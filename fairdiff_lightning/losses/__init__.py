"""Segmentation, fairness and expert-balance losses on plain tensors; names load on first use, MONAI with them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairdiff_lightning.losses.balance import cv_squared, load_balance_loss
    from fairdiff_lightning.losses.febs import FEBSLoss
    from fairdiff_lightning.losses.segmentation import FocalLoss, dice_ce_loss

__all__ = ["FEBSLoss", "FocalLoss", "cv_squared", "dice_ce_loss", "load_balance_loss"]

_HOME = {
    "FEBSLoss": "febs",
    "FocalLoss": "segmentation",
    "cv_squared": "balance",
    "dice_ce_loss": "segmentation",
    "load_balance_loss": "balance",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
