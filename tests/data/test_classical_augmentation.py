from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from fairdiff_lightning.data.classical_augmentation import (
    GEOMETRIES,
    INTENSITIES,
    ClassicalAugmentation,
    Geometry,
    draw_grid,
    draw_intensity,
    gaussian_blur,
    move,
    stretch,
)

NAMES = sorted({**GEOMETRIES, **INTENSITIES})
MOVING = sorted(GEOMETRIES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=5, size=(12, 18), channels=2):
    image = torch.stack([gaussian_blur(sample, 1.5) for sample in torch.rand(count, channels, *size)])
    image = stretch(image, 0.1, 0.9)
    return image, (image[:, :1] * 4).long()


@pytest.mark.parametrize("size", [(40, 46), (40, 30, 6)])
@pytest.mark.parametrize("normalize", ["clip", "minmax"])
@pytest.mark.parametrize("name", NAMES)
def test_samples_stay_in_range_and_only_moves_move_the_mask(name, normalize, size):
    image, mask = batch(size=size)
    changed, labels = ClassicalAugmentation(name, normalize=normalize)(image, mask, seeded())
    assert (changed.shape, changed.dtype, labels.shape, labels.dtype) == (
        image.shape,
        image.dtype,
        mask.shape,
        mask.dtype,
    )
    assert changed.isfinite().all()
    assert 0 <= changed.min() < changed.max() <= 1
    assert not torch.equal(changed, image)
    assert set(labels.unique().tolist()) <= {0, *mask.unique().tolist()}
    assert torch.equal(labels, mask) == (name not in MOVING)
    if normalize == "minmax":
        torch.testing.assert_close(
            torch.stack(changed.flatten(1).aminmax(dim=1)), torch.tensor([0.0, 1.0]).view(2, 1).expand(2, 5)
        )


@pytest.mark.parametrize("name", NAMES)
def test_draws_come_from_the_generator_alone_and_differ_between_samples(name):
    image, mask = (x[:1].expand(24, *x.shape[1:]) for x in batch())
    first = ClassicalAugmentation(name)(image, mask, seeded(3))
    torch.rand(5), np.random.seed(1)  # noqa: NPY002 - the legacy generator is what MONAI draws from by default
    again = ClassicalAugmentation(name)(image, mask, seeded(3))
    assert all(map(torch.equal, first, again))
    assert len({tuple(sample.flatten().tolist()) for sample in first[0]}) > 3


@pytest.mark.parametrize("name", NAMES)
def test_images_of_another_range_are_changed_alike(name):
    image, mask = batch()
    unit, labels = ClassicalAugmentation(name)(image, mask, seeded())
    signed, signed_labels = ClassicalAugmentation(name, (-1.0, 1.0))(2 * image - 1, mask, seeded())
    torch.testing.assert_close(signed, 2 * unit - 1, atol=1e-5, rtol=0)
    assert torch.equal(labels, signed_labels)


def change(image, kind, seed=0):
    return draw_intensity(kind, seeded(seed))(image)


def test_contrast_and_gamma_are_the_papers_formulas():
    image = batch(1)[0][0].double()
    low, high = image.aminmax()
    contrast = change(image, "contrast")
    inside = (contrast > low) & (contrast < high)
    slope = (contrast - image.mean())[inside] / (image - image.mean())[inside]
    torch.testing.assert_close(slope, slope[:1].expand_as(slope))
    assert 0.75 <= slope[0] <= 1.25
    assert slope[0] != 1
    assert low <= contrast.min() < contrast.max() <= high
    gamma = change(image, "gamma")
    span, inner = high - low, image.flatten()[1:50]
    power = ((gamma.flatten()[1:50] - low) / span).log() / ((inner - low) / span).log()
    torch.testing.assert_close(power, power[:1].expand_as(power), atol=1e-4, rtol=0)
    assert 0.7 <= power[0] <= 1.5
    seed = next(s for s in range(20) if not torch.equal(change(image, "seldom_gamma", s), image))
    kept = change(image, "seldom_gamma", seed)
    assert (kept.mean(), kept.std()) == (pytest.approx(image.mean()), pytest.approx(image.std()))
    order = image.flatten().argsort()
    assert (kept.flatten()[order].diff() >= 0).all(), "a power keeps the order"


@pytest.mark.parametrize("size", [(12, 18), (12, 10, 6)])
@pytest.mark.parametrize("sigma", [0.5, 1.5])
def test_blur_is_scipys(size, sigma):
    image = torch.rand(2, *size)
    expected = ndimage.gaussian_filter(image.numpy(), sigma, mode="nearest", axes=tuple(range(1, image.dim())))
    np.testing.assert_allclose(gaussian_blur(image, sigma), expected, atol=1e-5)


@pytest.mark.parametrize("border", ["zeros", "border"])
@pytest.mark.parametrize("size", [(19, 34), (19, 14, 6)])
def test_image_and_mask_move_as_scipy_moves_them_to_the_drawn_places(size, border):
    geometry = Geometry(40, (0.6, 1.6), p_elastic=1, border=border)
    coarse = torch.rand(2, *size)
    image, mask = gaussian_blur(coarse, 1.5), torch.randint(3, (1, *size))
    grid = draw_grid(image, geometry, seeded())
    moved, labels = move(image, mask, geometry, seeded())
    places = grid[:-1].numpy() + (np.array(size).reshape(-1, *[1] * len(size)) - 1) / 2
    expected = ndimage.map_coordinates(mask[0].numpy(), places, order=0, mode="grid-constant")
    assert np.mean(labels[0].numpy() == expected) > 0.99, "all but ties"
    order, mode = (1, {"zeros": "grid-constant", "border": "nearest"}[border]) if len(size) == 3 else (3, "mirror")
    for channel, found in zip(image, moved, strict=True):
        near = ndimage.map_coordinates(channel.numpy(), places, order=order, mode=mode)
        sides = [(at > 2) & (at < n - 3) for at, n in zip(places, size, strict=True)]
        where = np.logical_and.reduce(sides) if len(size) == 2 else np.ones(size, bool)
        assert where.mean() > 0.3
        np.testing.assert_allclose(np.asarray(found)[where], near[where], atol=2e-2 if len(size) == 2 else 1e-4)


def test_a_ramp_is_zoomed_about_its_centre_and_what_lies_outside_is_background():
    rows, closer = torch.arange(20.0).view(1, 20, 1).expand(1, 20, 20), Geometry(scale=(0.5, 0.5))
    scale = draw_grid(rows, closer, seeded())[0].diff(dim=0)[0, 0]
    assert 0.5 <= scale < 0.9
    moved, labels = move(rows, rows.long() + 1, closer, seeded())
    torch.testing.assert_close(moved[0, :, 3].as_tensor(), 9.5 + (torch.arange(20) - 9.5) * scale, atol=0.1, rtol=0)
    assert labels.min() > 0
    _, shrunk = move(rows, torch.ones_like(rows).long(), Geometry(scale=(3.0, 3.0)), seeded())
    assert (shrunk[0, 10, 10], shrunk[0, 0, 0]) == (1, 0)


def test_what_is_not_drawn_is_not_resampled():
    image, mask = (part[0] for part in batch())
    still = Geometry(5, (0.9, 1.1), p_rotate=0, p_scale=0)
    assert draw_grid(image, still, seeded()) is None
    assert move(image, mask, still, seeded())[0] is image


def drawn_matrices(geometry, count, axes=2):
    """The (count, axes, axes) rotations and scalings of voxels from the centre."""
    generator, image = seeded(), torch.zeros(1, *[2] * axes)
    grids = [draw_grid(image, geometry, generator) for _ in range(count)]
    ends = torch.stack([torch.eye(axes) if grid is None else edges_of_cube(grid, axes) for grid in grids])
    return ends.double()


def edges_of_cube(grid, axes):
    """Where the unit vectors go, from the corners of a cube of two voxels."""
    return torch.stack([grid[:axes].diff(dim=axis + 1).flatten(1)[:, 0] for axis in range(axes)], 1)


@pytest.mark.parametrize("axes", [2, 3])
def test_moves_have_the_papers_ranges(axes):
    matrices = drawn_matrices(Geometry(degrees=5, scale=(0.95, 1.05)), 400, axes)
    scale = torch.linalg.det(matrices) ** (1 / axes)
    angle = torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0]).rad2deg()
    assert scale.aminmax() == pytest.approx((0.95, 1.05), abs=1e-3)
    assert angle.aminmax() == pytest.approx((-5, 5), abs=0.1)
    assert (scale < 1).double().mean().item() == pytest.approx(0.5, abs=0.06)
    expected = torch.eye(axes).double() * scale[:, None, None]
    torch.testing.assert_close(matrices[:, 2:], expected[:, 2:], msg="volumes turn in their first plane")


def test_the_stack_moves_seldom():
    matrices = drawn_matrices(replace(GEOMETRIES["deep_stack"], p_elastic=0), 600)
    assert (torch.linalg.det(matrices) - 1).abs().lt(1e-6).double().mean().item() == pytest.approx(0.8, abs=0.05)
    assert (matrices[:, 0, 1].abs() < 1e-6).double().mean().item() == pytest.approx(0.8, abs=0.05)


def test_intensities_have_the_papers_ranges():
    ramp = torch.linspace(0, 1, 64).view(1, 1, 8, 8).expand(600, 1, 8, 8)
    mask, flat = torch.zeros(600, 1, 8, 8).long(), torch.zeros(600, 1, 8, 8)
    shift = ClassicalAugmentation("brightness", (-1.0, 1.0))(flat, mask, seeded())[0][:, 0, 0, 0]
    assert (shift.abs() < 0.5).float().mean().item() == pytest.approx(0.683, abs=0.05), "one standard deviation"
    assert shift.mean().item() == pytest.approx(0, abs=0.05)
    noise = ClassicalAugmentation("noise", (-1.0, 1.0))(flat, mask, seeded())[0].flatten(1).std(1)
    assert noise.mean().item() == pytest.approx(0.025, rel=0.06)
    assert 0.045 < noise.max() < 0.08, "64 pixels of standard deviation 0.05"
    gamma = ClassicalAugmentation("gamma")(ramp, mask, seeded())[0][:, 0, 4, 0].log() / ramp[0, 0, 4, 0].log()
    assert gamma.aminmax() == pytest.approx((0.7, 1.5), abs=0.01)
    assert (gamma < 1).float().mean().item() == pytest.approx(0.5, abs=0.05)
    sharp = torch.rand(1, 1, 8, 8).expand(600, 1, 8, 8)
    blurred = ClassicalAugmentation("low_resolution")(sharp, mask, seeded())[0]
    same = (blurred - sharp).abs().amax((1, 2, 3)) < 1e-5
    assert same.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_mirror_flips_each_axis_in_three_eighths_of_the_samples():
    image = torch.rand(1, 1, 3, 4, 2).expand(600, 1, 3, 4, 2)
    moved, labels = ClassicalAugmentation("mirror")(image, (image * 9).long(), seeded())
    assert torch.equal(labels, (moved * 9).long())
    for axis in range(2, 5):
        others = [d for d in range(2, 5) if d != axis]
        profile, still = moved.sum(others), image.sum(others)
        flipped = (profile - still.flip(2)).abs().amax((1, 2)) < 1e-5
        assert flipped.float().mean().item() == pytest.approx(0.375, abs=0.05)


def test_elastic_displacements_are_smooth_and_seldom():
    generator, seldom, image = seeded(), Geometry(p_elastic=0.2), torch.rand(1, 40, 48)
    grids = [draw_grid(image, seldom, generator) for _ in range(40)]
    bent = [grid for grid in grids if grid is not None]
    assert 3 <= len(bent) <= 16
    lines = torch.meshgrid(torch.arange(40) - 19.5, torch.arange(48) - 23.5, indexing="ij")
    offsets = torch.stack(bent)[:, :2] - torch.stack(lines)
    steps = offsets.diff(dim=-1).abs().mean() / offsets.abs().mean()
    assert steps < 0.15, "blurred over about ten pixels"
    assert 0.3 < offsets.abs().mean() < 10


def test_channels_of_a_sample_change_alike_and_tensors_stay_plain():
    image, mask = batch(4, (20, 20), channels=1)
    for name in NAMES:
        changed, labels = ClassicalAugmentation(name)(image.repeat(1, 2, 1, 1), mask, seeded())
        assert {type(changed), type(labels)} == {torch.Tensor}, "no tensor of MONAI's own leaves"
        if name not in ("noise", "all"):
            torch.testing.assert_close(changed[:, 0], changed[:, 1])
        assert changed.is_contiguous()


def test_stretching_as_the_authors_do_undoes_brightness():
    image, mask = batch()
    changed, _ = ClassicalAugmentation("brightness", normalize="minmax")(image, mask, seeded())
    torch.testing.assert_close(changed, stretch(image, 0, 1), atol=1e-5, rtol=0)
    clipped, _ = ClassicalAugmentation("brightness")(image, mask, seeded())
    assert (clipped.flatten(1).mean(1) - image.flatten(1).mean(1)).abs().max() > 0.1


def test_a_constant_image_stays_finite():
    image, mask = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, 1, 8, 8).long()
    for name in NAMES:
        for normalize in ("clip", "minmax"):
            assert ClassicalAugmentation(name, normalize=normalize)(image, mask, seeded())[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "blur"}, "augmentation 'blur': expected one of contrast, gamma, brightness, noise, low_resolution"),
        ({"name": "gamma", "normalize": "none"}, "normalize='none'"),
        ({"name": "gamma", "intensity_range": (1.0, 1.0)}, r"intensity_range=\(1.0, 1.0\)"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassicalAugmentation(**arguments)


def test_batches_that_do_not_fit_are_named():
    image, mask = batch()
    with pytest.raises(ValueError, match=r"torch.int64 of shape \(5, 1, 12, 18\): expected floating point"):
        ClassicalAugmentation("noise")(mask, mask)
    with pytest.raises(ValueError, match=r"mask has shape \(5, 1, 12, 17\) for an image of shape \(5, 2, 12, 18\)"):
        ClassicalAugmentation("noise")(image, mask[..., :-1])


@pytest.mark.parametrize("name", ["contrast", "gamma", "mirror", "rotate", "scale"])
def test_a_constant_image_is_stretched_to_the_lowest_value_and_not_to_noise(name):
    change, mask = ClassicalAugmentation(name, normalize="minmax"), torch.zeros(6, 1, 20, 24, dtype=torch.int64)
    changed, _ = change(torch.full((6, 1, 20, 24), 0.3), mask, torch.Generator().manual_seed(0))
    assert changed.abs().max() == 0


def test_an_empty_batch_stays_empty():
    image, mask = torch.rand(0, 1, 8, 8), torch.zeros(0, 1, 8, 8, dtype=torch.int64)
    for normalize in ("clip", "minmax"):
        assert ClassicalAugmentation("all", normalize=normalize)(image, mask)[0].shape == (0, 1, 8, 8)
    assert stretch(image).shape == (0, 1, 8, 8)
