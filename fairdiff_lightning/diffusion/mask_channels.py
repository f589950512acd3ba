"""Masks as continuous channels that are diffused like images, and back."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Decode = Literal["absolute", "relative"]
_CUTS = {2: (0.75,), 3: (1 / 3, 7 / 8)}  # of PIG, as shares of a channel's own range


def encode_mask(mask: Tensor, num_classes: int, ordinal: bool = False) -> Tensor:
    """Channels in [-1, 1] that say the class of each pixel.

    Args:
        mask: (B, 1, H, W) class indices, 0 the background.
        num_classes: the background included.
        ordinal: one channel with evenly spaced levels, as PIG has it, for classes that are degrees of one thing;
            otherwise one channel for each foreground class.

    Returns:
        (B, num_classes - 1, H, W) float32 of -1 and 1; (B, 1, H, W) when ``ordinal``.
    """
    if ordinal:
        return mask.float() * 2 / (num_classes - 1) - 1
    classes = torch.arange(1, num_classes, device=mask.device).view(1, -1, 1, 1)
    return (mask == classes).float() * 2 - 1


def decode_mask(channels: Tensor, num_classes: int, method: Decode = "absolute", ordinal: bool = False) -> Tensor:
    """The mask that channels of :func:`encode_mask`, or estimates of them, show.

    Args:
        channels: as :func:`encode_mask` makes them.
        num_classes: the background included.
        method: ``absolute`` takes the nearest level, or the largest channel that is above 0; a mask may come out empty.
            ``relative`` is PIG's, see :func:`relative_levels`: every sample has a lesion, which loses a pixel of its
            border.
        ordinal: how the classes were encoded.

    Returns:
        (B, 1, H, W) int64.

    Raises:
        ValueError: for another method, or ``relative`` levels of more than three classes.
    """
    if method not in get_args(Decode):
        raise ValueError(f"decode {method!r}; expected is {' or '.join(get_args(Decode))}.")
    if ordinal:
        found = channels.clamp(-1, 1) if method == "absolute" else relative_levels(channels, num_classes)
        return ((found + 1) / 2 * (num_classes - 1)).round().long()
    found = channels if method == "absolute" else relative_levels(channels)
    strongest = channels.masked_fill(found <= 0, -torch.inf)
    value, index = strongest.max(1, keepdim=True)
    return torch.where(value > -torch.inf, index + 1, 0)


def relative_levels(channels: Tensor, levels: int = 2) -> Tensor:
    """PIG's discrete levels (``mask_to_discrete``): smoothed over 5 x 5 and cut within each channel's own range.

    Args:
        channels: (B, C, H, W).
        levels: 2 for -1 and 1; 3 for -1, 0 and 1.

    Returns:
        The same shape and type.

    Raises:
        ValueError: for another number of levels.
    """
    if levels not in _CUTS:
        raise ValueError(f"{levels} relative levels; expected are 2 or 3. Decode more classes by method='absolute'.")
    smooth = F.avg_pool2d(channels.clamp(-1, 1), 5, stride=1, padding=2, count_include_pad=False)
    low, high = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    cuts = [share * high + (1 - share) * low for share in _CUTS[levels]]
    if levels == 2:
        return torch.where(smooth > cuts[0], 1.0, -1.0).to(channels)
    return (smooth >= cuts[0]).to(channels) + (smooth > cuts[1]).to(channels) - 1
