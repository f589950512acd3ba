"""Networks as plain modules, usable without Lightning; names load on first use, timm with them."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fairdiff_lightning.networks.checkpoint import CheckpointMismatchError, LoadReport
    from fairdiff_lightning.networks.lesion_unet import LesionUNet
    from fairdiff_lightning.networks.moe import DistributionAwareMoE, GroupRouter
    from fairdiff_lightning.networks.point_vae import PointVAE
    from fairdiff_lightning.networks.transunet import TransUNet

__all__ = [
    "CheckpointMismatchError",
    "DistributionAwareMoE",
    "GroupRouter",
    "LesionUNet",
    "LoadReport",
    "PointVAE",
    "TransUNet",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoint": ["CheckpointMismatchError", "LoadReport"],
        "lesion_unet": ["LesionUNet"],
        "moe": ["DistributionAwareMoE", "GroupRouter"],
        "point_vae": ["PointVAE"],
        "transunet": ["TransUNet"],
    },
)
