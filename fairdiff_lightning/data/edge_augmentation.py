"""Zooms and rotations that move images, masks and edges alike, each sample its own, on the batch's device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RandomZoomRotate(nn.Module):
    """DiffBoost's augmentation of a generator's training samples, in one resampling of the batch.

    Zhang et al., *DiffBoost*, IEEE TMI 2025, arXiv:2310.12868, as its code does it: a zoom about the centre, then a
    rotation. What the frame lacks is mirrored in the image and empty in mask and edge. The code resamples twice, zooms
    by whole pixels and mixes the outermost line of an image that it zooms into with black; none of that is done here.

    Args:
        degrees: largest angle of the rotation.
        zoom: smallest and largest size; 0.75 shows three quarters of the sides, 1.05 makes the image 0.95 as large.
    """

    def __init__(self, degrees: float = 20.0, zoom: tuple[float, float] = (0.75, 1.05)) -> None:
        super().__init__()
        if not 0 < zoom[0] <= zoom[1] < 2:
            raise ValueError(f"zoom={zoom}: expected are a smallest and a largest size above 0 and below 2.")
        self.degrees, self.zoom = degrees, zoom

    def forward(
        self, image: Tensor, mask: Tensor, edge: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Transform image (B, C, H, W), mask (B, 1, H, W) and edge (B, 1, H, W) alike.

        Args:
            image: floating point, of any range.
            mask: class indices.
            edge: in [0, 1]; lines become soft.
            generator: CPU generator of the draws; the global one when None.

        Raises:
            ValueError: when they are not of one size.
        """
        if not image.shape[2:] == mask.shape[2:] == edge.shape[2:]:
            found = ", ".join(str(tuple(part.shape)) for part in (image, mask, edge))
            raise ValueError(f"image, mask and edge have shapes {found}; expected is one height and width.")
        drawn = torch.rand(2, len(image), generator=generator)
        zoom = self.zoom[0] + drawn[1] * (self.zoom[1] - self.zoom[0])
        return zoom_rotate(image, mask, edge, zoom, (2 * drawn[0] - 1) * self.degrees)


def zoom_rotate(
    image: Tensor, mask: Tensor, edge: Tensor, zoom: Tensor, degrees: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Zoom image (B, C, H, W), mask and edge (B, 1, H, W) about the centre and rotate them counter-clockwise.

    Args:
        image: floating point.
        mask: class indices.
        edge: floating point.
        zoom: (B,), see :class:`RandomZoomRotate`.
        degrees: (B,).
    """
    count, _, height, width = image.shape
    half = torch.tensor([width / 2, height / 2])
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    turn = torch.stack([cos, -sin, sin, cos], -1).view(-1, 2, 2) * half / half[:, None]  # of places in [-1, 1]
    theta = F.pad(turn, (0, 1)).to(image, non_blocking=True)
    part = torch.where(zoom < 1, zoom, 1 / (2 - zoom)).to(image, non_blocking=True).view(-1, 1, 1, 1)
    zoomed = F.affine_grid(theta, [count, 1, height, width], align_corners=False)
    inside = (zoomed.abs() <= 1).all(-1)[:, None]
    mirrored = 1 - ((zoomed + 1) % 4 - 2).abs()  # at the border of the zoomed frame, which may lie within the image
    moved = F.grid_sample(image, mirrored * part, padding_mode="reflection", align_corners=False)
    labels = F.grid_sample(mask.to(image.dtype), zoomed * part, mode="nearest", align_corners=False) * inside
    lines = F.grid_sample(edge, zoomed * part, align_corners=False) * inside
    return moved, labels.to(mask.dtype), lines.clamp(0, 1)
