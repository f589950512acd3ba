import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from fairdiff_lightning.metrics import frechet_distance, kernel_distance, ssim_between


def gaussian_distance(x, y):
    """The closed form for two normal distributions, with scipy's matrix root."""
    x, y = x.double().numpy(), y.double().numpy()
    sx, sy = np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    root = sqrtm(sx @ sy).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx + sy - 2 * root)


def singular_distance(x, y):
    """The same for any covariance: the trace of the root is the sum of the singular values of X Y^T."""
    x, y = x.double().numpy(), y.double().numpy()
    cx, cy = (z - z.mean(0) for z in (x, y))
    cx, cy = cx / np.sqrt(len(x) - 1), cy / np.sqrt(len(y) - 1)
    root = np.linalg.svd(cx @ cy.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (cx**2).sum() + (cy**2).sum() - 2 * root


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_is_the_closed_form_of_gaussians(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 5, generator=generator)
    y = torch.randn(40, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = frechet_distance(x, y)
    assert found.item() == pytest.approx(gaussian_distance(x, y), rel=1e-4)


def test_frechet_distance_of_shifted_copies_is_the_squared_shift():
    x = torch.randn(50, 4, dtype=torch.float64)
    assert frechet_distance(x + 2, x).item() == pytest.approx(4 * 2**2, abs=1e-6)
    assert frechet_distance(x, x).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("generated", "real", "width"), [(5, 7, 64), (2, 3, 128), (30, 8, 20)])
def test_fewer_samples_than_features_warn_and_give_the_exact_number(generated, real, width):
    x, y = torch.randn(generated, width).double(), 1.2 * torch.randn(real, width).double() + 0.1
    with pytest.warns(UserWarning, match=f"FID of {generated} generated and {real} real samples with {width} features"):
        found = frechet_distance(x, y)
    assert found.item() == pytest.approx(singular_distance(x, y), rel=1e-6)


@pytest.mark.parametrize("count", [1, 4])
def test_constant_features_warn_and_give_the_distance_of_the_means(count):
    x, y = torch.ones(count, 6), torch.zeros(3, 6)
    with pytest.warns(UserWarning, match="covariance is singular"):
        assert frechet_distance(x, y).item() == pytest.approx(6)


def test_one_sample_warns_and_gives_a_finite_number():
    y = torch.randn(9, 4).double()
    x = torch.zeros(1, 4).double()
    with pytest.warns(UserWarning, match="only one generated sample"):
        found = frechet_distance(x, y)
    assert found.item() == pytest.approx(float(y.mean(0).square().sum() + y.var(0).sum()))
    with pytest.warns(UserWarning, match="only one generated sample"):
        assert kernel_distance(x, y).isfinite()


def plain_kernel_distance(x, y):
    """Unbiased estimate of the squared maximum mean discrepancy, pair by pair."""

    def kernel(a, b):
        return float((torch.dot(a, b) / len(a) + 1) ** 3)

    n = len(x)
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j)
    between = sum(kernel(a, b) for a in x for b in y)
    return within / (n * (n - 1)) - 2 * between / n**2


def test_kernel_distance_is_the_unbiased_estimate_over_all_pairs():
    x, y = torch.randn(6, 5).double(), torch.randn(6, 5).double() + 0.5
    assert kernel_distance(x, y).item() == pytest.approx(plain_kernel_distance(x, y))


def test_kernel_distance_depends_on_its_seed_only():
    x, y = torch.randn(9, 5), torch.randn(30, 5)
    state = torch.get_rng_state()
    values = [kernel_distance(x, y, subset_size=5, subsets=3, seed=seed).item() for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("score", [frechet_distance, kernel_distance])
def test_features_that_cannot_be_compared_are_refused(score):
    with pytest.raises(ValueError, match=r"real features have shape \(3, 5\), expected \(N, 4\)"):
        score(torch.rand(3, 4), torch.rand(3, 5))
    with pytest.raises(ValueError, match=r"generated features have shape \(0, 4\)"):
        score(torch.rand(0, 4), torch.rand(3, 4))
    with pytest.raises(ValueError, match="generated features hold NaN"):
        score(torch.full((3, 4), torch.nan), torch.rand(3, 4))


def flat_images(values, height, width):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, height, width)


@pytest.mark.parametrize(("multiscale", "size", "power"), [(False, (11, 13), 1.0), (True, (176, 180), 0.1333)])
def test_similarity_of_two_flat_images_is_that_of_their_luminance(multiscale, size, power):
    """Contrast and structure are 1; MS-SSIM takes the luminance of the coarsest scale, to its weight."""
    a, b = 0.2, 0.6
    found = ssim_between(flat_images([a, b], *size), multiscale=multiscale)
    expected = ((2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)) ** power
    assert found.item() == pytest.approx(expected, rel=1e-3)


def test_similarity_is_one_for_a_collapsed_generator_and_lower_for_noise():
    image = torch.rand(1, 3, 16, 20)
    assert ssim_between(image.expand(40, -1, -1, -1), num_pairs=17).item() == pytest.approx(1)
    assert ssim_between(torch.rand(6, 3, 16, 20)) < 0.5


def test_an_image_is_in_one_pair_only_and_the_seed_decides_which():
    images = flat_images([0.1, 0.3, 0.5, 0.9], 11, 11)
    pairings = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    means = [torch.stack([ssim_between(images[list(pair)]) for pair in pairing]).mean() for pairing in pairings]
    found = {round(ssim_between(images, seed=seed).item(), 5) for seed in range(20)}
    assert found == {round(mean.item(), 5) for mean in means}


def test_images_too_small_or_too_few_for_similarity_are_refused():
    with pytest.raises(ValueError, match=r"10 x 12 pixels are too small for SSIM, .* at least 11"):
        ssim_between(torch.rand(2, 3, 10, 12))
    with pytest.raises(ValueError, match=r"too small for MS-SSIM, .* at least 176"):
        ssim_between(torch.rand(2, 3, 200, 175), multiscale=True)
    with pytest.raises(ValueError, match="N at least 2"):
        ssim_between(torch.rand(1, 3, 16, 16))
