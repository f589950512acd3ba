"""The U-Net of a diffusion that another one guides: the noisy state and the guide, channel by channel."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fairdiff_lightning.networks.checkpoint import LoadReport, Source, load_strictly
from fairdiff_lightning.networks.group_norm import replace_group_norms

WIDTHS = (32, 32, 64, 64, 128, 128)
"""Channels of each level in PIG's code; all but the last halve the side."""


class GuidedUNet(nn.Module):
    """Noise predictor of PIG: diffusers' ``UNet2DModel`` on the state and what guides it, beside each other.

    Zhang et al., *Paired Image Generation with Diffusion-Guided Diffusion Models*, MICCAI 2025,
    figure 2. At the default sizes it is the network of the authors' code: 7,125,409 parameters, attention at the
    lowest level alone.

    Args:
        channels: of the noisy state.
        guide_channels: of the guide.
        image_size: side, or height and width, of the images, pixels; multiples of 2 to the number of levels but one.
        widths: channels of each level.
        num_groups: attribute -> number of its groups, to condition on; None for no such condition.

    Shapes:
        noisy (B, C, H, W); guide (B, G, H, W); steps (B,) or (); groups attribute -> (B,) int64, -1 for unknown or any;
        output (B, C, H, W).

    Raises:
        ValueError: when the image cannot be halved so often.
    """

    def __init__(
        self,
        channels: int = 1,
        guide_channels: int = 1,
        image_size: int | tuple[int, int] = 512,
        widths: Sequence[int] = WIDTHS,
        num_groups: Mapping[str, int] | None = None,
    ) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        halvings = len(widths) - 1
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        if any(side % 2**halvings for side in sides):
            raise ValueError(
                f"image_size {image_size} cannot be halved {halvings} times, as {len(widths)} widths ask for; take a "
                f"multiple of {2**halvings} or fewer widths."
            )
        self.unet: Any = UNet2DModel(  # type: ignore[no-untyped-call]
            sample_size=sides,
            in_channels=channels + guide_channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            layers_per_block=2,
            down_block_types=("DownBlock2D",) * halvings + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * halvings,
            norm_num_groups=math.gcd(32, *widths),
            norm_eps=1e-6,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            attention_head_dim=None,
            class_embed_type="identity" if num_groups else None,
        )
        rows = {name: nn.Embedding(count + 1, 4 * widths[0]) for name, count in (num_groups or {}).items()}
        self.groups = nn.ModuleDict(rows)
        self._in_format: list[nn.Module] = []

    def use_channels_last(self) -> None:
        """Keep weights and activations in channels-last order, also where diffusers leaves it while training."""
        from diffusers.models.resnet import ResnetBlock2D

        self.unet.to(memory_format=torch.channels_last)
        replace_group_norms(self.unet)
        blocks = [m for m in self.unet.modules() if isinstance(m, ResnetBlock2D)]
        self._in_format = [block for block in blocks if block.conv_shortcut is not None]
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch to training; blocks with a shortcut are told nothing of it: they would copy to another order."""
        super().train(mode)
        for block in self._in_format:
            block.training = False
        return self

    def forward(
        self, noisy: Tensor, guide: Tensor, steps: Tensor, groups: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Predict the noise of ``noisy``."""
        condition = self._embedded(len(noisy), groups or {}) if self.groups else None
        predicted: Tensor = self.unet(torch.cat([noisy, guide], 1), steps, condition, return_dict=False)[0]
        return predicted

    def load_reference_weights(self, source: Source) -> LoadReport:
        """Load a checkpoint of the authors' code, with or without the optimizer and epoch that it keeps beside.

        Raises:
            CheckpointMismatchError: naming every missing, unexpected or misshapen tensor.
        """
        return load_strictly(source, self.reference_tensors())

    def reference_tensors(self) -> dict[str, Tensor]:
        """The U-Net's own tensors under the names and shapes that the authors' code gives them."""
        levels = len(self.unet.config.block_out_channels)
        named = ((reference_name(name, levels), tensor) for name, tensor in self.unet.state_dict().items())
        return {name: t[..., None, None] if _is_matrix_of_attention(name, t) else t for name, t in named}

    def _embedded(self, size: int, groups: Mapping[str, Tensor]) -> Tensor:
        """Sum (B, E) of the attributes' embeddings; the last row of each is for unknown groups."""
        device = self.unet.device
        unknown = torch.full((size,), -1, device=device)
        chosen = [
            table(torch.where(group < 0, cast(nn.Embedding, table).num_embeddings - 1, group))
            for name, table in self.groups.items()
            for group in (groups.get(name, unknown),)
        ]
        total: Tensor = torch.stack(chosen).sum(0)
        return total


_RENAMED = (
    (r"^time_embedding\.linear_1", "temb.dense.0"),
    (r"^time_embedding\.linear_2", "temb.dense.1"),
    (r"^down_blocks\.(\d+)\.", r"down.\1."),
    (r"^mid_block\.resnets\.0", "mid.block_1"),
    (r"^mid_block\.resnets\.1", "mid.block_2"),
    (r"^mid_block\.attentions\.0", "mid.attn_1"),
    (r"^conv_norm_out", "norm_out"),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.downsamplers\.0", ".downsample"),
    (r"\.upsamplers\.0", ".upsample"),
    (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def reference_name(name: str, levels: int) -> str:
    """The authors' name of a tensor of ``UNet2DModel``; their levels count from the top on the way up too."""
    name = re.sub(r"^up_blocks\.(\d+)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", name)
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _is_matrix_of_attention(name: str, tensor: Tensor) -> bool:
    return bool(re.search(r"\.attn(_1|\.\d+)\.", name)) and tensor.dim() == 2
