"""Networks as plain modules, usable without Lightning; names load on first use, timm with them."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fairdiff_lightning.networks.checkpoint import CheckpointMismatchError, LoadReport
    from fairdiff_lightning.networks.hed import HED
    from fairdiff_lightning.networks.lesion_unet import LesionUNet
    from fairdiff_lightning.networks.moe import DistributionAwareMoE, GroupRouter
    from fairdiff_lightning.networks.point_vae import PointVAE
    from fairdiff_lightning.networks.resunet3d import ResUNet3D
    from fairdiff_lightning.networks.samed import SAMed
    from fairdiff_lightning.networks.transunet import TransUNet

__all__ = [
    "HED",
    "CheckpointMismatchError",
    "DistributionAwareMoE",
    "GroupRouter",
    "LesionUNet",
    "LoadReport",
    "PointVAE",
    "ResUNet3D",
    "SAMed",
    "TransUNet",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoint": ["CheckpointMismatchError", "LoadReport"],
        "hed": ["HED"],
        "lesion_unet": ["LesionUNet"],
        "moe": ["DistributionAwareMoE", "GroupRouter"],
        "point_vae": ["PointVAE"],
        "resunet3d": ["ResUNet3D"],
        "samed": ["SAMed"],
        "transunet": ["TransUNet"],
    },
)
