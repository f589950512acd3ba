"""FairDiff's own codec: edge pixels thinned to a number, and morphological closing back to a mask (MICCAI 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairdiff_lightning.geometry.distances import sample_farthest_points
from fairdiff_lightning.geometry.structures import StructureSpec

if TYPE_CHECKING:
    Layer = NDArray[np.uint8]


def sample_edge_pixels(classes: NDArray[np.integer], num_points: int, z: float, structures: StructureSpec) -> Tensor:
    """FairDiff's points (N, 3) of a mask (H, W): see ``fps`` of :func:`fairdiff_lightning.geometry.mask_to_points`.

    Raises:
        ValueError: when the edges have fewer pixels than ``num_points``, or for other than two structures.
    """
    _check_two(structures, "fps")
    pixels = edge_pixels(classes, z)
    if len(pixels) < num_points:
        raise ValueError(
            f"the outlines have {len(pixels)} edge pixels, fewer than num_points={num_points}. FairDiff drops such a "
            "mask; encode it with method='arc_length'."
        )
    _, chosen = sample_farthest_points(pixels[None], K=num_points, backend="torch")
    return pixels[chosen[0].sort().values].float()


def edge_pixels(classes: NDArray[np.integer], z: float) -> Tensor:
    """Edge pixels (M, 3) float64 of the disc, then those of the cup, each in row-major order."""
    layers = [(classes > k).astype(np.uint8) * 255 for k in (0, 1)]
    blocks = [np.argwhere(_edge(layer)) for layer in layers]
    tags = np.repeat([-z, z], [len(block) for block in blocks])
    return torch.from_numpy(np.column_stack([np.concatenate(blocks), tags]))


def close_points(points: Tensor, size: tuple[int, int], z: float, structures: StructureSpec) -> Tensor:
    """FairDiff's mask (H, W) of points (N, 3): see ``closing`` of :func:`fairdiff_lightning.geometry.points_to_mask`.

    Raises:
        ValueError: for other than two structures.
    """
    import cv2

    _check_two(structures, "closing")
    painted_disc, painted_cup = _paint(points, size, z)
    disc = _close_and_fill(painted_disc)
    inside = cv2.erode(disc, np.ones((3, 3), np.uint8), iterations=2)
    cup = np.minimum(_close_and_fill(painted_cup), inside)
    return torch.from_numpy((disc > 0).astype(np.int64) + (cup > 0))


def _edge(layer: Layer) -> Layer:
    import cv2

    canny = cv2.Canny(layer, 50, 200, L2gradient=True)
    contours, _ = cv2.findContours(canny, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    edge = np.zeros_like(layer)
    cv2.polylines(edge, contours, True, 255, 1)
    return edge


def _paint(points: Tensor, size: tuple[int, int], z: float) -> tuple[Layer, Layer]:
    """Layers (H, W) of disc and cup points; a point between the tags erases its pixel from both, the last one wins."""
    row, col, third = np.trunc(points.detach().cpu().double().numpy()).T
    inside = (row >= 0) & (row < size[0]) & (col >= 0) & (col < size[1])
    pixel = (row * size[1] + col)[inside].astype(np.int64)
    third = third[inside]
    layers = []
    for own, other in ((third <= -z, third >= z), (third >= z, third <= -z)):
        layer = np.zeros(size, np.uint8)
        pixels, last = np.unique(pixel[~other][::-1], return_index=True)
        layer.flat[pixels] = np.where(own[~other][::-1][last], 255, 0)
        layers.append(layer)
    return layers[0], layers[1]


def _close_and_fill(layer: Layer) -> Layer:
    import cv2

    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (15, 15))
    closed = cv2.morphologyEx(layer, cv2.MORPH_CLOSE, kernel, iterations=20)
    contours, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros_like(layer)
    cv2.drawContours(filled, contours, -1, 255, 2)
    contours, _ = cv2.findContours(filled, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    for piece in sorted(contours, key=cv2.contourArea):
        cv2.drawContours(filled, [piece], -1, 255, cv2.FILLED)
    return filled


def _check_two(structures: StructureSpec, method: str) -> None:
    if len(structures) != 2:
        raise ValueError(
            f"method '{method}' is FairDiff's own, for two structures; got {len(structures)}: {structures}."
        )
