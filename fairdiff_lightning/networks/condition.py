"""What a ControlNet sees of a mask: one channel for each class, or a colour for each."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = (5**0.5 - 1) / 2
Kind = Literal["one_hot", "colours", "edge"]


class Condition:
    """What a control branch sees of a batch, and what the batch must have for it.

    Args:
        kind: ``one_hot`` masks, masks in ``colours``, or the ``edge`` map.
        num_classes: number of classes of the mask, the background included.
        size: height and width of the images, pixels.
        blended: resize masks of any size and aspect ratio as FairDiff's code does, see :func:`blended_colours`.
    """

    def __init__(self, kind: Kind, num_classes: int, size: tuple[int, int], blended: bool = False) -> None:
        self.kind, self.num_classes, self.size, self.blended = kind, num_classes, size, blended
        self.channels = num_classes if kind == "one_hot" else 3
        self.key = "edge" if kind == "edge" else "mask"

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """What the control branch sees (B, K, H, W) in [0, 1], at the size of the images."""
        if self.kind == "edge":
            edge: Tensor = batch["edge"]
            return edge.expand(-1, 3, -1, -1)
        if self.kind == "colours" and self.blended:
            return blended_colours(batch["mask"], self.num_classes, self.size)
        mask = resize_labels(batch["mask"], self.size)
        return colours(mask, self.num_classes) if self.kind == "colours" else one_hot(mask, self.num_classes)

    def check_key(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that lacks what the control branch sees."""
        if self.key not in batch:
            advice = " Give the data module its option `edges`." if self.key == "edge" else ""
            raise ValueError(
                f"'{batch['id'][0]}' has {sorted(batch)}; condition='{self.kind}' needs '{self.key}'.{advice}"
            )

    def check_sizes(self, batch: Mapping[str, Any]) -> None:
        """Refuse training samples of another size than the images'; one that is resized may have any."""
        for name in ("image",) if self.blended and self.key == "mask" else ("image", self.key):
            found = tuple(batch[name].shape[-2:])
            if found != self.size:
                raise ValueError(
                    f"'{name}' of sample {batch['id'][0]!r} has size {found}; image and {self.key} must have "
                    f"image_size, {self.size}."
                )

    def check_values(self, batch: Mapping[str, Any]) -> None:
        """Refuse a wrong shape, class or strength of edges; this waits for the device."""
        where = f"'{self.key}' of {batch['id'][0]!r}"
        if self.key == "mask":
            check_labels(batch["mask"], self.num_classes, self.size, where, self.blended)
        elif tuple(batch["edge"].shape[1:]) != (1, *self.size):
            raise ValueError(f"{where} has shape {tuple(batch['edge'].shape)}; expected is (B, 1, *{self.size}).")
        else:
            low, high = (float(value) for value in batch["edge"].aminmax())
            if not (low >= -1e-6 and high <= 1 + 1e-6):  # written so that NaN fails too
                raise ValueError(f"{where} has values in [{low:.4g}, {high:.4g}]; edges are in [0, 1].")


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
    return _table(num_classes, mask.device)[mask[:, 0]].permute(0, 3, 1, 2).contiguous()


@cache
def _table(num_classes: int, device: torch.device) -> Tensor:
    """The palette (K, 3) on a device, where it stays: to bring it there would make every step wait."""
    with torch.inference_mode(False):  # it serves training too
        return torch.tensor(palette(num_classes), dtype=torch.float32, device=device)


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
