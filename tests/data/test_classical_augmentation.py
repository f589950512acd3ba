import numpy as np
import pytest
import torch
from scipy import ndimage

from fairdiff_lightning.data.classical_augmentation import (
    GEOMETRIES,
    INTENSITIES,
    ClassicalAugmentation,
    Geometry,
    adjust_contrast,
    adjust_gamma,
    draw_elastic,
    draw_matrices,
    gaussian_blur,
    move,
    resample,
    stretch,
)

NAMES = sorted({**GEOMETRIES, **INTENSITIES})
MOVING = sorted(GEOMETRIES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=5, size=(12, 18), channels=2):
    image = gaussian_blur(torch.rand(count, channels, *size), torch.full((count,), 1.5))
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


def test_contrast_gamma_and_blur_are_monais_and_scipys():
    from monai.transforms import AdjustContrast

    image, _ = batch(3)
    gamma = torch.tensor([0.7, 1.0, 1.5])
    for kept in (False, True):
        found = adjust_gamma(image, gamma, retain_stats=kept)
        expected = [AdjustContrast(float(g), retain_stats=kept)(sample) for g, sample in zip(gamma, image, strict=True)]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
    for sample, factor, changed in zip(image, gamma, adjust_contrast(image, gamma), strict=True):
        expected = ((sample - sample.mean()) * factor + sample.mean()).clamp(sample.min(), sample.max())
        torch.testing.assert_close(changed, expected)
    sigma = torch.tensor([0.0, 0.5, 1.5])
    for border, mode in (("replicate", "nearest"), ("constant", "constant")):
        for shaped in (image, image[..., None].repeat(1, 1, 1, 1, 3).cumsum(-1)):
            axes = tuple(range(1, shaped.dim() - 1))
            expected = [
                ndimage.gaussian_filter(sample.numpy(), float(s), mode=mode, radius=6, axes=axes)
                if s
                else sample.numpy()
                for s, sample in zip(sigma, shaped, strict=True)
            ]
            np.testing.assert_allclose(gaussian_blur(shaped, sigma, border), np.stack(expected), atol=1e-5)


@pytest.mark.parametrize("size", [(9, 14), (9, 14, 6)])
def test_resampling_is_scipys(size):
    image, mask = torch.rand(2, 1, *size), torch.randint(3, (2, 1, *size))
    matrices = draw_matrices(2, len(size), Geometry(degrees=40, scale=(0.8, 1.2)), seeded())
    matrices[1] = torch.eye(len(size))
    offsets = torch.zeros(2, len(size), *size)
    offsets[1, 0] = 2.0
    moved, labels = resample(image, mask, matrices, offsets, "zeros")
    assert torch.equal(labels[1, 0, :-2], mask[1, 0, 2:])
    torch.testing.assert_close(moved[1, 0, :-2], image[1, 0, 2:], atol=1e-4, rtol=0)
    centre = (np.array(size) - 1) / 2
    matrix = matrices[0].numpy()
    for array, found, order in ((mask, labels, 0), (image, moved, 1)):
        expected = ndimage.affine_transform(
            array[0, 0].numpy(), matrix, centre - matrix @ centre, order=order, mode="grid-constant"
        )
        if order == 0 or len(size) == 3:
            assert np.mean(np.abs(found[0, 0].numpy() - expected) < 1e-4) > 0.99, "all but ties"
    outside = resample(torch.ones_like(image), torch.ones_like(mask), matrices[:1] * 3)[1][0, 0]
    assert outside[tuple(n // 2 for n in size)] == 1
    assert outside[(0,) * len(size)] == 0, "what lies outside is background"


def test_moves_of_nothing_change_nothing_and_a_ramp_is_zoomed_about_its_centre():
    image, mask = batch()
    still = torch.eye(2).repeat(5, 1, 1)
    moved, labels = resample(image, mask, still)
    torch.testing.assert_close(moved, image, atol=1e-5, rtol=0)
    assert torch.equal(labels, mask)
    rows = torch.arange(20.0).view(1, 1, 20, 1).expand(1, 1, 20, 20)
    scaled, _ = resample(rows, rows.long(), 0.5 * torch.eye(2)[None])
    torch.testing.assert_close(scaled[0, 0, :, 3], 9.5 + (torch.arange(20.0) - 9.5) / 2, atol=0.05, rtol=0)


def test_draws_have_the_papers_ranges():
    matrices = draw_matrices(4000, 2, Geometry(degrees=5, scale=(0.95, 1.05)), seeded())
    scale = torch.linalg.det(matrices).sqrt()
    angle = torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0]).rad2deg()
    assert scale.aminmax() == pytest.approx((0.95, 1.05), abs=1e-3)
    assert angle.aminmax() == pytest.approx((-5, 5), abs=0.05)
    seldom = draw_matrices(4000, 2, GEOMETRIES["deep_stack"], seeded())
    assert (torch.linalg.det(seldom) - 1).abs().lt(1e-6).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (seldom[:, 0, 1] == 0).float().mean().item() == pytest.approx(0.8, abs=0.02)
    image = torch.linspace(0, 1, 64).view(1, 1, 8, 8).expand(2000, 1, 8, 8)
    mask, flat = torch.zeros(2000, 1, 8, 8).long(), torch.zeros(2000, 1, 8, 8)
    shift = ClassicalAugmentation("brightness", (-1.0, 1.0))(flat, mask, seeded())[0][:, 0, 0, 0]
    assert (shift.abs() < 0.5).float().mean().item() == pytest.approx(0.683, abs=0.04), "one standard deviation"
    assert shift.mean().item() == pytest.approx(0, abs=0.04)
    noise = ClassicalAugmentation("noise", (-1.0, 1.0))(flat, mask, seeded())[0].flatten(1).std(1)
    assert noise.mean().item() == pytest.approx(0.025, rel=0.05)
    assert 0.05 < noise.max() < 0.08, "64 pixels of standard deviation 0.05"
    gamma = ClassicalAugmentation("gamma")(image, mask, seeded())[0][:, 0, 4, 0].log() / image[0, 0, 4, 0].log()
    assert gamma.aminmax() == pytest.approx((0.7, 1.5), abs=5e-3)
    assert (gamma < 1).float().mean().item() == pytest.approx(0.5, abs=0.04)
    sharp = torch.rand(1, 1, 8, 8).expand(2000, 1, 8, 8)
    blurred = ClassicalAugmentation("low_resolution")(sharp, mask, seeded())[0]
    same = (blurred - sharp).abs().amax((1, 2, 3)) < 1e-5
    assert same.float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_mirror_flips_each_axis_in_three_eighths_of_the_samples():
    image = torch.rand(1, 1, 3, 4, 2).expand(3000, 1, 3, 4, 2)
    mask = (image * 9).long()
    moved, labels = move(image, mask, GEOMETRIES["mirror"], seeded())
    assert torch.equal(labels, (moved * 9).long())
    for axis in range(2, 5):
        others = [d for d in range(2, 5) if d != axis]
        profile, still = moved.sum(others), image.sum(others)
        flipped = (profile - still.flip(2)).abs().amax((1, 2)) < 1e-5
        assert flipped.float().mean().item() == pytest.approx(0.375, abs=0.03)


def test_elastic_offsets_are_smooth_and_seldom():
    offsets = draw_elastic(torch.rand(40, 1, 40, 48), 0.2, seeded())
    moved = offsets.abs().amax((1, 2, 3)) > 0
    assert offsets.shape == (40, 2, 40, 48)
    assert 3 <= moved.sum() <= 16
    steps = offsets[moved].diff(dim=-1).abs().mean() / offsets[moved].abs().mean()
    assert steps < 0.15, "blurred over about ten pixels"
    assert 0.3 < offsets[moved].abs().mean() < 10


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
