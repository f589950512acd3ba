"""Networks that LeFusion can be trained with: its own, and MONAI's diffusion U-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fairdiff_lightning.networks.lesion_blocks import choose
from fairdiff_lightning.networks.lesion_unet import Conditioning, LesionUNet

Backbone = Literal["lesion_unet", "diffusion_unet"]


class VolumeUNet(nn.Module):
    """MONAI's ``DiffusionModelUNet`` in three dimensions, which halves the depth too, called as :class:`LesionUNet` is.

    Args:
        channels: of the noisy volume.
        out_channels: of the prediction.
        width: channels at full resolution.
        multipliers: of the width at each level; all levels but the last halve all sides.
        cond_dim: length of the condition, which the voxels of the last level attend to; None for no condition.
        **arguments: further arguments of MONAI's class, which win over ours.

    Shapes:
        noisy (B, C, H, W, D), sides multiples of :attr:`strides`; steps (B,) or (); condition (B, cond_dim); output
        (B, out_channels, H, W, D).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        cond_dim: int | None = 16,
        **arguments: Any,
    ) -> None:
        super().__init__()
        from monai.networks.nets import DiffusionModelUNet

        levels = len(multipliers)
        settings: dict[str, Any] = {
            "num_res_blocks": 2,
            "channels": [width * m for m in multipliers],
            "attention_levels": [False] * (levels - 1) + [True],
            "norm_num_groups": 8,
            "num_head_channels": 32 if width * multipliers[-1] % 32 == 0 else width * multipliers[-1],
        }
        if cond_dim:
            settings |= {"with_conditioning": True, "cross_attention_dim": cond_dim}
        self.network = DiffusionModelUNet(3, channels, out_channels, **{**settings, **arguments})
        self.null_condition = nn.Parameter(torch.randn(1, cond_dim)) if cond_dim else None
        self.strides = (2 ** (levels - 1),) * 3

    def forward(
        self, noisy: Tensor, steps: Tensor, condition: Tensor | None = None, dropped: Tensor | None = None
    ) -> Tensor:
        """Predict the noise of ``noisy``; arguments as of :meth:`LesionUNet.forward`."""
        context = None
        if self.null_condition is not None:
            context = choose(self.null_condition, condition, dropped, len(noisy))[:, None]
        predicted: Tensor = self.network(noisy, steps.expand(len(noisy)), context)
        return predicted

    def load_reference_weights(self, source: object, weights: str = "raw") -> Any:
        """Refuse: the authors' weights are of their own network.

        Raises:
            TypeError: always.
        """
        raise TypeError("the authors published no weights for MONAI's network; use backbone='lesion_unet'.")


def build_lesion_network(
    backbone: Backbone,
    channels: int,
    out_channels: int,
    *,
    width: int,
    multipliers: Sequence[int],
    cond_dim: int | None,
    conditioning: Conditioning = "film",
    checkpointing: bool = False,
    arguments: Mapping[str, Any] | None = None,
    image_size: Sequence[int],
) -> LesionUNet | VolumeUNet:
    """Build a noise predictor for volumes of a size.

    Raises:
        ValueError: for an unknown name, sides that the network cannot halve, or what MONAI's network does not have.
    """
    given = dict(arguments or {})
    network: LesionUNet | VolumeUNet
    if backbone == "lesion_unet":
        settings: dict[str, Any] = {"conditioning": conditioning, "checkpointing": checkpointing}
        network = LesionUNet(channels, out_channels, width, multipliers, cond_dim, **settings, **given)
    elif backbone != "diffusion_unet":
        raise ValueError(f"backbone {backbone!r}; expected is 'lesion_unet' or 'diffusion_unet'.")
    elif checkpointing or (cond_dim and conditioning == "film"):
        raise ValueError(
            "backbone='diffusion_unet' has no gradient_checkpointing and takes its condition by "
            "conditioning='cross_attention' alone."
        )
    else:
        network = VolumeUNet(channels, out_channels, width, multipliers, cond_dim, **given)
    if any(side % step for side, step in zip(image_size, network.strides, strict=True)):
        raise ValueError(
            f"image_size {tuple(image_size)}: sides are halved {len(multipliers) - 1} times; give multiples of "
            f"{network.strides}, or fewer multipliers."
        )
    return network
