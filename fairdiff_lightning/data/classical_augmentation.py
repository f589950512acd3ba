"""The classical augmentations that DiffBoost is compared with, each sample its own, on the batch's device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Name = Literal[
    "contrast", "gamma", "brightness", "noise", "low_resolution", "mirror", "rotate", "scale", "all", "deep_stack"
]
Draws = torch.Generator | None
Intensity = Callable[[Tensor, Draws], Tensor]
"""Maps image (B, C, H, W[, D]) in [-1, 1] and a generator to the image."""


@dataclass(frozen=True)
class Geometry:
    """A random move.

    Args:
        degrees: largest angle of the rotation, in the plane of the first two axes.
        scale: smallest and largest size of the part of the image that is seen, against the image; below 1 zooms in.
        p_rotate: probability of a rotation.
        p_scale: probability of a scaling.
        p_mirror: probability that flips are drawn, each axis then with probability 0.5.
        p_elastic: probability of an elastic deformation.
        border: what image lies outside: the nearest pixel, or 0. Masks are 0 there.
    """

    degrees: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    p_rotate: float = 1.0
    p_scale: float = 1.0
    p_mirror: float = 0.0
    p_elastic: float = 0.0
    border: Literal["border", "zeros"] = "border"


class ClassicalAugmentation(nn.Module):
    """One row of DiffBoost's comparison (Table II), with the numbers of its code.

    ==================  =================================================================================
    ``name``            What
    ==================  =================================================================================
    ``contrast``        distance from the mean times 0.75 to 1.25, within the image's own range
    ``gamma``           power of 0.7 to 1.5 on the image's own range, as often below 1 as above
    ``brightness``      plus a normal number of standard deviation 0.5
    ``noise``           plus Gaussian noise of standard deviation 0 to 0.05
    ``low_resolution``  in half of the samples Gaussian blur, standard deviation 0.5 to 1.5 pixels
    ``mirror``          in three quarters of the samples flips, each axis with probability 0.5
    ``rotate``          by -5 to 5 degrees
    ``scale``           by 0.95 to 1.05
    ``all``             the eight above together, which is how the paper describes its row "DeepStack"
    ``deep_stack``      the row as the code means it: seldom elastic deformation, rotation by up to 180
                        degrees, scale 0.85 to 1.25 and gamma with the statistics kept, always flips
    ==================  =================================================================================

    The numbers are for images in [-1, 1], to which those of another range are taken and from which they come back.
    Where moved, images are interpolated bicubically (volumes linearly), masks take the nearest voxel. Volumes rotate
    in the plane of their first two axes and scale along all three.

    Differences from the reference:
        ==================  ==============================  ==========================  ========================
        What                Reference code                  Here                        To restore
        ==================  ==============================  ==========================  ========================
        values at last      min-max of each image to the    clipped to the range        ``normalize="minmax"``
                            range, which undoes brightness
        ``deep_stack``      resolves to nothing but min-    applied                     none
                            max, by mistake
        interpolation       cubic spline                    cubic convolution           none
        several channels    contrast, brightness, noise,    one draw for a sample       none
                            blur drawn for each
        ==================  ==============================  ==========================  ========================

    Args:
        name: of the table above.
        intensity_range: smallest and largest value of the images.
        normalize: ``clip`` to the range, or stretch each image to it by ``minmax``.

    Raises:
        ValueError: for names that are not in the table, or a range of no width.
    """

    def __init__(
        self,
        name: Name,
        intensity_range: tuple[float, float] = (0.0, 1.0),
        normalize: Literal["clip", "minmax"] = "clip",
    ) -> None:
        super().__init__()
        if name not in get_args(Name):
            raise ValueError(f"augmentation {name!r}: expected one of {', '.join(get_args(Name))}.")
        if normalize not in ("clip", "minmax"):
            raise ValueError(f"normalize={normalize!r}: expected 'clip' or 'minmax'.")
        if not intensity_range[0] < intensity_range[1]:
            raise ValueError(f"intensity_range={intensity_range}: expected the smallest value, then the largest.")
        self.name, self.intensity_range, self.normalize = name, intensity_range, normalize
        self.geometry, self.intensities = GEOMETRIES.get(name), INTENSITIES.get(name, ())

    def forward(self, image: Tensor, mask: Tensor, generator: Draws = None) -> tuple[Tensor, Tensor]:
        """Transform image (B, C, H, W[, D]) and, where it moves, mask (B, 1, H, W[, D]); their shapes stay.

        Args:
            image: floating point, in ``intensity_range``.
            mask: class indices.
            generator: CPU generator of the draws; the global one when None.

        Raises:
            ValueError: when the image is not floating point, or image and mask are not of one size.
        """
        if not image.is_floating_point() or image.dim() not in (4, 5):
            raise ValueError(
                f"image is {image.dtype} of shape {tuple(image.shape)}: expected floating point (B, C, H, W[, D])."
            )
        if mask.shape != (len(image), 1, *image.shape[2:]):
            raise ValueError(f"mask has shape {tuple(mask.shape)} for an image of shape {tuple(image.shape)}.")
        low, high = self.intensity_range
        image = (image - low) * (2 / (high - low)) - 1
        if self.geometry is not None:
            image, mask = move(image, mask, self.geometry, generator)
        for change in self.intensities:
            image = change(image, generator)
        image = image.clamp(-1, 1) if self.normalize == "clip" else stretch(image)
        return (image + 1) * ((high - low) / 2) + low, mask


def adjust_contrast(image: Tensor, factor: Tensor) -> Tensor:
    """Multiply the distance of each image (B, ...) from its mean by its factor (B,), within its own range."""
    flat = image.flatten(1)
    mean, smallest, largest = (_each(value, image) for value in (flat.mean(1), flat.amin(1), flat.amax(1)))
    return ((image - mean) * _each(factor, image) + mean).clamp(smallest, largest)


def adjust_gamma(image: Tensor, gamma: Tensor, retain_stats: bool = False) -> Tensor:
    """Raise each image (B, ...), scaled to [0, 1], to its power (B,); back to its range, or to its mean and spread."""
    flat = image.flatten(1)
    smallest, largest = _each(flat.amin(1), image), _each(flat.amax(1), image)
    span = (largest - smallest).clamp_min(1e-7)
    powered = ((image - smallest) / span) ** _each(gamma, image) * span + smallest
    if not retain_stats:
        return powered
    spread, mean = torch.std_mean(powered.flatten(1), 1)
    shape = flat.std(1) / spread.clamp_min(1e-8)
    return (powered - _each(mean, image)) * _each(shape, image) + _each(flat.mean(1), image)


def gaussian_blur(image: Tensor, sigma: Tensor, border: Literal["replicate", "constant"] = "replicate") -> Tensor:
    """Blur each image (B, C, H, W[, D]) by its ``sigma`` (B,), pixels, on the CPU; 0 leaves an image as it is."""
    radius = int(4 * float(sigma.max()) + 0.5)
    if radius == 0:
        return image
    offsets = torch.arange(-radius, radius + 1)
    weight = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)
    weight = (weight / weight.sum(1, keepdim=True)).to(image, non_blocking=True)
    count, axes = image.shape[0] * image.shape[1], image.dim() - 2
    kernel = weight.repeat_interleave(image.shape[1], 0)
    convolve = F.conv2d if axes == 2 else F.conv3d
    blurred = image.reshape(1, count, *image.shape[2:])
    for axis in range(axes):
        margin = [0] * (2 * axes)
        margin[2 * (axes - 1 - axis) : 2 * (axes - axis)] = [radius, radius]
        line = kernel.view(count, 1, *(-1 if d == axis else 1 for d in range(axes)))
        blurred = convolve(F.pad(blurred, margin, mode=border), line, groups=count)
    return blurred.view_as(image)


def stretch(image: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Scale each image (B, ...) linearly to [low, high]; a constant one becomes ``low``."""
    smallest, largest = (_each(value, image) for value in image.flatten(1).aminmax(dim=1))
    span = (largest - smallest).clamp_min(torch.finfo(image.dtype).tiny)
    return (image - smallest) / span * (high - low) + low


def move(image: Tensor, mask: Tensor, geometry: Geometry, generator: Draws = None) -> tuple[Tensor, Tensor]:
    """Move image (B, C, H, W[, D]) and mask (B, 1, H, W[, D]) alike, by one resampling and then flips."""
    if geometry.degrees > 0 or geometry.scale != (1.0, 1.0):
        matrices = draw_matrices(len(image), image.dim() - 2, geometry, generator)
        offsets = draw_elastic(image, geometry.p_elastic, generator) if geometry.p_elastic > 0 else None
        image, mask = resample(image, mask, matrices, offsets, geometry.border)
    if geometry.p_mirror == 0:
        return image, mask
    chosen = _chance(len(image), geometry.p_mirror, generator)
    for axis in range(2, image.dim()):
        flips = _each(chosen & _chance(len(image), 0.5, generator), image)
        image, mask = (torch.where(flips, moved.flip(axis), moved) for moved in (image, mask))
    return image, mask


def draw_matrices(count: int, axes: int, geometry: Geometry, generator: Draws = None) -> Tensor:
    """Draw the (count, axes, axes) rotations and scalings that map output to input coordinates about the centre."""
    angle = (2 * torch.rand(count, generator=generator) - 1) * geometry.degrees * torch.pi / 180
    angle = angle * _chance(count, geometry.p_rotate, generator)
    scaled = _chance(count, geometry.p_scale, generator)
    scale = torch.where(scaled, _around_one(count, geometry.scale, generator), torch.ones(()))
    matrices = torch.eye(axes).repeat(count, 1, 1)
    cos, sin = angle.cos(), angle.sin()
    matrices[:, :2, :2] = torch.stack([cos, sin, -sin, cos], -1).view(-1, 2, 2)
    return matrices * scale[:, None, None]


def draw_elastic(image: Tensor, p: float, generator: Draws = None) -> Tensor:
    """Draw displacements (B, axes, H, W[, D]), pixels: uniform noise, blurred, times 0 to 200; 0 with chance 1 - p."""
    count, axes = len(image), image.dim() - 2
    magnitude = 200 * torch.rand(count, generator=generator) * _chance(count, p, generator)
    sigma = 9 + 4 * torch.rand(count, generator=generator)
    noise = 2 * torch.rand(count, axes, *image.shape[2:], generator=generator) - 1
    smooth = gaussian_blur(noise.to(image.device, non_blocking=True), sigma, "constant")
    return smooth * _each(magnitude, smooth)


def resample(
    image: Tensor,
    mask: Tensor,
    matrices: Tensor,
    offsets: Tensor | None = None,
    border: Literal["border", "zeros"] = "border",
) -> tuple[Tensor, Tensor]:
    """Resample image (B, C, H, W[, D]) and mask (B, 1, H, W[, D]) where output coordinates map to.

    Args:
        image: floating point.
        mask: class indices; the nearest is taken, 0 outside.
        matrices: (B, axes, axes), output to input coordinates about the centre, pixels.
        offsets: (B, axes, H, W[, D]) added to the output coordinates first, pixels.
        border: what image lies outside.
    """
    size = image.shape[2:]
    lines = [torch.arange(n, device=image.device, dtype=image.dtype) - (n - 1) / 2 for n in size]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij")).expand(len(image), -1, *size)
    moved_from = places if offsets is None else places + offsets
    places = torch.einsum("bij,bj...->b...i", matrices.to(image, non_blocking=True), moved_from)
    grid = torch.stack([places[..., axis] * (2 / size[axis]) for axis in reversed(range(len(size)))], -1)
    mode = "bicubic" if len(size) == 2 else "bilinear"
    moved = F.grid_sample(image, grid, mode=mode, padding_mode=border, align_corners=False)
    labels = F.grid_sample(mask.to(image.dtype), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved, labels.to(mask.dtype)


def _contrast(image: Tensor, generator: Draws) -> Tensor:
    return adjust_contrast(image, _around_one(len(image), (0.75, 1.25), generator))


def _gamma(image: Tensor, generator: Draws, p: float = 1.0, retain_stats: bool = False) -> Tensor:
    changed = adjust_gamma(image, _around_one(len(image), (0.7, 1.5), generator), retain_stats)
    return torch.where(_each(_chance(len(image), p, generator), image), changed, image)


def _brightness(image: Tensor, generator: Draws) -> Tensor:
    return image + _each(0.5 * torch.randn(len(image), generator=generator), image)


def _noise(image: Tensor, generator: Draws) -> Tensor:
    sigma = 0.05 * torch.rand(len(image), generator=generator)
    noise = torch.randn(image.shape, generator=generator)
    return image + (noise * _each(sigma, noise)).to(image, non_blocking=True)


def _low_resolution(image: Tensor, generator: Draws) -> Tensor:
    sigma = 0.5 + torch.rand(len(image), generator=generator)
    return gaussian_blur(image, sigma * _chance(len(image), 0.5, generator))


def _each(values: Tensor, like: Tensor) -> Tensor:
    """One value (B,) for each sample of (B, ...), to broadcast, on its device."""
    return values.view(-1, *[1] * (like.dim() - 1)).to(like.device, non_blocking=True)


def _chance(count: int, p: float, generator: Draws) -> Tensor:
    return torch.rand(count, generator=generator) < p


def _around_one(count: int, limits: tuple[float, float], generator: Draws) -> Tensor:
    """Uniform below 1 or above, each with probability 0.5."""
    below, part = _chance(count, 0.5, generator), torch.rand(count, generator=generator)
    return 1 + part * (torch.where(below, limits[0], limits[1]) - 1)


GEOMETRIES = {
    "mirror": Geometry(p_mirror=0.75),
    "rotate": Geometry(degrees=5),
    "scale": Geometry(scale=(0.95, 1.05)),
    "all": Geometry(degrees=5, scale=(0.95, 1.05), p_mirror=0.75),
    "deep_stack": Geometry(180, (0.85, 1.25), p_rotate=0.2, p_scale=0.2, p_mirror=1, p_elastic=0.2, border="zeros"),
}
INTENSITIES: dict[str, tuple[Intensity, ...]] = {
    "contrast": (_contrast,),
    "gamma": (_gamma,),
    "brightness": (_brightness,),
    "noise": (_noise,),
    "low_resolution": (_low_resolution,),
    "all": (_low_resolution, _contrast, _gamma, _brightness, _noise),
    "deep_stack": (partial(_gamma, p=0.3, retain_stats=True),),
}
