"""Procedural, seeded male pelvises: one anatomy, seen by CT or MRI, and a target that grows with the T stage."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fairdiff_lightning.data.volumes import RAS, Size

Affine = NDArray[np.float64]
Bools = NDArray[np.bool_]
STAGES = ("T1", "T2", "T3", "T4")
MARGINS = (0.0, 4.0, 5.0, 6.0)
"""Of the target around the prostate, by stage, mm."""


class Tissue(IntEnum):
    """What a voxel of the drawn anatomy is."""

    AIR = 0
    FAT = 1
    MUSCLE = 2
    BONE = 3
    URINE = 4
    BOWEL = 5
    GAS = 6
    VESICLE = 7
    PERIPHERAL_ZONE = 8
    TRANSITION_ZONE = 9


HU = np.array([-1000, -100, 55, 420, 6, 38, -550, 28, 42, 46], np.float32)
"""By tissue."""
T2 = np.array([10, 600, 160, 240, 900, 300, 20, 680, 560, 330], np.float32)
"""By tissue, arbitrary units."""
ADC = np.array([0, 200, 900, 250, 2800, 1100, 0, 1900, 1600, 1200], np.float32)
"""By tissue, square micrometres per second."""


@dataclass(frozen=True)
class Scanner:
    """How a centre's CT shows the anatomy.

    Args:
        spacing: of the voxels, mm.
        offset: added to every voxel, HU.
        noise: standard deviation, HU.
        blur: standard deviation of the point-spread function, voxels.
        axes: directions that the axes of the files run to.
    """

    spacing: tuple[float, float, float]
    offset: float
    noise: float
    blur: float
    axes: tuple[str, ...] = RAS


SCANNERS = (Scanner((4.0, 4.0, 3.0), 0, 12, 0.5), Scanner((4.8, 4.8, 3.0), 30, 25, 0.8, ("L", "P", "S")))
"""Of the centres A and B."""


class Pelvis(NamedTuple):
    """A drawn anatomy (H, W, D) of :class:`Tissue`, uint8, and the target of each stage (4, H, W, D)."""

    tissue: NDArray[np.uint8]
    targets: Bools


@dataclass(frozen=True)
class _Space:
    """Coordinates of the voxels, mm, from the middle of the prostate."""

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    z: NDArray[np.float32]

    def away(self, centre: tuple[float, float, float], radii: tuple[float, float, float], paired: bool = False) -> Any:
        """Distance from the middle of an ellipsoid, at most 1 inside; ``paired`` draws it left and right."""
        x = np.abs(self.x) if paired else self.x
        off = zip((x, self.y, self.z), centre, radii, strict=True)
        return np.sqrt(sum(((axis - c) / r) ** 2 for axis, c, r in off))


def grid_affine(size: Size, spacing: tuple[float, float, float]) -> Affine:
    """Place a grid (RAS) around the prostate, a little more of it above than below.

    Args:
        size: (H, W, D), voxels.
        spacing: mm.

    Returns:
        Voxel to mm (4, 4).
    """
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array([0.5, 0.5, 0.42]) * (np.array(size) - 1) * spacing
    return affine


def pelvis(rng: np.random.Generator, size: Size, affine: Affine) -> Pelvis:
    """Draw body, muscles, bones, bladder, rectum, prostate with its two zones, and seminal vesicles.

    The target is the prostate (T1), with a rim (T2), with the vesicles' proximal part (T3), with all of them and the
    neck of the bladder (T4); each holds the one before. The anatomy says nothing of the stage.

    Args:
        rng: source of everything random.
        size: (H, W, D), voxels.
        affine: voxel to mm, of a grid in RAS order.
    """
    space = _space(rng, size, affine)
    radii = np.array([24.0, 17.0, 20.0]) * rng.uniform(0.85, 1.15, 3)
    lobes = 1 + 0.05 * _lobes(rng, space)
    base = float(radii[2])
    tissue = _surroundings(rng, space, size)
    bladder = rng.uniform(14, 24)
    tissue[space.away((0, 8, base + bladder - 6), (bladder + 14, bladder + 8, bladder)) <= 1] = Tissue.URINE
    vesicles = [space.away(*_vesicle(base, margin), paired=True) for margin in (0.0, 2.0, 3.0)]
    tissue[vesicles[0] <= 1] = Tissue.VESICLE
    prostate = [space.away((0, 0, 0), _triple(radii + margin)) / lobes <= 1 for margin in MARGINS]
    tissue[prostate[0]] = Tissue.PERIPHERAL_ZONE
    inner = space.away((0, 4, 3), _triple(0.68 * radii)) <= 1
    tissue[prostate[0] & inner] = Tissue.TRANSITION_ZONE

    neck = (space.away((0, 2, base), (13, 12, 12)) <= 1) & (tissue == Tissue.URINE)
    proximal = (vesicles[1] <= 1) & (np.abs(space.x) < 15)
    reach = [
        prostate[0],
        prostate[1],
        prostate[2] | proximal,
        prostate[3] | (vesicles[2] <= 1),
    ]
    barrier = np.isin(tissue, (Tissue.BONE, Tissue.BOWEL, Tissue.GAS, Tissue.URINE))
    targets = np.stack([part & ~barrier for part in reach])
    targets[3] |= neck
    return Pelvis(tissue, targets)


def ct(rng: np.random.Generator, tissue: NDArray[np.uint8], scanner: Scanner) -> NDArray[np.int16]:
    """Show an anatomy as CT.

    Args:
        rng: source of everything random.
        tissue: (H, W, D) of :class:`Tissue`.
        scanner: the centre's.

    Returns:
        HU (H, W, D).
    """
    levels = HU + rng.normal(0, 5, len(HU)).astype(np.float32)
    image = ndimage.gaussian_filter(levels[tissue], scanner.blur, truncate=3)
    image += scanner.offset + scanner.noise * rng.standard_normal(tissue.shape, np.float32)
    stored: NDArray[np.int16] = np.round(np.clip(image, -1024, 3071)).astype(np.int16)
    return stored


def mr(rng: np.random.Generator, tissue: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Show an anatomy as MRI, its T2-weighted volume and its map of diffusion.

    Args:
        rng: source of everything random.
        tissue: (H, W, D) of :class:`Tissue`.

    Returns:
        Intensities of 0 and more (H, W, D, 2).
    """
    gain = rng.uniform(0.7, 1.4)
    seen = [ndimage.gaussian_filter(levels[tissue], 0.5, truncate=3) for levels in (gain * T2, ADC)]
    noise = rng.standard_normal((*tissue.shape, 2), np.float32) * np.array([25, 60], np.float32)
    values: NDArray[np.float32] = np.clip(np.stack(seen, -1) + noise, 0, None)
    return values


def _space(rng: np.random.Generator, size: Size, affine: Affine) -> _Space:
    """The patient lies a little off the middle."""
    start = affine[:3, 3] - rng.uniform(-1, 1, 3) * [8, 6, 5]
    x, y, z = np.ogrid[tuple(slice(0, side) for side in size)]
    return _Space(*((axis * affine[i, i] + start[i]).astype(np.float32) for i, axis in enumerate((x, y, z))))


def _surroundings(rng: np.random.Generator, space: _Space, size: Size) -> NDArray[np.uint8]:
    """Body, muscles, the cavity's fat, bones and rectum."""
    whole, girth = np.inf, rng.uniform(0.92, 1.08)
    tissue = np.zeros(size, np.uint8)
    layers = (
        (Tissue.FAT, space.away((0, -5, 0), (122 * girth, 88 * girth, whole))),
        (Tissue.MUSCLE, space.away((0, -5, 0), (104, 70, whole))),
        (Tissue.FAT, space.away((0, -2, 8), (56, 50, 80))),
        (Tissue.BONE, space.away((24, 47, -8), (22, 8, 17), paired=True)),
        (Tissue.BONE, space.away((82, 0, 14), (20, 20, 22), paired=True)),
        (Tissue.BONE, space.away((54, -36, -16), (11, 14, 24), paired=True)),
        (Tissue.BONE, space.away((0, -62, 26), (20, 9, 36))),
    )
    for kind, away in layers:
        tissue[np.broadcast_to(away, size) <= 1] = kind
    width, bend = rng.uniform(11, 15), rng.uniform(2, 6)
    behind = space.y + 34 + bend * np.sin(space.z / 22)
    bowel = np.broadcast_to(np.hypot(space.x, behind), size)
    tissue[bowel <= width] = Tissue.BOWEL
    tissue[bowel <= rng.uniform(0.2, 0.6) * width] = Tissue.GAS
    return tissue


def _lobes(rng: np.random.Generator, space: _Space) -> NDArray[np.float32]:
    """Waves that make an ellipsoid uneven, in about [-1, 1]."""
    waves = rng.normal(0, 1 / 14, (3, 3)).astype(np.float32)
    lobes: NDArray[np.float32] = sum(np.sin(a * space.x + b * space.y + c * space.z) for a, b, c in waves) / 3
    return lobes


def _vesicle(base: float, margin: float) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Middle and radii of the right vesicle, which begins behind the base of the prostate."""
    return (16, -13, base), (18 + margin, 7 + margin, 8 + margin)


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third
