"""The classical augmentations that DiffBoost is compared with: MONAI changes each sample, by draws of a batch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from scipy import ndimage
from torch import Tensor, nn

Name = Literal[
    "contrast", "gamma", "brightness", "noise", "low_resolution", "mirror", "rotate", "scale", "all", "deep_stack"
]
Draws = torch.Generator | None
Change = Literal["contrast", "gamma", "seldom_gamma", "brightness", "noise", "low_resolution"]


CONSTANT = 1e-5
"""Range, against the largest value or 1, up to which an image is constant: resampling one leaves rounding."""


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
        blur at the border  image mirrored                  nearest pixel repeated      none
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
        if not len(image):
            return image, mask
        low, high = self.intensity_range
        pairs = zip((image - low) * (2 / (high - low)) - 1, mask, strict=True)
        changed, labels = zip(*(self._change(*pair, generator) for pair in pairs), strict=True)
        joined = torch.stack(changed).to(image.dtype)
        joined = joined.clamp(-1, 1) if self.normalize == "clip" else stretch(joined)
        return (joined + 1) * ((high - low) / 2) + low, torch.stack(labels)

    def _change(self, image: Tensor, mask: Tensor, generator: Draws) -> tuple[Tensor, Tensor]:
        from monai.utils import convert_to_tensor

        if self.geometry is not None:
            image, mask = move(image, mask, self.geometry, generator)
        for change in self.intensities:
            image = draw_intensity(change, generator)(image)
        return convert_to_tensor(image, track_meta=False), convert_to_tensor(mask, track_meta=False)


def stretch(image: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Scale each image (B, ...) linearly to [low, high]; one that is constant, but for rounding, becomes ``low``."""
    from monai.transforms import rescale_array

    if not len(image):
        return image
    flat = image.flatten(1)
    constant = flat.amax(1) - flat.amin(1) <= CONSTANT * flat.abs().amax(1).clamp_min(1)
    scaled = torch.stack([rescale_array(sample, 0.0, 1.0, dtype=None) for sample in image])
    shape = (-1, *[1] * (image.dim() - 1))
    return scaled.where(~constant.view(shape), scaled.new_zeros(())) * (high - low) + low


def move(image: Tensor, mask: Tensor, geometry: Geometry, generator: Draws = None) -> tuple[Tensor, Tensor]:
    """Move image (C, H, W[, D]) and mask (1, H, W[, D]) alike, by one resampling and then flips."""
    from monai.transforms import Flip, Resample

    grid = draw_grid(image, geometry, generator)
    if grid is not None:
        mode = "bicubic" if image.dim() == 3 else "bilinear"
        image = Resample(mode, geometry.border, dtype=image.dtype)(image, grid)
        mask = Resample("nearest", "zeros", dtype=torch.float32)(mask, grid).to(mask.dtype)
    mirrored = _happens(geometry.p_mirror, generator)
    axes = [axis for axis in range(image.dim() - 1) if mirrored and _happens(0.5, generator)]
    return (Flip(axes)(image), Flip(axes)(mask)) if axes else (image, mask)


def draw_grid(image: Tensor, geometry: Geometry, generator: Draws = None) -> Tensor | None:
    """Draw where the voxels of an image (C, H, W[, D]) come from, or None when they stay.

    Returns:
        MONAI's grid (3 or 4, H, W[, D]) of voxels from the centre, displaced by noise that is blurred by 9 to 13 voxels
        and multiplied by 0 to 200, then turned and scaled.
    """
    from monai.transforms import AffineGrid, create_grid

    size = image.shape[1:]
    rotates, scales, bends = (_happens(p, generator) for p in (geometry.p_rotate, geometry.p_scale, geometry.p_elastic))
    rotates, scales = rotates and geometry.degrees > 0, scales and geometry.scale != (1.0, 1.0)
    if not (rotates or scales or bends):
        return None
    grid: Tensor = create_grid(size, dtype=torch.float32, device=image.device, backend="torch")
    if bends:
        noise = 2 * torch.rand(len(size), *size, generator=generator).numpy() - 1
        axes = tuple(range(1, noise.ndim))
        smooth = ndimage.gaussian_filter(noise, _uniform(9, 13, generator), mode="constant", axes=axes)
        grid[:-1] += torch.from_numpy(_uniform(0, 200, generator) * smooth).to(grid)
    angle = _uniform(-geometry.degrees, geometry.degrees, generator) * torch.pi / 180 if rotates else 0.0
    scale = _around_one(*geometry.scale, generator) if scales else 1.0
    rotation = (angle,) if len(size) == 2 else (0.0, 0.0, angle)
    moved: Tensor = AffineGrid(rotation, scale_params=(scale,) * len(size))(grid=grid)[0]
    return moved


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur an image (C, H, W[, D]) by ``sigma`` voxels, with the nearest outside (``GaussianSmooth`` takes 0)."""
    from monai.networks.layers import gaussian_1d, separable_filtering

    kernel = gaussian_1d(torch.tensor(sigma), approx="sampled", normalize=True)
    blurred: Tensor = separable_filtering(image[None], [kernel] * (image.dim() - 1), "replicate")[0]
    return blurred


def draw_intensity(change: Change, generator: Draws = None) -> Callable[[Tensor], Tensor]:
    """Draw a transform of images (C, H, W[, D]) in [-1, 1]."""
    from monai.transforms import AdjustContrast, Identity, RandGaussianNoise, ScaleIntensityFixedMean, ShiftIntensity

    drawn: Callable[[Tensor], Tensor] = Identity()
    if change == "contrast":
        drawn = ScaleIntensityFixedMean(_around_one(0.75, 1.25, generator) - 1, preserve_range=True, dtype=None)
    elif change == "gamma":
        drawn = AdjustContrast(_around_one(0.7, 1.5, generator))
    elif change == "seldom_gamma" and _happens(0.3, generator):
        drawn = AdjustContrast(_around_one(0.7, 1.5, generator), retain_stats=True)
    elif change == "brightness":
        drawn = ShiftIntensity(0.5 * torch.randn((), generator=generator).item())
    elif change == "noise":  # MONAI draws the standard deviation too, from 0 to the largest
        seed = int(torch.randint(2**31, (), generator=generator))
        drawn = RandGaussianNoise(prob=1.0, std=0.05).set_random_state(seed)
    elif change == "low_resolution" and _happens(0.5, generator):
        drawn = partial(gaussian_blur, sigma=_uniform(0.5, 1.5, generator))
    return drawn


def _happens(p: float, generator: Draws) -> bool:
    return _uniform(0, 1, generator) < p


def _uniform(low: float, high: float, generator: Draws) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _around_one(low: float, high: float, generator: Draws) -> float:
    """Uniform below 1 or above, each with probability 0.5."""
    return _uniform(low, 1, generator) if _happens(0.5, generator) else _uniform(1, high, generator)


GEOMETRIES = {
    "mirror": Geometry(p_mirror=0.75),
    "rotate": Geometry(degrees=5),
    "scale": Geometry(scale=(0.95, 1.05)),
    "all": Geometry(degrees=5, scale=(0.95, 1.05), p_mirror=0.75),
    "deep_stack": Geometry(180, (0.85, 1.25), p_rotate=0.2, p_scale=0.2, p_mirror=1, p_elastic=0.2, border="zeros"),
}
INTENSITIES: dict[str, tuple[Change, ...]] = {
    "contrast": ("contrast",),
    "gamma": ("gamma",),
    "brightness": ("brightness",),
    "noise": ("noise",),
    "low_resolution": ("low_resolution",),
    "all": ("low_resolution", "contrast", "gamma", "brightness", "noise"),
    "deep_stack": ("seldom_gamma",),
}
