"""A U-Net on a ResNet of timm, for pictures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GREY, COLOUR = 1, 3
REDUCTIONS = [2, 4, 8, 16, 32]
"""How much smaller than the image the features of a ResNet are."""


class ResNetUNet(nn.Module):
    """A ResNet whose features, from the deepest to the first, are joined and enlarged to logits.

    Zhang et al., *DiffBoost*, IEEE TMI 2025, have a U-Net "ResNet50", which is an untrained ResNet-34 in their code.

    Args:
        in_channels: channels of the image; a grey one is repeated to three, as in the code.
        num_classes: number of classes, the background included.
        encoder: a model of timm with features at five sizes; ``resnet34`` is the code's, ``resnet50`` the paper's.
        width: channels of the decoder, even.

    Raises:
        ValueError: for an encoder whose features are not at a half, a quarter ... of the image's size.

    Shapes:
        image (B, C, H, W), sides multiples of 32; logits (B, num_classes, H, W).
    """

    def __init__(self, in_channels: int, num_classes: int, encoder: str = "resnet34", width: int = 256) -> None:
        super().__init__()
        import timm

        channels = COLOUR if in_channels == GREY else in_channels
        self.encoder: Any = timm.create_model(encoder, features_only=True, in_chans=channels)
        found = self.encoder.feature_info.reduction()
        if found != REDUCTIONS:
            raise ValueError(
                f"encoder={encoder!r}: its features are smaller than the image by {found}; expected is {REDUCTIONS}, "
                "as 'resnet34' and 'resnet50' have them."
            )
        *skips, deepest = self.encoder.feature_info.channels()
        below = [deepest] + [width] * (len(skips) - 1)
        self.decoder = nn.ModuleList(_Join(b, skip, width) for b, skip in zip(below, reversed(skips), strict=True))
        self.head = nn.ConvTranspose2d(width, num_classes, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W) of images (B, C, H, W)."""
        *skips, found = self.encoder(image.expand(-1, COLOUR, -1, -1) if image.shape[1] == GREY else image)
        for join, skip in zip(self.decoder, reversed(skips), strict=True):
            found = join(found, skip)
        logits: Tensor = self.head(found)
        return logits


class _Join(nn.Module):
    """Deeper features, twice as large, beside the encoder's: half of the channels from each."""

    def __init__(self, below: int, skip: int, width: int) -> None:
        super().__init__()
        self.enlarge = nn.ConvTranspose2d(below, width // 2, 2, stride=2)
        self.project = nn.Conv2d(skip, width // 2, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        joined: Tensor = self.norm(F.relu(torch.cat([self.enlarge(below), self.project(skip)], 1)))
        return joined
