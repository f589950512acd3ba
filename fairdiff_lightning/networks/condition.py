"""What a ControlNet sees of a mask: one channel for each class, or a colour for each."""

from __future__ import annotations

import colorsys
from functools import cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = (5**0.5 - 1) / 2


@cache
def palette(num_classes: int) -> tuple[tuple[float, float, float], ...]:
    """Colours of the classes, RGB in [0, 1]: FairDiff's white, red and blue, then green and further hues."""
    first = ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0))
    others = (colorsys.hsv_to_rgb((0.1 + GOLDEN * k) % 1, 1, 0.75 if k % 2 else 0.4) for k in range(num_classes))
    return (*first, *others)[:num_classes]


def check_labels(mask: Tensor, num_classes: int, size: tuple[int, int], where: str, any_aspect: bool = False) -> None:
    """Check a mask that images of ``size`` are wanted for; this reads its classes from the device.

    Raises:
        ValueError: for a wrong shape, another aspect ratio or a class that there is not.
    """
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(f"{where} has shape {tuple(mask.shape)}; expected is (B, 1, H, W).")
    height, width = mask.shape[-2:]
    if not any_aspect and height * size[1] != width * size[0]:
        raise ValueError(
            f"{where} is {height} x {width}, and image_size {size} has another aspect ratio: crop or pad the mask "
            "first; resizing would deform it."
        )
    if int(mask.min()) < 0 or int(mask.max()) >= num_classes:
        raise ValueError(
            f"{where} holds classes {sorted(set(mask.flatten().tolist()))}; expected are 0 to {num_classes - 1}."
        )


def resize_labels(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize class indices (B, 1, H, W) to (B, 1, *size) by the nearest pixel centre."""
    if tuple(mask.shape[-2:]) == tuple(size):
        return mask
    return F.interpolate(mask.to(torch.float32), size, mode="nearest-exact").to(mask.dtype)


def one_hot(mask: Tensor, num_classes: int) -> Tensor:
    """Class indices (B, 1, H, W) as float32 channels (B, K, H, W)."""
    classes = torch.arange(num_classes, device=mask.device).view(-1, 1, 1)
    return (mask == classes).to(torch.float32)


def colours(mask: Tensor, num_classes: int) -> Tensor:
    """Class indices (B, 1, H, W) as RGB (B, 3, H, W) in [0, 1] by :func:`palette`."""
    table = torch.tensor(palette(num_classes), device=mask.device)
    return table[mask[:, 0]].permute(0, 3, 1, 2).contiguous()


def blended_colours(mask: Tensor, num_classes: int, size: tuple[int, int]) -> Tensor:
    """Colours as FairDiff's code makes them: an 8-bit picture resized bilinearly, so that borders have mixed colours.

    For parity only (card check cn04): the mixed colours are of no class, and leave a seam when they are read back.

    Args:
        mask: class indices (B, 1, H, W).
        num_classes: number of classes, the background included.
        size: height and width of the result, pixels.

    Returns:
        RGB (B, 3, *size) in [0, 1].
    """
    pictures = (colours(mask, num_classes) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    resized = np.stack([cv2.resize(p, size[::-1], interpolation=cv2.INTER_LINEAR) for p in pictures])
    return torch.from_numpy(resized).to(mask.device, torch.float32).permute(0, 3, 1, 2) / 255
