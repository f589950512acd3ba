"""Segmentation networks by name, with checked arguments and checked image sizes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any, Literal, get_args

from torch import Tensor, nn

TransUNetName = Literal["vit_b16", "r50_vit_b16", "tiny"]
MonaiName = Literal["unet", "attention_unet", "dynunet", "swin_unetr", "unetr", "segresnet"]
NetworkName = Literal[TransUNetName, MonaiName, "resnet_unet", "samed", "resunet3d"]

Sides = tuple[int, ...]
_PYRAMID: dict[str, Any] = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)}
_MAX_HALVINGS, _MIN_SIDE = 4, 4
"""Of nnU-Net's pyramid here: five levels at most, and features of at least four pixels a side."""


@dataclass(frozen=True)
class _Recipe:
    """How a network that halves and restores an image is made.

    Attributes:
        path: of its class.
        defaults: our arguments, given the image's sides and the user's arguments.
        multiples: what each side must be a multiple of, given all arguments and the number of sides.
        one_size: whether it takes images of the size alone that it is made for, its ``img_size``.
        unused: part of the names of weights that it never uses; they are frozen, since DDP waits for every gradient.
    """

    path: str
    defaults: Callable[[Sides, Mapping[str, Any]], dict[str, Any]]
    multiples: Callable[[Mapping[str, Any], int], Sides]
    one_size: bool = False
    unused: str | None = None


def build_network(
    name: str,
    in_channels: int,
    num_classes: int,
    image_size: int | Sequence[int],
    arguments: Mapping[str, Any],
) -> nn.Module:
    """Build a network that maps images (B, C, H, W[, D]) to logits (B, K, H, W[, D]).

    Args:
        name: a variant of :class:`~fairdiff_lightning.networks.TransUNet`; ``samed``
            (:class:`~fairdiff_lightning.networks.samed.SAMed`); ``resunet3d``
            (:class:`~fairdiff_lightning.networks.resunet3d.ResUNet3D`); ``resnet_unet``
            (:class:`~fairdiff_lightning.networks.resnet_unet.ResNetUNet`); or a network of MONAI.
        in_channels: channels of the image.
        num_classes: number of classes, the background included.
        image_size: side, or height and width, of the image; three sides make a network for volumes. Transformers are
            built for this size. ``dynunet`` halves an axis while its side is 8 or more, as nnU-Net does for isotropic
            voxels, four times at most.
        arguments: further arguments of the network's class; they win over our defaults.

    Raises:
        ValueError: for an unknown name or argument, with those that there are; for ``deep_supervision`` of ``dynunet``;
            for sides that the network cannot halve, here and when the network sees an image.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) not in (2, 3):
        raise ValueError(f"image_size must be one side, height and width, or three sides, but is {image_size!r}.")
    cls, fixed = _network_class(name, in_channels, num_classes, sides)
    accepted = set(inspect.signature(cls).parameters) - fixed.keys()
    unknown = sorted(set(arguments) - accepted)
    if unknown:
        raise ValueError(f"network {name!r} takes no argument {unknown}; it takes {', '.join(sorted(accepted))}.")
    if name not in _RECIPES:
        return cls(**fixed, **arguments)
    recipe = _RECIPES[name]
    chosen = {**recipe.defaults(sides, arguments), **arguments}
    multiples = recipe.multiples(chosen, len(sides))
    check_sides(name, multiples, sides)
    network = cls(**fixed, **chosen)
    for key, weight in network.named_parameters():
        if recipe.unused is not None and recipe.unused in key:
            weight.requires_grad_(False)
    network.register_forward_pre_hook(partial(_check_image, name, multiples, sides if recipe.one_size else None))
    return network


def check_sides(name: str, multiples: Sides, sides: Sides) -> None:
    """Check that a network can halve and restore an image.

    Args:
        name: of the network, for the message.
        multiples: what each side must be a multiple of.
        sides: of the image, pixels.

    Raises:
        ValueError: when a side is no multiple, naming the next ones; when all features would shrink to one pixel; or
            when image and network differ in their number of sides.
    """
    if len(sides) != len(multiples):
        raise ValueError(f"network {name!r} is {len(multiples)}-D, but the image has the sides {sides}.")
    for axis, (side, multiple) in enumerate(zip(sides, multiples, strict=True)):
        if side < multiple or side % multiple:
            lower = side // multiple * multiple
            nearest = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
            raise ValueError(
                f"side {axis} of the image has {side} pixels, but network {name!r} needs a multiple of {multiple}: "
                f"resize or pad it to {nearest}. (sides {sides}, multiples {multiples})"
            )
    if sides == multiples:
        raise ValueError(
            f"an image of {sides} pixels shrinks to a single one in network {name!r}, too few for its norms: "
            "at least one side must be twice as large."
        )


def _network_class(
    name: str, in_channels: int, num_classes: int, sides: Sides
) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class, and the arguments that are not the user's."""
    ours = {"in_channels": in_channels, "num_classes": num_classes}
    if name in get_args(TransUNetName):
        from fairdiff_lightning.networks.transunet import TransUNet

        return TransUNet, {"variant": name, "image_size": sides, **ours}
    if name == "samed":
        from fairdiff_lightning.networks.samed import SAMed

        return SAMed, {"image_size": sides, **ours}
    if name == "resunet3d":
        if len(sides) != 3:
            raise ValueError(f"network 'resunet3d' is for volumes: image_size must be three sides, but is {sides}.")
        from fairdiff_lightning.networks.resunet3d import ResUNet3D

        return ResUNet3D, ours
    if name in _RECIPES:
        recipe = _RECIPES[name]
        theirs: dict[str, Any] = {"spatial_dims": len(sides), "in_channels": in_channels, "out_channels": num_classes}
        theirs |= {"img_size": sides} if recipe.one_size else {}
        return resolve_name(recipe.path), theirs if name in get_args(MonaiName) else ours
    names = (*get_args(TransUNetName), *_RECIPES, "samed", "resunet3d")
    raise ValueError(f"network {name!r} is not known; choose one of {', '.join(names)}.")


def _dynunet_defaults(sides: Sides, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Kernels and strides of nnU-Net for isotropic voxels; the filters double from 32 on, up to MONAI's limit.

    Given filters are as many levels as they are, or fewer where the image is too small for so many.

    Raises:
        ValueError: for deep supervision, with which training sees the logits (B, N, K, ...) of several levels.
    """
    if arguments.get("deep_supervision"):
        raise ValueError(
            "network 'dynunet' has deep_supervision=True, with which it returns the logits of several levels when "
            "training, but the losses here take those of the image alone: leave deep_supervision out."
        )
    filters = arguments.get("filters")
    strides = arguments.get("strides") or _nnunet_strides(sides)[: len(filters) if filters else None]
    return {"strides": strides, "kernel_size": (3,) * len(strides), "upsample_kernel_size": tuple(strides[1:])}


def _nnunet_strides(sides: Sides) -> tuple[Sides, ...]:
    """Strides of each level: an axis is halved while half of it is at least four pixels."""
    halvings = [min(_MAX_HALVINGS, max(side // _MIN_SIDE, 1).bit_length() - 1) for side in sides]
    levels = max(halvings)
    if levels < 2:
        raise ValueError(f"network 'dynunet' needs a side of at least {4 * _MIN_SIDE} pixels, but has {sides}.")
    steps = (tuple(2 if level < count else 1 for count in halvings) for level in range(levels))
    return ((1,) * len(sides), *steps)


def _stride_products(arguments: Mapping[str, Any], dims: int) -> Sides:
    """Product of the strides along each axis."""
    levels = [(step,) * dims if isinstance(step, int) else tuple(step) for step in arguments["strides"]]
    wrong = [level for level in levels if len(level) != dims]
    if wrong:
        raise ValueError(f"strides must be numbers or {dims} of them, one for each side, but are {wrong[0]}.")
    return tuple(math.prod(axis) for axis in zip(*levels, strict=True))


def _swin_multiples(arguments: Mapping[str, Any], dims: int) -> Sides:
    return (arguments["patch_size"] ** 5,) * dims


def _segresnet_multiples(arguments: Mapping[str, Any], dims: int) -> Sides:
    return (2 ** (len(arguments["blocks_down"]) - 1),) * dims


def _check_image(
    name: str, multiples: Sides, only: Sides | None, network: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    sides = tuple(inputs[0].shape[2:])
    check_sides(name, multiples, sides)
    if only is not None and sides != only:
        raise ValueError(
            f"an image of {sides} pixels in network {name!r}, which is made for {only}: resize it, or set image_size."
        )


_NETS = "monai.networks.nets"
_RECIPES: dict[str, _Recipe] = {
    "unet": _Recipe(f"{_NETS}.UNet", lambda sides, arguments: {**_PYRAMID, "num_res_units": 2}, _stride_products),
    "attention_unet": _Recipe(f"{_NETS}.AttentionUnet", lambda sides, arguments: _PYRAMID, _stride_products),
    "dynunet": _Recipe(f"{_NETS}.DynUNet", _dynunet_defaults, _stride_products),
    "swin_unetr": _Recipe(f"{_NETS}.SwinUNETR", lambda sides, arguments: {"patch_size": 2}, _swin_multiples),
    "unetr": _Recipe(
        f"{_NETS}.UNETR",
        lambda sides, arguments: {},
        lambda arguments, dims: (16,) * dims,
        one_size=True,
        unused="norm_cross_attn",
    ),
    "segresnet": _Recipe(
        f"{_NETS}.SegResNet", lambda sides, arguments: {"blocks_down": (1, 2, 2, 4)}, _segresnet_multiples
    ),
    "resnet_unet": _Recipe(
        "fairdiff_lightning.networks.resnet_unet.ResNetUNet",
        lambda sides, arguments: {},
        lambda arguments, dims: (32, 32),
    ),
}
