"""Exact rasterisation of closed polygons in one pass over all of their edges."""

from __future__ import annotations

import torch
from torch import Tensor


def fill_polygons(vertices: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels whose centre lies inside a closed polygon, by the even-odd rule.

    Each edge flips the pixels to its right in every row that it crosses: the flips are counted where they begin, and
    a pixel is inside after an odd number of them. Centres exactly on an edge count as right of it, and above its lower
    end, so that polygons that share an edge share no pixel.

    Args:
        vertices: (P, M, 2) row and column in pixels, pixel centres at integers; the last is joined to the first.
        size: height and width, pixels.

    Returns:
        (P, H, W) bool.
    """
    height, width = size
    row, col = vertices.unbind(-1)
    next_row, next_col = row.roll(-1, 1), col.roll(-1, 1)
    first = torch.minimum(row, next_row).ceil().clamp(0, height).long()
    count = torch.maximum(row, next_row).ceil().clamp(0, height).long() - first
    ends = count.flatten().cumsum(0)
    edge = torch.repeat_interleave(count.flatten())
    crossed = torch.arange(len(edge), device=edge.device) - (ends - count.flatten() - first.flatten())[edge]
    slope = ((next_col - col) / (next_row - row)).flatten()
    at = col.flatten()[edge] + (crossed - row.flatten()[edge]) * slope[edge]
    begin = at.ceil().clamp(0, width).long()
    flips = torch.zeros(len(vertices), height, width + 1, dtype=torch.int8, device=vertices.device)
    target = (edge // vertices.shape[1] * height + crossed) * (width + 1) + begin
    flips.view(-1).index_add_(0, target, torch.ones_like(target, dtype=torch.int8))
    return flips.cumsum(-1, dtype=torch.int8).bitwise_and_(1).view(torch.bool)[..., :-1]
