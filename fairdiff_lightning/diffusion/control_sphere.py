"""The control sphere of LeFusion's mask diffusion: where a lesion is asked for, and how large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

SphereEncoding = Literal["signed", "uint8_wrap"]

ROUNDING = 1e-4
"""Voxels that a sphere reaches beyond its radius, so that the lesion voxel farthest from its centre lies inside."""


def control_sphere(mask: Tensor, truncate: bool = False) -> Tensor:
    """The sphere about each lesion: its centroid, and the distance of the voxel farthest from that.

    Zhang et al., *LeFusion*, ICLR 2025, arXiv:2403.14066. It is not the smallest sphere around the lesion.

    Args:
        mask: (B, K, H, W, D), other than 0 in the lesion; several channels count as one lesion.
        truncate: cut all four numbers to integers, as the authors' code does, which leaves some lesion voxels outside.

    Returns:
        (B, 4) float32, the centre along H, W and D and the radius, voxels; a single voxel has radius 0. An empty mask
        has radius -1, a sphere without voxels, and the sphere of the voxel (0, 0, 0) with ``truncate``.
    """
    inside = (mask != 0).any(1)
    voxels = inside.flatten(1).sum(1)
    sums = []
    for axis, side in enumerate(inside.shape[1:], 1):
        others = [other for other in (1, 2, 3) if other != axis]
        sums.append((inside.sum(others) * torch.arange(side, device=mask.device)).sum(1))
    centre = torch.stack(sums, 1) / voxels.clamp(min=1)[:, None]
    radius = _distances(centre, inside.shape[1:]).masked_fill(~inside, 0).flatten(1).amax(1)
    if truncate:
        return torch.cat([centre, radius[:, None]], 1).trunc()
    return torch.cat([centre, radius.masked_fill(voxels == 0, -1)[:, None]], 1)


def draw_spheres(spheres: Tensor, size: Sequence[int]) -> Tensor:
    """Volumes (B, 1, H, W, D) bool, true in spheres (B, 4) of centre and radius, voxels; ``size`` is H, W and D."""
    radius = spheres[:, 3].view(-1, 1, 1, 1)
    return (_distances(spheres[:, :3], size) <= radius + ROUNDING)[:, None]


def encode_spheres(inside: Tensor, encoding: SphereEncoding = "signed") -> Tensor:
    """Spheres as a network sees them.

    Args:
        inside: (B, 1, H, W, D) bool, as :func:`draw_spheres` makes them.
        encoding: ``signed``, 1 inside and -1 outside; ``uint8_wrap``, 1 inside and 255 outside, which is what the
            authors' network was trained on, since -1 was computed in unsigned bytes.

    Returns:
        The same shape, float32.

    Raises:
        ValueError: for another encoding.
    """
    if encoding not in get_args(SphereEncoding):
        raise ValueError(f"sphere_encoding {encoding!r}; expected is {' or '.join(get_args(SphereEncoding))}.")
    return torch.where(inside, 1.0, -1.0 if encoding == "signed" else 255.0)


def sphere_agreement(mask: Tensor, spheres: Tensor) -> tuple[Tensor, Tensor]:
    """How well lesions keep to spheres.

    Args:
        mask: (B, K, H, W, D), other than 0 in the lesion; several channels count as one lesion.
        spheres: (B, 4), the centre along H, W and D and the radius, voxels.

    Returns:
        The lesion's volume by that of the sphere's part inside of the volume (B,), and the share of the lesion's voxels
        more than one voxel outside of the sphere (B,), 0 for an empty lesion.
    """
    lesion, size = (mask != 0).any(1, keepdim=True), mask.shape[2:]
    reach = draw_spheres(spheres + spheres.new_tensor([0, 0, 0, 1]), size)
    parts = (lesion, draw_spheres(spheres, size), lesion & ~reach)
    volume, sphere, outside = (part.flatten(1).sum(1) for part in parts)
    return volume / sphere.clamp(min=1), outside / volume.clamp(min=1)


def check_spheres(spheres: Tensor, size: Sequence[int]) -> None:
    """Refuse spheres that ask for nothing.

    Args:
        spheres: (B, 4), the centre along H, W and D and the radius, voxels.
        size: H, W and D of the volume.

    Raises:
        ValueError: for another shape, NaN or infinite numbers, a radius that is not positive, or a centre outside of
            the volume, with the first sample at fault.
    """
    if spheres.dim() != 2 or spheres.shape[1] != 4:
        raise ValueError(
            f"spheres have shape {tuple(spheres.shape)}; expected is (B, 4), the centre along H, W and D and the "
            "radius, in voxels."
        )
    last = torch.tensor(tuple(size), device=spheres.device) - 1
    centred = ((spheres[:, :3] >= 0) & (spheres[:, :3] <= last)).all(1)
    wrong = ~(centred & (spheres[:, 3] > 0) & spheres.isfinite().all(1))
    if bool(wrong.any()):
        sample = int(wrong.nonzero()[0])
        *centre, radius = (round(value, 3) for value in spheres[sample].tolist())
        raise ValueError(
            f"the sphere of sample {sample} has centre {tuple(centre)} and radius {radius}, in voxels; expected is a "
            f"radius above 0 and a centre inside of the volume of {' x '.join(map(str, size))}, counted from 0."
        )


def check_room(inside: Tensor, free: Tensor) -> None:
    """Refuse spheres that no lesion can lie in.

    Args:
        inside: (B, 1, H, W, D) bool, the spheres.
        free: (B, 1, H, W, D) bool, where a lesion may lie.

    Raises:
        ValueError: for a sphere without a voxel, or one that lies outside of the boundary entirely, with the first
            sample at fault.
    """
    for found, text in (
        (inside, "has no voxel, so that no lesion fits in it; give it a larger radius."),
        (inside & free, "lies outside of the boundary entirely; move it, or widen the boundary."),
    ):
        lost = ~found.flatten(1).any(1)
        if bool(lost.any()):
            raise ValueError(f"the sphere of sample {int(lost.nonzero()[0])} {text}")


def _distances(centre: Tensor, size: Sequence[int]) -> Tensor:
    """Distance (B, H, W, D) of each voxel from centres (B, 3), voxels."""
    squares = []
    for axis, side in enumerate(size):
        offsets = torch.arange(side, device=centre.device) - centre[:, axis, None]
        squares.append(offsets.square().view(-1, *(side if other == axis else 1 for other in range(3))))
    return (squares[0] + squares[1] + squares[2]).sqrt()
