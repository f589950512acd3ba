"""Segmentation networks by name, with checked arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import nn

TransUNetName = Literal["vit_b16", "r50_vit_b16", "tiny"]
MonaiName = Literal["unet", "attention_unet"]
NetworkName = Literal[TransUNetName, MonaiName]

_PYRAMID: dict[str, Any] = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)}
_MONAI: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("UNet", {**_PYRAMID, "num_res_units": 2}),
    "attention_unet": ("AttentionUnet", _PYRAMID),
}


def build_network(
    name: str,
    in_channels: int,
    num_classes: int,
    image_size: int | tuple[int, int],
    arguments: Mapping[str, Any],
) -> nn.Module:
    """Build a network that maps images (B, C, H, W) to logits (B, K, H, W).

    Args:
        name: a variant of :class:`~fairdiff_lightning.networks.TransUNet`, or a network of MONAI.
        in_channels: channels of the image.
        num_classes: number of classes, the background included.
        image_size: side, or height and width, of the image; only transformers need it.
        arguments: further arguments of the network's class; they win over our defaults.

    Raises:
        ValueError: for an unknown name or argument, with those that there are.
    """
    cls: type[nn.Module]
    if name in get_args(TransUNetName):
        from fairdiff_lightning.networks.transunet import TransUNet

        cls, fixed = TransUNet, {"variant": name, "image_size": image_size}
        fixed |= {"in_channels": in_channels, "num_classes": num_classes}
        defaults: dict[str, Any] = {}
    elif name in _MONAI:
        from monai.networks import nets

        class_name, defaults = _MONAI[name]
        cls, fixed = getattr(nets, class_name), {"spatial_dims": 2}
        fixed |= {"in_channels": in_channels, "out_channels": num_classes}
    else:
        names = ", ".join((*get_args(TransUNetName), *_MONAI))
        raise ValueError(f"network {name!r} is not known; choose one of {names}.")
    accepted = set(inspect.signature(cls).parameters) - fixed.keys()
    unknown = sorted(set(arguments) - accepted)
    if unknown:
        raise ValueError(f"network {name!r} takes no argument {unknown}; it takes {', '.join(sorted(accepted))}.")
    return cls(**fixed, **{**defaults, **arguments})
