"""Procedural, seeded stand-ins for RadImageNet: textured slices in folders that name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fairdiff_lightning.data.phantoms import Image, expose, smooth_noise, soften
from fairdiff_lightning.data.pictures import save_png

FOLDERS = ("CT/abd/normal", "CT/lung/nodule", "MR/af/plantar_fascia", "MR/hip/normal", "US/gb")
SIZE, COUNT = (56, 48), 12


def write_phantom(root: Path) -> None:
    """Write a few folders of images, each folder brighter than the last; what is not normal has a bright spot."""
    for number, folder in enumerate(FOLDERS):
        for i in range(COUNT):
            image = _slice(np.random.default_rng([number, i]), 0.35 + 0.05 * number, folder.endswith("normal"))
            save_png(root / folder / f"{folder.rpartition('/')[2]}{i + 1:03d}.png", image)


def _slice(rng: np.random.Generator, brightness: float, normal: bool) -> Image:
    """An oval body, textured, on black."""
    height, width = SIZE
    row, column = np.mgrid[:height, :width].astype(np.float32)
    y, x = np.array([height, width]) * rng.uniform(0.45, 0.55, 2)
    body = ((row - y) / (0.4 * height)) ** 2 + ((column - x) / (0.42 * width)) ** 2 <= 1
    image = soften(body, 1.0) * (brightness + 0.08 * smooth_noise(rng, SIZE, 4))
    if not normal:
        spot = np.hypot(row - y - rng.uniform(-9, 9), column - x - rng.uniform(-7, 7)) <= rng.uniform(2, 5)
        image += 0.35 * soften(spot, 0.8)
    return expose(rng, image.astype(np.float32), 0.5, 0.03)
