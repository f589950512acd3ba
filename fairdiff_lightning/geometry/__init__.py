"""Masks of nested structures as outline points and back, and distances between point sets; names load on first use."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fairdiff_lightning.geometry.distances import KNN, chamfer_distance, knn_points, sample_farthest_points
    from fairdiff_lightning.geometry.filling import points_to_mask, points_to_masks
    from fairdiff_lightning.geometry.outline import mask_to_points, masks_to_points
    from fairdiff_lightning.geometry.structures import DISC_AND_CUP, StructureSpec

__all__ = [
    "DISC_AND_CUP",
    "KNN",
    "StructureSpec",
    "chamfer_distance",
    "knn_points",
    "mask_to_points",
    "masks_to_points",
    "points_to_mask",
    "points_to_masks",
    "sample_farthest_points",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "distances": ["KNN", "chamfer_distance", "knn_points", "sample_farthest_points"],
        "filling": ["points_to_mask", "points_to_masks"],
        "outline": ["mask_to_points", "masks_to_points"],
        "structures": ["DISC_AND_CUP", "StructureSpec"],
    },
)
