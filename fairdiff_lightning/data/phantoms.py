"""Procedural, seeded stand-ins for real images: unbalanced across groups and shifted in appearance by group.

Only drawing is here, and where it is kept; the data sets write what is drawn in their native layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from fairdiff_lightning.data.cache import cache_root

Image = NDArray[np.uint8]
VERSION = 1
"""Part of the folder's name in the cache: raised when what is drawn or written changes."""


@dataclass(frozen=True)
class FundusLook:
    """How a group's fundus looks: brightness of disc and cup over the retina, blur (pixels) and noise."""

    disc: float
    cup: float
    blur: float
    noise: float


@dataclass(frozen=True)
class SkinLook:
    """How a group's skin looks: its colour, the lesion's darkness, how many hairs, blur (pixels) and noise."""

    skin: tuple[float, float, float]
    contrast: float
    hairs: int
    blur: float
    noise: float


def phantom_folder(dataset: str) -> Path:
    """Where the phantom of a data set is kept."""
    return cache_root() / "phantoms" / f"{dataset.lower()}-{VERSION}"


def allocate(total: int, shares: dict[int, float]) -> list[int]:
    """Group indices of ``total`` samples in the given shares (largest remainders), in a fixed mixed order."""
    exact = {g: total * s / sum(shares.values()) for g, s in shares.items()}
    count = {g: int(x) for g, x in exact.items()}
    for g in sorted(exact, key=lambda g: count[g] - exact[g])[: total - sum(count.values())]:
        count[g] += 1
    groups = [g for g, n in count.items() for _ in range(n)]
    return [groups[i] for i in np.random.default_rng(0).permutation(len(groups))]


def slo_fundus(rng: np.random.Generator, size: tuple[int, int], look: FundusLook) -> tuple[Image, Image]:
    """Draw a scanning-laser fundus with vessels, and its mask {0 background, 1 rim, 2 cup}.

    Args:
        rng: source of everything random.
        size: height and width, pixels.
        look: the group's appearance.

    Returns:
        Grey image (H, W) and mask (H, W), both uint8.
    """
    height, width = size
    unit = min(size)
    row, col = np.mgrid[:height, :width].astype(np.float32)
    centre = np.array([height / 2, width / 2]) + rng.uniform(-0.1, 0.1, 2) * unit
    disc_axes = rng.uniform(0.20, 0.28) * unit * np.array([1, rng.uniform(0.8, 1.0)])
    cup_axes = disc_axes * rng.uniform(0.35, 0.75)
    cup_centre = centre + rng.uniform(-0.15, 0.15, 2) * (disc_axes - cup_axes)
    angle = rng.uniform(0, np.pi)
    disc = _ellipse(row, col, centre, disc_axes, angle)
    cup = _ellipse(row, col, cup_centre, cup_axes, angle) & disc

    retina = 0.38 + 0.12 * smooth_noise(rng, size, unit / 6) + 0.06 * np.cos((row - centre[0]) / unit * 2)
    image = retina + look.disc * soften(disc, 1.0) + look.cup * soften(cup, 1.5)
    image = _draw_vessels(rng, image.astype(np.float32), centre, unit)
    mask = disc.astype(np.uint8) + cup.astype(np.uint8)
    return expose(rng, image, look.blur, look.noise), mask


def dermoscopy(rng: np.random.Generator, size: tuple[int, int], look: SkinLook) -> tuple[Image, Image]:
    """Draw a dermoscopic image with an irregular pigmented lesion under hairs, and its mask {0, 1}.

    Args:
        rng: source of everything random.
        size: height and width, pixels.
        look: the group's appearance.

    Returns:
        RGB image (H, W, 3) and mask (H, W), both uint8.
    """
    height, width = size
    unit = min(size)
    row, col = np.mgrid[:height, :width].astype(np.float32)
    centre = np.array([height / 2, width / 2]) + rng.uniform(-0.12, 0.12, 2) * unit
    theta = np.arctan2(row - centre[0], col - centre[1])
    outline = 1 + sum(rng.normal(0, 0.10 / k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi)) for k in range(2, 6))
    radius = rng.uniform(0.18, 0.34) * unit
    stretch = rng.uniform(0.75, 1.0)
    lesion = np.hypot((row - centre[0]) / stretch, col - centre[1]) <= radius * outline

    shade = 1 + 0.08 * smooth_noise(rng, size, unit / 4)
    image = np.stack([c * shade for c in look.skin], -1)
    pigment = look.contrast * (1 + 0.5 * smooth_noise(rng, size, unit / 12)) * soften(lesion, 1.5)
    image = image - pigment[..., None] * np.array([0.7, 1.0, 0.9])
    image = np.ascontiguousarray(image, dtype=np.float32)
    for _ in range(int(rng.poisson(look.hairs))):
        start, heading = rng.uniform(0, 1, 2) * [width, height], rng.uniform(0, 2 * np.pi)
        step = np.linspace(0, rng.uniform(0.3, 0.8) * unit, 24)
        bend = heading + rng.normal(0, 0.6) * step / unit
        points = np.stack([start[0] + step * np.cos(bend), start[1] + step * np.sin(bend)], -1)
        cv2.polylines(image, [_fixed_point(points)], False, (0.12, 0.08, 0.06), 1, cv2.LINE_AA, shift=4)
    return expose(rng, image, look.blur, look.noise), lesion.astype(np.uint8)


def _ellipse(
    row: NDArray[np.float32],
    col: NDArray[np.float32],
    centre: NDArray[np.float64],
    axes: NDArray[np.float64],
    angle: float,
) -> NDArray[np.bool_]:
    y, x = row - centre[0], col - centre[1]
    along, across = y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)
    inside: NDArray[np.bool_] = (along / axes[0]) ** 2 + (across / axes[1]) ** 2 <= 1
    return inside


def _draw_vessels(
    rng: np.random.Generator, image: NDArray[np.float32], centre: NDArray[np.float64], unit: int
) -> NDArray[np.float32]:
    ink = np.zeros_like(image)
    for _ in range(int(rng.integers(6, 10))):
        heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.0) * unit
        step = np.linspace(0, length, 32)
        bend = heading + rng.normal(0, 0.7) * step / unit + 0.15 * np.sin(step / unit * rng.uniform(4, 9))
        points = np.stack([centre[1] + step * np.cos(bend), centre[0] + step * np.sin(bend)], -1)
        cv2.polylines(ink, [_fixed_point(points)], False, 1.0, int(rng.integers(1, 3)), cv2.LINE_AA, shift=4)
    return (image - 0.15 * cv2.GaussianBlur(ink, (0, 0), 0.7)).astype(np.float32)


def _fixed_point(points: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.round(points * 16).astype(np.int32)


def soften(mask: NDArray[np.bool_], sigma: float) -> NDArray[np.float32]:
    """A mask (H, W) as a blurred image in [0, 1]; ``sigma`` in pixels."""
    return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), sigma)  # type: ignore[return-value]


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], sigma: float) -> NDArray[np.float32]:
    """Noise (H, W) of unit variance whose structures are about ``sigma`` pixels wide."""
    noise = cv2.GaussianBlur(rng.standard_normal(size).astype(np.float32), (0, 0), sigma)
    scaled: NDArray[np.float32] = (noise / (noise.std() + 1e-6)).astype(np.float32)
    return scaled


def expose(rng: np.random.Generator, image: NDArray[np.float32], blur: float, noise: float) -> Image:
    """Take the picture of an image in [0, 1]: blurred (sigma in pixels), noisy (standard deviation), uint8."""
    if blur:
        image = cv2.GaussianBlur(image, (0, 0), blur)  # type: ignore[assignment]
    noisy = image + rng.normal(0, noise, image.shape)
    return (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8)
