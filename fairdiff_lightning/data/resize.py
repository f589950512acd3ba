"""Centre crop and resize, the same for reading, training and predicting."""

from __future__ import annotations

from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

Resize = Literal["area", "zoom"]
Region = tuple[int, int, int, int]
"""Top, left, height and width, in pixels of the file."""


def centre_region(size: tuple[int, int], crop: int | None) -> Region:
    """The central square of side ``crop``, as far as the image reaches; all of it when ``crop`` is None."""
    height, width = (min(side, crop or side) for side in size)
    return max(size[0] // 2 - height // 2, 0), max(size[1] // 2 - width // 2, 0), height, width


def crop_to(array: NDArray[Any], region: Region) -> NDArray[Any]:
    """Cut the region out of (H, W) or (H, W, C)."""
    top, left, height, width = region
    return array[top : top + height, left : left + width]


def resize_image(image: NDArray[np.uint8], size: tuple[int, int] | None, method: Resize) -> NDArray[Any]:
    """Resize (H, W) or (H, W, C) of 0-255 to channels first (C, *size).

    ``area`` averages when it shrinks, interpolates linearly when it enlarges, and stays uint8. ``zoom`` is the
    reference's cubic spline without smoothing, which overshoots [0, 1], as float32 (dMoE and FairSeg test transform).
    """
    size = size or (image.shape[0], image.shape[1])
    if method == "zoom":
        scaled: NDArray[Any] = image.astype(np.float64 if image.ndim == 3 else np.float32)
        scaled /= 255
        factors = [new / old for new, old in zip(size, image.shape, strict=False)]
        zoomed = ndimage.zoom(scaled, (*factors, *[1.0] * (image.ndim - 2)), order=3)
        return np.ascontiguousarray(_channels_first(zoomed), dtype=np.float32)
    if size != image.shape[:2]:
        shrinks = size[0] < image.shape[0] or size[1] < image.shape[1]
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)  # type: ignore[assignment]
    return np.ascontiguousarray(_channels_first(image))


def resize_mask(mask: NDArray[np.uint8], size: tuple[int, int] | None, method: Resize) -> NDArray[np.uint8]:
    """Resize (H, W) class indices by the nearest pixel centre (``area``) or as the reference does (``zoom``)."""
    if size is None or size == mask.shape:
        return mask
    if method == "zoom":
        factors = [new / old for new, old in zip(size, mask.shape, strict=True)]
        zoomed: NDArray[np.uint8] = ndimage.zoom(mask, factors, order=0)
        return zoomed
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)  # type: ignore[return-value]


def _channels_first(image: NDArray[Any]) -> NDArray[Any]:
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def restore_mask(logits: Tensor, region: Tensor, native_size: Tensor) -> Tensor | list[Tensor]:
    """Turn logits of resized crops into masks at the files' own sizes, background outside the crop.

    Args:
        logits: (B, K, h, w).
        region: (B, 4) top, left, height, width of each crop in its file, pixels.
        native_size: (B, 2) height and width of each file, pixels.

    Returns:
        int64 masks (B, 1, H, W), or a list of (1, H, W) when the files differ in size.
    """
    frames = torch.cat([region, native_size], 1).tolist()
    if all(frame == frames[0] for frame in frames):
        return _restore(logits, *frames[0])
    return [_restore(one[None], *frame)[0] for one, frame in zip(logits, frames, strict=True)]


def _restore(logits: Tensor, top: int, left: int, height: int, width: int, full_h: int, full_w: int) -> Tensor:
    mask = F.interpolate(logits.float(), (height, width), mode="bilinear").argmax(1, keepdim=True)
    return F.pad(mask, (left, full_w - left - width, top, full_h - top - height))
