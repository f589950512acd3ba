"""Masks of nested structures from the points on their outlines."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fairdiff_lightning.geometry.polygon import fill_polygons
from fairdiff_lightning.geometry.reference import close_points
from fairdiff_lightning.geometry.structures import DISC_AND_CUP, StructureSpec

DecodeMethod = Literal["polygon", "closing"]

NUM_RAYS = 1024
"""Directions in which an outline's radius is known, hence vertices of its polygon."""
MIN_DENSE = 32
"""Points of a structure from which noise and outliers can be told from its shape: fewer may be its corners."""
OUTLIER_DEVIATIONS, OUTLIER_RADIUS = 6.0, 0.1
"""An outlier is off by more than both: robust standard deviations of the radii, and a share of the median radius."""
NOISE_FACTOR = 8.0
"""Noise power taken from each harmonic, in units of its mean: pure noise exceeds eight with probability exp(-8)."""
MEDIAN_STEPS = 8


def points_to_mask(
    points: Tensor,
    size: tuple[int, int],
    method: DecodeMethod = "polygon",
    z: float = 5.0,
    structures: StructureSpec = DISC_AND_CUP,
) -> Tensor:
    """Mask of nested structures from points on their outlines, in any order.

    ``polygon``: a point belongs to the structure whose tag is nearest to its z. Each structure's points are ordered by
    their angle about their geometric median, those whose radius is far off the running median of their neighbours'
    are left out, and the polygon through the rest, its radius smoothed over the angle as far as the points scatter
    about it, is filled exactly: a pixel whose centre lies inside belongs to it. What lies outside the enclosing
    structure is cut off. Of a structure with fewer than 32 points every one is taken as it is, since it may be a
    corner: there a stray point does harm. Outlines must be star-shaped about their median: every point seen from it.

    ``closing`` is FairDiff's decoder, its bias included: points of a disc and a cup, truncated to pixels, those with
    |z| < 5 erased, closed by an ellipse of 15 pixels, 20 times, filled, and the cup kept two pixels inside the disc.
    Structures without points are absent from its mask.

    Args:
        points: (N, 3) row, column (pixels) and tag.
        size: height and width of the mask, pixels.
        method: see above.
        z: tag of the innermost structure, as given to the encoder.
        structures: the classes of the mask from 1 on.

    Returns:
        Class indices (H, W), int64.

    Raises:
        ValueError: for another shape, NaN or infinite points, and (``polygon``) a structure with fewer than three
            points left or without a pixel in the frame.
    """
    if points.ndim != 2:
        raise ValueError(f"points must have shape (N, 3), but have {tuple(points.shape)}.")
    return points_to_masks(points[None], size, method, z, structures)[0, 0]


def points_to_masks(
    points: Tensor,
    size: tuple[int, int],
    method: DecodeMethod = "polygon",
    z: float = 5.0,
    structures: StructureSpec = DISC_AND_CUP,
) -> Tensor:
    """Masks (B, 1, H, W) int64 of a batch of clouds (B, N, 3); see :func:`points_to_mask`.

    Raises:
        ValueError: as :func:`points_to_mask`, with the index of the first cloud at fault.
    """
    if method not in get_args(DecodeMethod):
        raise ValueError(f"method must be one of {get_args(DecodeMethod)}, but is {method!r}.")
    if points.ndim != 3 or points.shape[2] != 3 or 0 in points.shape:
        raise ValueError(f"points must have shape (B, N, 3), none of them 0, but have {tuple(points.shape)}.")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be a height and a width of at least 1 pixel, but is {size}.")
    finite = points.isfinite().all(-1)
    if not bool(finite.all()):
        cloud, point = (~finite).nonzero()[0].tolist()
        raise ValueError(f"cloud {cloud}: point {point} is not finite: {points[cloud, point].tolist()}.")
    if method == "closing":
        closed = [close_points(cloud, size, z, structures) for cloud in points]
        return torch.stack(closed)[:, None].to(points.device)
    outlines = recover_outlines(points.detach().double(), z, structures)
    rows, cols = _frame(outlines[:, 0], size)
    origin = outlines.new_tensor([rows.start, cols.start])
    classes = _fill_nested(outlines - origin, rows.stop - rows.start, cols.stop - cols.start)
    _check_present(classes, outlines, size, structures)
    masks = torch.zeros(len(points), 1, *size, dtype=torch.int64, device=points.device)
    masks[:, 0, rows, cols] = classes
    return masks


def recover_outlines(points: Tensor, z: float, structures: StructureSpec) -> Tensor:
    """Polygons (B, K, M, 2) of the K structures of clouds (B, N, 3)."""
    structure = structures.classify(points[..., 2], z)
    member = structure[:, None] == torch.arange(len(structures), device=points.device)[:, None]  # (B, K, N)
    _check_counts(member.sum(-1), structures, "")
    points = points[:, None, :, :2]
    centre = _geometric_median(points, member)
    row, col = (points - centre[:, :, None]).unbind(-1)
    angle, radius = _by_angle(torch.atan2(row, col), torch.hypot(row, col), member)
    kept = _without_outliers(radius, member.sum(-1, keepdim=True))
    _check_counts(kept.sum(-1), structures, " that are no outliers")
    angle, radius = _by_angle(angle, radius, kept)
    rays = torch.arange(NUM_RAYS, device=points.device, dtype=points.dtype) * (2 * math.pi / NUM_RAYS) - math.pi
    count = kept.sum(-1, keepdim=True)
    radius = _smoothed(_cast(rays, angle, radius, count), angle, radius, count)
    return centre[:, :, None] + radius[..., None] * torch.stack([rays.sin(), rays.cos()], -1)


def _geometric_median(points: Tensor, member: Tensor) -> Tensor:
    """Point (B, K, 2) of the least sum of distances to the members: inside the outline, and unmoved by outliers."""
    weight = member.to(points.dtype)[..., None]
    for _ in range(MEDIAN_STEPS):
        centre = (weight * points).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True)
        distance = (points - centre).norm(dim=-1, keepdim=True)
        weight = member[..., None] / distance.clamp(min=1e-6)
    return centre[:, :, 0]


def _by_angle(angle: Tensor, radius: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Angles and radii of the members, by angle; infinite angles after them."""
    angle, order = angle.masked_fill(~member, torch.inf).sort(-1)
    return angle, radius.gather(-1, order)


def _neighbours(values: Tensor, offsets: Tensor, count: Tensor) -> Tensor:
    """Values (B, K, N, len(offsets)) at offsets along sequences whose first ``count`` entries are closed to a ring."""
    index = (torch.arange(values.shape[-1], device=values.device)[:, None] + offsets) % count[..., None]
    return values.gather(-1, index.flatten(-2)).view(index.shape)


def _without_outliers(radius: Tensor, count: Tensor) -> Tensor:
    """Which of the points, sorted by angle, are near the running median of the radius."""
    used = torch.arange(radius.shape[-1], device=radius.device) < count
    half = max(1, radius.shape[-1] // radius.shape[1] // 32)
    offsets = torch.arange(-half, half + 1, device=radius.device)
    median = _neighbours(radius, offsets, count).median(-1).values
    deviation = (radius - median).abs()
    scale = torch.maximum(
        OUTLIER_DEVIATIONS * 1.4826 * _median(deviation, used), OUTLIER_RADIUS * _median(radius, used)
    )
    return used & ((deviation <= scale) | (count < MIN_DENSE))


def _median(values: Tensor, used: Tensor) -> Tensor:
    return values.masked_fill(~used, torch.nan).nanmedian(-1, keepdim=True).values


def _cast(rays: Tensor, angle: Tensor, radius: Tensor, count: Tensor) -> Tensor:
    """Distance (B, K, M) along each ray to the polygon through the sorted points."""
    after = torch.searchsorted(angle, rays.expand(*angle.shape[:-1], -1).contiguous(), right=True)
    before, after = (after - 1) % count, after % count
    start, end = angle.gather(-1, before), angle.gather(-1, after)
    gap, into = (end - start) % (2 * math.pi), (rays - start) % (2 * math.pi)
    r0, r1 = radius.gather(-1, before), radius.gather(-1, after)
    chord = r0 * r1 * gap.sin() / (r0 * into.sin() + r1 * (gap - into).sin()).clamp(min=1e-12)
    return torch.where(gap < math.pi, chord, 0)


def _smoothed(outline: Tensor, angle: Tensor, radius: Tensor, count: Tensor) -> Tensor:
    """Radii (B, K, M), each harmonic shrunk by the share that the points' scatter has in its power (Wiener)."""
    used = torch.arange(radius.shape[-1], device=radius.device) < count
    sides = torch.tensor([-1, 1], device=radius.device)
    before, after = _neighbours(angle, sides, count).unbind(-1)
    share = ((angle - before) % (2 * math.pi)) / ((after - before) % (2 * math.pi)).clamp(min=1e-12)
    left, right = _neighbours(radius, sides, count).unbind(-1)
    residual = (radius - left.lerp(right, share)) / (1 + share.square() + (1 - share).square()).sqrt()
    scatter = 1.4826 * _median(residual.abs(), used)
    harmonics = torch.fft.rfft(outline, norm="forward")
    noise = torch.where(count < MIN_DENSE, 0, NOISE_FACTOR * scatter.square() / count)
    gain = (1 - noise / harmonics.abs().square().clamp(min=1e-24)).clamp(min=0)
    shrunk: Tensor = torch.fft.irfft(harmonics * gain, n=outline.shape[-1], norm="forward")
    return shrunk.clamp(min=0)


def _frame(outlines: Tensor, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that outlines (B, M, 2) reach, at least one of each: the rest of the masks is background."""
    lowest, highest = outlines.amin((0, 1)).floor().tolist(), outlines.amax((0, 1)).ceil().tolist()
    starts = [int(min(max(low, 0), length - 1)) for low, length in zip(lowest, size, strict=True)]
    stops = [int(min(max(high, start) + 1, length)) for high, start, length in zip(highest, starts, size, strict=True)]
    return slice(starts[0], stops[0]), slice(starts[1], stops[1])


def _fill_nested(outlines: Tensor, height: int, width: int) -> Tensor:
    """Classes (B, H, W) int8 of polygons (B, K, M, 2), each cut to those before it."""
    filled = fill_polygons(outlines.flatten(0, 1), (height, width)).view(*outlines.shape[:2], height, width)
    region, *inner = filled.unbind(1)
    classes = region.to(torch.int8)
    for inside in inner:
        region = region & inside
        classes += region.view(torch.int8)
    return classes


def _check_counts(counts: Tensor, structures: StructureSpec, kind: str) -> None:
    few = (counts < 3).nonzero()
    if len(few):
        cloud, k = few[0].tolist()
        raise ValueError(
            f"cloud {cloud} has {int(counts[cloud, k])} points of '{structures.names[k]}'{kind}, expected at least 3; "
            "reject the cloud."
        )


def _check_present(classes: Tensor, outlines: Tensor, size: tuple[int, int], structures: StructureSpec) -> None:
    innermost = classes.amax((-2, -1))
    absent = (innermost < len(structures)).nonzero()
    if len(absent):
        cloud = int(absent[0])
        k = int(innermost[cloud])
        (top, left), (bottom, right) = outlines[cloud, k].amin(0).tolist(), outlines[cloud, k].amax(0).tolist()
        raise ValueError(
            f"cloud {cloud}: '{structures.names[k]}' covers no pixel of a mask of {size[0]} x {size[1]} pixels inside "
            f"the structures around it; its outline spans rows {top:.1f} to {bottom:.1f}, columns {left:.1f} to "
            f"{right:.1f}. Give the size of the masks that the points were made from, or reject the cloud."
        )
