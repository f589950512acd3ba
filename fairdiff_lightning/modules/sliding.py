"""Sliding windows over images and volumes, each of which knows the group of its own image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Segment = Callable[[Tensor, Tensor | None], Tensor]
"""Logits (N, K, H, W[, D]) of images (N, C, H, W[, D]) of groups (N,)."""


def slide(
    segment: Segment,
    image: Tensor,
    group: Tensor | None,
    roi_size: int | Sequence[int],
    overlap: float,
    batch_size: int,
) -> Tensor:
    """Logits of images by windows that overlap, blended by a Gaussian (MONAI).

    Args:
        segment: of windows and their groups.
        image: (B, C, H, W[, D]).
        group: (B,); None where nothing looks at it.
        roi_size: side, or height and width (and depth), of a window.
        overlap: share of a window that the next one covers again.
        batch_size: windows at a time, of several images where these have fewer.

    Returns:
        (B, K, H, W[, D]).
    """
    from monai.inferers import sliding_window_inference

    def segment_windows(windows: Tensor) -> Tensor:
        if group is None:
            found = segment(windows, None)
        else:
            found = segment(windows[:, :-1], read_group_channel(windows[:, -1]))
        return found.to(image.dtype)  # the blending is not rounded as mixed precision rounds logits

    carried = image if group is None else torch.cat([image, group_channel(group, image)], 1)
    logits: Tensor = sliding_window_inference(carried, roi_size, batch_size, segment_windows, overlap, mode="gaussian")
    return logits


def group_channel(group: Tensor, image: Tensor) -> Tensor:
    """The group as a constant channel; padding adds zeros, so indices are stored plus two."""
    return (group + 2).to(image.dtype).view(-1, *[1] * (image.dim() - 1)).expand(-1, 1, *image.shape[2:])


def read_group_channel(channel: Tensor) -> Tensor:
    """Groups (N,) of windows (N, H, W[, D]) of a :func:`group_channel`."""
    return channel.flatten(1).amax(1).round().to(torch.int64) - 2
