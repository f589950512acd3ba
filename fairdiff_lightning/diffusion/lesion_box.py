"""Boxes around lesions, for networks that need to see no more of a scan than that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Box = tuple[slice, ...]


def lesion_boxes(lesion: Tensor, context: int | Sequence[int], stride: int | Sequence[int]) -> list[Box]:
    """The smallest box of each sample that holds its lesion and the context around it.

    Boxes start and end on multiples of the stride, or at the border of the volume, so that a network can halve them.

    Args:
        lesion: (B, *S) bool, not empty in any sample.
        context: voxels on each side, for all axes or each.
        stride: what sides must be multiples of, for all axes or each.

    Returns:
        One slice for each spatial axis, for each sample.
    """
    sizes = lesion.shape[1:]
    contexts, strides = per_axis(context, len(sizes), "context"), per_axis(stride, len(sizes), "stride")
    axes = []
    for axis, (size, margin, step) in enumerate(zip(sizes, contexts, strides, strict=True)):
        others = [other + 1 for other in range(len(sizes)) if other != axis]
        found = (lesion.amax(others) if others else lesion).to(torch.uint8)
        first, last = found.argmax(1), size - 1 - found.flip(1).argmax(1)
        starts = (first - margin).clamp(min=0) // step * step
        stops = (-((last + 1 + margin) // -step) * step).clamp(max=size)
        axes.append([slice(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)])
    return list(zip(*axes, strict=True))


def group_by_shape(boxes: Sequence[Box]) -> list[list[int]]:
    """Samples whose boxes have one shape, which can go through a network together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for sample, box in enumerate(boxes):
        groups.setdefault(tuple(side.stop - side.start for side in box), []).append(sample)
    return list(groups.values())


def per_axis(value: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    """One whole number of voxels for each axis.

    Args:
        value: for all axes or each.
        count: of axes.
        name: ``context``, from 0 on, or ``stride``, from 1 on.

    Raises:
        ValueError: for another number of them, or one that is no whole number or too small.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    least = 1 if name == "stride" else 0
    if len(values) != count or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(
            f"{name}={value}; expected is one whole number of at least {least}, or {count}, one for each axis."
        )
    return values
