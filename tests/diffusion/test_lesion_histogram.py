import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.diffusion.lesion_channels import class_masks
from fairdiff_lightning.diffusion.lesion_histogram import jitter, lesion_histogram


def test_a_histogram_is_that_of_the_authors_code(reference):
    block = reference("lefusion")["histogram_16"]
    values, mask = (torch.tensor(block[name]).view(1, 1, 2, 2, 4) for name in ("values", "mask"))
    found = lesion_histogram(values, mask)
    assert found.flatten().tolist() == pytest.approx(block["hist"], rel=1e-5, abs=0)
    assert (found * 15).flatten().tolist() == pytest.approx(block["counts"], rel=1e-5, abs=0)


def test_two_classes_have_a_histogram_each(reference):
    values = torch.tensor(reference("lefusion")["histogram_16"]["values"]).view(1, 1, 2, 2, 4)
    block = reference("lefusion")["histogram_32_emidec"]
    label = torch.tensor(block["label"]).view(1, 1, 2, 2, 4).long()
    found = lesion_histogram(values, class_masks(label, (3, 4)))
    assert found.flatten(1).shape == (1, 32)
    assert found.flatten().tolist() == pytest.approx(block["hist"], rel=1e-5, abs=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 4, 16, 32]))
def test_histograms_are_those_of_numpy(seed, bins):
    rng = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 2, 5, 4, 3, generator=rng) * 2 - 1
    image[0, :, 0] = 1.0
    mask = torch.rand(3, 2, 5, 4, 3, generator=rng) > 0.4
    found = lesion_histogram(image, mask, bins)
    for sample in range(3):
        for channel in range(2):
            inside = image[sample, channel][mask[sample, channel]].double().numpy()
            counts, _ = np.histogram(inside, bins, (-1, 1))
            assert found[sample, channel].tolist() == pytest.approx((counts / counts.sum()).tolist(), abs=1e-6)


def test_a_class_without_voxels_has_zeros():
    mask = torch.zeros(2, 2, 4, 3)
    mask[0, 1, 1] = 4  # any label other than 0 counts once
    found = lesion_histogram(torch.rand(2, 1, 4, 3), mask)
    assert found.sum(2).flatten().tolist() == pytest.approx([0, 1, 0, 0])
    assert found.isfinite().all()


def test_images_and_masks_of_other_shapes_are_refused():
    for image in (torch.rand(2, 1, 4, 4), torch.rand(1, 1, 4, 3), torch.rand(2, 3, 4, 3), torch.rand(2, 4, 3)):
        with pytest.raises(ValueError, match="image has shape"):
            lesion_histogram(image, torch.ones(2, 2, 4, 3))


def test_jitter_is_that_of_the_authors_code(reference):
    counts = torch.tensor(reference("lefusion")["cluster_exemplar_counts"]["lidc"][2], dtype=torch.float32)
    block = reference("lefusion")["perturb_tensor"]
    solid, noise = (counts / counts.sum())[None], torch.linspace(-1, 2, 16)[None]
    found = jitter(solid, noise, amount=block["bili"], renormalise=False)
    torch.testing.assert_close(found[0], torch.tensor(block["out"]), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(jitter(solid, noise), found / found.sum(), rtol=1e-5, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 0.9))
def test_jitter_keeps_sums_and_empty_bins(seed, amount):
    rng = torch.Generator().manual_seed(seed)
    histogram = torch.rand(3, 2, 16, generator=rng) * (torch.rand(3, 2, 16, generator=rng) > 0.3)
    histogram = histogram / histogram.sum(-1, keepdim=True)
    histogram[1, 1] = 0
    noise = torch.randn(3, 2, 16, generator=rng)
    found = jitter(histogram, noise, amount)
    torch.testing.assert_close(found.sum(-1), histogram.sum(-1))
    assert torch.equal(found == 0, histogram == 0)
    raw = jitter(histogram, noise, amount, renormalise=False)
    assert ((raw - histogram).abs() <= amount * histogram + 1e-6).all()


def test_noise_without_spread_changes_nothing():
    histogram = torch.tensor([[0.25, 0.75, 0, 0]])
    torch.testing.assert_close(jitter(histogram, torch.ones(1, 4)), histogram)
