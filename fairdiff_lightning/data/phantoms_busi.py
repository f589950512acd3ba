"""Procedural, seeded breast ultrasound: layers under speckle, and lesions that look as their diagnosis does."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fairdiff_lightning.data.phantoms import Image, expose, smooth_noise, soften


@dataclass(frozen=True)
class UltrasoundLook:
    """How lesions of one diagnosis look.

    Args:
        contrast: how much darker than the tissue around it a lesion is.
        tall: height over width, smallest and largest.
        spicules: length of its spicules, in radii.
        blur: of its edge, pixels.
        behind: brightness that it adds to what lies below it: above 0 enhancement, below 0 shadow.
        share: its largest radius, in shares of the image's shorter side.
    """

    contrast: float
    tall: tuple[float, float]
    spicules: float
    blur: float
    behind: float
    share: float = 0.2


BENIGN = UltrasoundLook(contrast=0.28, tall=(0.5, 0.75), spicules=0.0, blur=0.7, behind=0.05)
"""Oval, smooth, wider than tall, bright behind."""
MALIGNANT = UltrasoundLook(contrast=0.25, tall=(0.9, 1.3), spicules=0.5, blur=1.2, behind=-0.12)
"""Irregular, spiculated, taller than wide, with a shadow."""
LAYERS = ((0.0, 0.75), (0.07, 0.38), (0.28, 0.52), (0.72, 0.30), (0.80, 0.42), (0.93, 0.60))
"""Depth at which a layer begins, and its brightness: skin, fat, gland, fascia and muscle, chest wall."""
SPECKLE, NOISE = 0.12, 0.01


def breast_ultrasound(
    rng: np.random.Generator, size: tuple[int, int], look: UltrasoundLook | None, lesions: int = 1
) -> tuple[Image, list[Image]]:
    """Draw a B-mode image with the skin at the top, and a mask of each lesion.

    Args:
        rng: source of everything random.
        size: height and width, pixels.
        look: of the lesions; None draws a breast without one.
        lesions: how many, side by side.

    Returns:
        Grey image (H, W), and the masks (H, W) in {0, 1} of the lesions, all uint8.
    """
    level = _tissue(rng, size)
    masks = []
    if look is not None:
        masks = [_lesion(rng, size, look, place, lesions) for place in range(lesions)]
        level += sum(_shade(mask, look) for mask in masks)
    image = level + SPECKLE * _log_speckle(rng, size)
    return expose(rng, image, 0.0, NOISE), [mask.astype(np.uint8) for mask in masks]


def _tissue(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
    """Brightness of wavy layers that fades with depth."""
    height, width = size
    depth = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    wave = 0.03 * smooth_noise(rng, size, width / 5) * np.minimum(1, depth / 0.1)  # the skin is flat under the probe
    begins, brightness = np.array(LAYERS).T
    which = np.searchsorted(begins, np.clip(depth + wave, 0, 1), side="right") - 1
    layers = cv2.GaussianBlur(brightness[which].astype(np.float32), (0, 0), 1.0)
    lobules = 0.05 * smooth_noise(rng, size, min(size) / 16)
    faded: NDArray[np.float32] = layers + lobules - 0.12 * depth
    return faded


def _lesion(
    rng: np.random.Generator, size: tuple[int, int], look: UltrasoundLook, place: int, places: int
) -> NDArray[np.bool_]:
    """A lesion within the gland, in the ``place``-th of so many equal parts of the width."""
    height, width = size
    row, column = np.mgrid[:height, :width].astype(np.float32)
    centre_row = height * rng.uniform(0.42, 0.52)
    centre_column = width * (place + rng.uniform(0.4, 0.6)) / places
    tall = rng.uniform(*look.tall)
    radius = min(size) * look.share * rng.uniform(0.7, 1.0) / max(1, 0.75 * places)
    y, x = (row - centre_row) / np.sqrt(tall), (column - centre_column) * np.sqrt(tall)
    theta = np.arctan2(y, x)
    count, turn = int(rng.integers(7, 12)), rng.uniform(0, 2 * np.pi)
    lobed = 1 + 0.25 * look.spicules * np.cos(2 * theta + turn) + 0.2 * look.spicules * np.cos(3 * theta - turn)
    spiked = look.spicules * np.abs(np.cos(count * theta / 2 + turn)) ** 6
    inside: NDArray[np.bool_] = np.hypot(y, x) <= radius * (lobed + spiked)
    return inside


def _shade(mask: NDArray[np.bool_], look: UltrasoundLook) -> NDArray[np.float32]:
    """What a lesion adds to the brightness of the tissue, in itself and below itself."""
    below = np.logical_or.accumulate(mask, axis=0) & ~mask
    shade: NDArray[np.float32] = look.behind * soften(below, 2.0) - look.contrast * soften(mask, look.blur)
    return shade


def _log_speckle(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
    """Log-compressed Rayleigh speckle about 0, finer along the beam than across it."""
    wave = rng.standard_normal(size) + 1j * rng.standard_normal(size)
    real, imaginary = (cv2.GaussianBlur(part, (0, 0), sigmaX=1.1, sigmaY=0.6) for part in (wave.real, wave.imag))
    logarithm = np.log(np.hypot(real, imaginary) + 1e-3)
    speckle: NDArray[np.float32] = (logarithm - logarithm.mean()).astype(np.float32)
    return speckle
