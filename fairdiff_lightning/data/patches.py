"""Blocks of training volumes, drawn so that enough of them show what is to be segmented."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fairdiff_lightning.data.grid import Size
from fairdiff_lightning.data.seeding import generator

GUESSES, ROUNDS = 64, 64
"""Voxels that are looked at together, and how often, before a whole mask is."""


@dataclass(frozen=True)
class PatchSampler:
    """Draws a block of a volume: around a voxel of the foreground, or anywhere.

    Args:
        size: height, width and depth of the block, voxels.
        positive: share of the blocks that are drawn around the foreground.
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
        random = generator(self.seed, "patch", *names)
        around, *place = torch.rand(4, generator=random, dtype=torch.float64).tolist()
        room = [full - side for full, side in zip(mask.shape, self.size, strict=True)]
        centre = draw_foreground(mask, random) if around < self.positive else None
        if centre is not None:
            start = [min(max(c - n // 2, 0), r) for c, n, r in zip(centre, self.size, room, strict=True)]
        else:
            start = [int(p * (r + 1)) for p, r in zip(place, room, strict=True)]
        return tuple(slice(s, s + n) for s, n in zip(start, self.size, strict=True))


def draw_foreground(mask: NDArray[np.uint8], random: torch.Generator) -> tuple[int, ...] | None:
    """Draw a voxel of the foreground, each as likely as any other; None where there is none.

    Voxels are guessed until one belongs to the foreground, so that of a mask on disk little is read. Only one that is
    hardly ever hit (less than about one voxel in a thousand) or empty is searched as a whole.

    Args:
        mask: class indices, 0 is background.
        random: CPU generator of the draw.
    """
    for _ in range(ROUNDS):
        guesses = np.unravel_index(torch.randint(mask.size, (GUESSES,), generator=random).numpy(), mask.shape)
        hits = np.flatnonzero(mask[guesses])
        if len(hits):
            return tuple(int(axis[hits[0]]) for axis in guesses)
    voxels = np.flatnonzero(mask)
    if not len(voxels):
        return None
    chosen = voxels[int(torch.randint(len(voxels), (1,), generator=random))]
    return tuple(int(axis) for axis in np.unravel_index(chosen, mask.shape))
