"""Blocks of training volumes, drawn so that enough of them show what is to be segmented."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fairdiff_lightning.data.grid import Array, Size
from fairdiff_lightning.data.seeding import derive_seed

GUESSES, ROUNDS = 64, 64
"""Voxels that are looked at together, and how often, before a whole mask is."""


@dataclass(frozen=True)
class PatchSampler:
    """Draws a block of a volume: around a voxel of the foreground, or of the background (MONAI's crops by label).

    Args:
        size: height, width and depth of the block, voxels.
        positive: share of the blocks that are drawn around the foreground; a mask without one is drawn from anywhere.
        seed: of all draws.

    Raises:
        ValueError: for a share outside of [0, 1].
    """

    size: Size
    positive: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.positive <= 1:
            raise ValueError(f"positive={self.positive}; expected is a share of the blocks, 0 to 1.")

    def draw(self, mask: NDArray[np.uint8], *names: object) -> tuple[slice, ...]:
        """Where the block lies in a mask (H, W, D) that is at least as large.

        Args:
            mask: class indices.
            *names: what the draw is of, such as an epoch and a sample: the same names, the same block.
        """
        from monai.transforms import SpatialCrop
        from monai.transforms.utils import generate_pos_neg_label_crop_centers

        random = np.random.RandomState(derive_seed(self.seed, "patch", *names) % 2**32)
        centres = generate_pos_neg_label_crop_centers(
            self.size, 1, self.positive, mask.shape, *draw_candidates(mask, random), random
        )
        return tuple(SpatialCrop.compute_slices(roi_center=centres[0], roi_size=self.size))


def draw_candidates(mask: NDArray[np.uint8], random: np.random.RandomState) -> tuple[Array, Array]:
    """Draw some voxels of the foreground and some of the background, each as likely as any other of its kind.

    Voxels are looked at until one belongs to the foreground, so that of a mask on disk little is read. Only one that is
    hardly ever hit (less than about one voxel in a thousand) or empty is searched as a whole.

    Args:
        mask: class indices, 0 is background.
        random: of the draw.

    Returns:
        Places in the flattened mask, never none; where one of the two is not found, those of the other.
    """
    for _ in range(ROUNDS):
        seen = random.randint(mask.size, size=GUESSES)
        inside = mask[np.unravel_index(seen, mask.shape)] > 0
        if inside.any():
            return seen[inside], seen if inside.all() else seen[~inside]
    found = np.flatnonzero(mask)
    return found if len(found) else seen, seen
