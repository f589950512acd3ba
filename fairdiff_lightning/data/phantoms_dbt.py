"""Procedural, seeded breast slices with a mass: the denser the breast, the less the mass stands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fairdiff_lightning.data.phantoms import Image, expose, smooth_noise, soften

View = Literal["CC", "MLO"]


@dataclass(frozen=True)
class BreastLook:
    """How a breast of one density looks: its share of dense tissue, a mass's brightness over it, blur and noise."""

    dense: float
    contrast: float
    blur: float = 0.5
    noise: float = 0.02


BREAST_LOOKS = (BreastLook(0.10, 0.34), BreastLook(0.30, 0.26), BreastLook(0.55, 0.18), BreastLook(0.80, 0.11))
"""Of densities A to D."""


def breast_slice(
    rng: np.random.Generator, size: tuple[int, int], look: BreastLook, view: View, depth: float = 0.0
) -> tuple[Image, Image]:
    """Draw a slice of a breast with the chest wall at the right edge, and the mask of its mass.

    Args:
        rng: source of everything random; the same state gives the same breast at another depth.
        size: height and width, pixels.
        look: the density's appearance.
        view: ``MLO`` shows the pectoral muscle at the top of the chest wall and a breast that hangs.
        depth: of the slice, -1 to 1 from end to end of the mass.

    Returns:
        Grey image (H, W) and mask (H, W) in {0, 1}, both uint8.
    """
    height, width = size
    unit = min(size)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x = width - 1 - x  # from the chest wall
    centre_y = height * (rng.uniform(0.47, 0.53) if view == "CC" else rng.uniform(0.55, 0.62))
    reach_y, reach_x = height * rng.uniform(0.36, 0.44), width * rng.uniform(0.6, 0.85)
    radial = np.hypot((y - centre_y) / reach_y, x / reach_x)
    muscle_width, muscle_height = width * rng.uniform(0.2, 0.35), height * rng.uniform(0.5, 0.7)
    muscle = (x / muscle_width + y / muscle_height < 1) if view == "MLO" else np.zeros(size, bool)
    breast = (radial < 1) | muscle
    skin = (radial > 1 - 2.5 / unit) & (radial < 1) & ~muscle

    here, there = (smooth_noise(rng, size, unit / 12) for _ in range(2))
    lobes = np.cos(0.5 * depth) * here + np.sin(0.5 * depth) * there - 0.8 * radial
    gland = soften(lobes > np.quantile(lobes[breast], 1 - look.dense), 1.5)
    fibres = smooth_noise(rng, size, 1.2)
    tissue = 0.25 + 0.25 * gland + 0.03 * fibres + 0.20 * soften(muscle, 1.0)

    distance, bearing = rng.uniform(0.25, 0.65), rng.uniform(-1.1, 1.1)
    from_y = y - centre_y - reach_y * distance * np.sin(bearing)
    from_x = x - reach_x * distance * np.cos(bearing)
    theta = np.arctan2(from_y, from_x)
    lobed = 1 + sum(rng.normal(0, 0.12 / k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi)) for k in range(2, 5))
    radius = rng.uniform(0.06, 0.11) * unit * np.sqrt(1 - depth**2)
    mass = (np.hypot(from_y * rng.uniform(1.0, 1.4), from_x) <= radius * lobed) & breast

    image = 0.02 + soften(breast, 0.7) * tissue + 0.25 * soften(skin, 0.7) + look.contrast * soften(mass, 1.0)
    grain = np.random.default_rng([int(rng.integers(2**31)), round((depth + 1) * 1000)])
    return expose(grain, image, look.blur, look.noise), mass.astype(np.uint8)
