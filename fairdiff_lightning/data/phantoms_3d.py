"""Procedural, seeded volumes: lung nodules of three textures, a chest with lungs, and infarcted left ventricles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fairdiff_lightning.data.volumes import Size, Volume

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
TEXTURES = ("ground-glass", "part-solid", "solid")
LUNG, VESSEL, TISSUE, FAT, BONE, AIR = -860.0, 30.0, 40.0, -100.0, 500.0, -1000.0
"""HU."""


@dataclass(frozen=True)
class NoduleLook:
    """HU of a nodule's voxels: mean, spread, and how far they fall from the core to the rim, as a share of the spread.

    Mean and spread are those of the three lesions that LeFusion's authors publish as texture prototypes.
    """

    mean: float
    spread: float
    core: float


NODULE_LOOKS = (NoduleLook(-343, 238, 0.5), NoduleLook(-127, 176, 2.0), NoduleLook(69, 56, 1.0))
"""Of the three textures."""


class Labelled(NamedTuple):
    """A drawn image (H, W, D) and its mask of class indices, uint8."""

    image: Floats
    mask: NDArray[np.uint8]


class Chest(NamedTuple):
    """A drawn scan, its nodules and its lungs."""

    image: Volume
    nodules: Volume
    lungs: Volume


def lung_roi(rng: np.random.Generator, size: Size, texture: int | None) -> Labelled:
    """Draw a block of lung with vessels and a nodule in its middle.

    Args:
        rng: source of everything random.
        size: (H, W, D), voxels.
        texture: index into :data:`TEXTURES`; None draws a healthy block.

    Returns:
        HU, and mask {0, 1}.
    """
    image = _parenchyma(rng, size)
    mask = np.zeros(size, np.uint8)
    if texture is not None:
        centre = np.array(size) / 2 + rng.uniform(-0.05, 0.05, 3) * size
        _draw_nodule(rng, image, mask, centre, rng.uniform(0.16, 0.24) * min(size), texture)
    return Labelled(_scanned(rng, image), mask)


def nodule_shape(rng: np.random.Generator, size: Size, centre: NDArray[np.float64], radius: float) -> Floats:
    """Draw a lobed ball: distance from its centre as a share of its radius, (H, W, D), at most 1 inside."""
    steps = np.ogrid[tuple(slice(0, side) for side in size)]
    away = [axis - c for axis, c in zip(steps, centre, strict=True)]
    stretch = rng.uniform(0.8, 1.2, 3)
    distance = np.sqrt(sum((a / s) ** 2 for a, s in zip(away, stretch, strict=True)))
    waves = rng.normal(0, 1, (3, 3))
    lobes = sum(np.sin(sum(w * a for w, a in zip(wave, away, strict=True)) * 2 / radius) for wave in waves)
    return (distance / (radius * (1 + 0.08 * lobes))).astype(np.float32)  # type: ignore[no-any-return]


def chest(rng: np.random.Generator, size: Size = (96, 80, 60), spacing: float = 4.0, nodules: int = 3) -> Chest:
    """Draw a small CT of a chest on a couch, head up, in RAS order: two lungs, heart, spine, windpipe and nodules.

    Args:
        rng: source of everything random.
        size: (H, W, D), voxels.
        spacing: of the voxels, mm.
        nodules: how many, inside of the lungs, of textures in turn.

    Returns:
        int16 HU, mask {0, 1} of the nodules, and mask {0, 1} of the lungs, the nodules in it.
    """
    x, y, z = (
        np.linspace(-1, 1, side, dtype=np.float32)[(slice(None), *[None] * (2 - i))] for i, side in enumerate(size)
    )

    def ellipsoid(cx: float, cy: float, cz: float, rx: float, ry: float, rz: float) -> Bools:
        inside: Bools = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2 <= 1
        return inside

    whole = np.inf
    body, muscle = ellipsoid(0, 0, 0, 0.86, 0.74, whole), ellipsoid(0, 0, 0, 0.80, 0.67, whole)
    heart = ellipsoid(-0.12, 0.12, -0.25, 0.30, 0.32, 0.45)
    lungs = (ellipsoid(-0.42, 0, 0, 0.30, 0.50, 0.8) | ellipsoid(0.42, 0, 0.05, 0.30, 0.52, 0.8)) & ~heart
    spine, windpipe = ellipsoid(0, -0.5, 0, 0.09, 0.12, whole), ellipsoid(0, 0.0, 0.8, 0.04, 0.05, 0.5)
    couch = np.broadcast_to((y < -0.82) & (y > -0.88) & (np.abs(x) < 0.7), size)

    image = np.full(size, AIR, np.float32)
    for region, value in ((body, FAT), (muscle, TISSUE), (spine, BONE), (couch, FAT), (windpipe, AIR)):
        image[region] = value
    tissue = _parenchyma(rng, size)
    image[lungs] = tissue[lungs]

    mask = np.zeros(size, np.uint8)
    depth = ndimage.distance_transform_edt(lungs)
    for k in range(nodules):
        radius = rng.uniform(2.2, 3.2)
        room = np.argwhere((depth > 1.5 * radius) & ~ndimage.binary_dilation(mask, iterations=9))
        if len(room):
            _draw_nodule(rng, image, mask, room[rng.integers(len(room))].astype(float), radius, k % len(TEXTURES))
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -np.array(size) * spacing / 2
    scan = Volume(np.round(_scanned(rng, image)).astype(np.int16), affine)
    return Chest(scan, scan.with_array(mask), scan.with_array(lungs.astype(np.uint8)))


def left_ventricle(rng: np.random.Generator, size: Size = (80, 76, 10), infarct: bool = True) -> Labelled:
    """Draw short-axis slices of a left ventricle in late enhancement, from base to apex.

    Args:
        rng: source of everything random.
        size: (H, W, D), voxels.
        infarct: whether the wall has one, with no-reflow in its core.

    Returns:
        Intensities in [0, 1], the whole range used, and mask {0 background, 1 cavity, 2 myocardium, 3 infarct,
        4 no-reflow}.
    """
    height, width, depth = size
    unit = min(height, width)
    row, col = np.ogrid[:height, :width]
    centre = np.array([height, width]) / 2 + rng.uniform(-0.06, 0.06, 2) * unit
    level = np.linspace(0, 1, depth)
    y, x = (row - centre[0])[..., None], (col - centre[1])[..., None]
    distance, angle = np.hypot(y, x * rng.uniform(0.92, 1.08)), np.arctan2(y, x)
    taper = np.sqrt(1 - 0.75 * level**2)
    inner, wall = rng.uniform(0.15, 0.19) * unit * taper, rng.uniform(0.08, 0.10) * unit
    outer = inner + wall * (0.7 + 0.3 * taper)
    cavity = distance < inner
    ring = (distance < outer) & ~cavity
    mask = cavity.astype(np.uint8) + 2 * ring.astype(np.uint8)
    if infarct:
        towards, half = rng.uniform(-np.pi, np.pi), rng.uniform(0.5, 1.0)
        off = np.abs(np.angle(np.exp(1j * (angle - towards))))
        into = (distance - inner) / (outer - inner)
        reach = 1 - (np.abs(level - rng.uniform(0.3, 0.6)) / 0.45) ** 2
        scar = ring & (off < half * reach) & (into < 0.85)
        core = scar & (off < 0.5 * half * reach) & (into > 0.15) & (into < 0.6)
        mask[scar], mask[core] = 3, 4

    levels = np.array([0.22, 0.60, 0.30, 0.765, 0.715], np.float32)  # infarct and no-reflow as LeFusion's prototypes
    soft = ndimage.gaussian_filter(levels[mask], (0.5, 0.5, 0))
    chest_wall = 0.12 * _smooth(rng, size, unit / 10) * (mask == 0)
    image = soft + chest_wall + rng.normal(0, 0.02, size)
    image = (image - image.min()) / (image.max() - image.min())
    return Labelled(image.astype(np.float32), mask)


def _parenchyma(rng: np.random.Generator, size: Size) -> Floats:
    """Lung with branching vessels, HU."""
    clouds = _smooth(rng, size, min(size) / 6)
    tubes = _smooth(rng, size, 4), _smooth(rng, size, 4)
    vessels = np.exp(-((tubes[0] ** 2 + tubes[1] ** 2) / 0.06))  # two level sets meet along curves
    air: Floats = LUNG + 30 * clouds + (VESSEL - LUNG) * vessels
    return air


def _draw_nodule(
    rng: np.random.Generator,
    image: Floats,
    mask: NDArray[np.uint8],
    centre: NDArray[np.float64],
    radius: float,
    texture: int,
) -> None:
    """Put a nodule into image and mask; its voxels have the texture's mean and spread."""
    look = NODULE_LOOKS[texture]
    size = image.shape
    depth = nodule_shape(rng, (size[0], size[1], size[2]), centre, radius)
    inside = depth <= 1
    grain = _smooth(rng, (size[0], size[1], size[2]), 1.2)
    values = grain[inside] - look.core * np.tanh(4 * (depth[inside] - 0.6))
    image[inside] = look.mean + look.spread * (values - values.mean()) / values.std()
    mask[inside] = 1


def _scanned(rng: np.random.Generator, image: Floats) -> Floats:
    noisy = image + rng.normal(0, 12, image.shape).astype(np.float32)
    return np.clip(noisy, AIR, 3071)


def _smooth(rng: np.random.Generator, size: Size, sigma: float) -> Floats:
    """Noise of unit variance whose structures are about ``sigma`` voxels wide."""
    noise = ndimage.gaussian_filter(rng.standard_normal(size, np.float32), sigma, mode="wrap", truncate=3)
    scaled: Floats = noise / (noise.std() + 1e-6)
    return scaled
