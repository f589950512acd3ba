"""One network for each lesion class, LeFusion's separate models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fairdiff_lightning.networks.lesion_backbones import Backbone, VolumeUNet, build_lesion_network
from fairdiff_lightning.networks.lesion_unet import LesionUNet

Decomposition = Literal["joint", "separate"]


class ClassNetworks(nn.Module):
    """Noise predictors of one lesion class each; none sees the channel or the histogram of another class.

    LeFusion-S of Zhang et al., ICLR 2025, arXiv:2403.14066, in one module.

    Args:
        networks: of one channel, in the order of the classes.

    Shapes:
        noisy (B, K, H, W, D) for K classes; steps (B,) or (); condition (B, K * bins); output as ``noisy``.
    """

    def __init__(self, networks: Iterable[LesionUNet | VolumeUNet]) -> None:
        super().__init__()
        built = list(networks)
        self.networks, self.strides = nn.ModuleList(built), built[0].strides

    def forward(
        self, noisy: Tensor, steps: Tensor, condition: Tensor | None = None, dropped: Tensor | None = None
    ) -> Tensor:
        """Predict the noise of each channel; arguments as of :meth:`LesionUNet.forward`."""
        count = len(self.networks)
        conditions: Sequence[Tensor | None] = [None] * count if condition is None else condition.chunk(count, 1)
        parts = zip(self.networks, noisy.chunk(count, 1), conditions, strict=True)
        return torch.cat([network(channel, steps, own, dropped) for network, channel, own in parts], 1)

    def load_reference_weights(self, source: object, weights: str = "raw") -> Any:
        """Refuse: the authors' weights are of one network for all classes.

        Raises:
            TypeError: always.
        """
        raise TypeError("the authors published no weights of separate networks; use decomposition='joint'.")


def build_class_networks(
    decomposition: Decomposition, backbone: Backbone, count: int, *, bins: int | None, **arguments: Any
) -> LesionUNet | VolumeUNet | ClassNetworks:
    """Build one noise predictor with a channel for each of ``count`` lesion classes, or one predictor for each.

    Args:
        decomposition: ``joint`` or ``separate``.
        backbone: see :func:`~fairdiff_lightning.networks.lesion_backbones.build_lesion_network`.
        count: lesion classes.
        bins: of the histogram of each class; None for no condition.
        **arguments: further arguments of :func:`~fairdiff_lightning.networks.lesion_backbones.build_lesion_network`.

    Raises:
        ValueError: for another decomposition, and as that function.
    """
    if decomposition not in get_args(Decomposition):
        raise ValueError(f"decomposition={decomposition!r}; expected is {' or '.join(get_args(Decomposition))}.")

    def build(channels: int) -> LesionUNet | VolumeUNet:
        length = None if bins is None else channels * bins
        return build_lesion_network(backbone, channels, channels, cond_dim=length, **arguments)

    return build(count) if decomposition == "joint" else ClassNetworks(build(1) for _ in range(count))


def networks_of(network: LesionUNet | VolumeUNet | ClassNetworks) -> Sequence[nn.Module]:
    """The networks that paint one after the other, each its own share of the lesion classes."""
    return list(network.networks) if isinstance(network, ClassNetworks) else [network]
