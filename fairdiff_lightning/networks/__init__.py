"""Networks as plain modules, usable without Lightning; names load on first use, timm with them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairdiff_lightning.networks.checkpoint import CheckpointMismatchError, LoadReport
    from fairdiff_lightning.networks.moe import DistributionAwareMoE, GroupRouter
    from fairdiff_lightning.networks.transunet import TransUNet

__all__ = ["CheckpointMismatchError", "DistributionAwareMoE", "GroupRouter", "LoadReport", "TransUNet"]

_HOME = {
    "CheckpointMismatchError": "checkpoint",
    "DistributionAwareMoE": "moe",
    "GroupRouter": "moe",
    "LoadReport": "checkpoint",
    "TransUNet": "transunet",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
