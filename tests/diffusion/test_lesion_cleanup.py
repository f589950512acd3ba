import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage import measure, morphology

from fairdiff_lightning.diffusion.control_sphere import draw_spheres
from fairdiff_lightning.diffusion.lesion_cleanup import REFERENCE_ZOOM, SMOOTHING, clean_lesion, clean_lesions

SIZE = (12, 9, 7)


def ball(centre, radius, size=SIZE):
    return draw_spheres(torch.tensor([[*centre, radius]]).float(), size)


@pytest.mark.parametrize("zoom", [1.0, REFERENCE_ZOOM])
def test_empty_stays_empty(zoom):
    found = clean_lesions(torch.zeros(2, 1, *SIZE, dtype=torch.bool), zoom=zoom)
    assert not found.any()
    assert found.shape == (2, 1, *(round(side * zoom) for side in SIZE))


@settings(deadline=None, max_examples=40)
@given(arrays(np.bool_, SIZE, elements=st.booleans()), arrays(np.bool_, SIZE, elements=st.booleans()))
def test_what_is_left_is_one_part_of_the_grid_and_of_what_is_allowed(lesion, within):
    for allowed in (np.ones_like(within), within):
        found = clean_lesions(torch.from_numpy(lesion)[None, None], torch.from_numpy(allowed)[None, None])[0, 0].numpy()
        assert found.shape == lesion.shape
        assert not found[~allowed].any()
        assert measure.label(found, connectivity=1).max() <= 1
        assert found.any() <= lesion.any()


def test_the_largest_part_is_kept_and_its_holes_are_filled():
    lesion = ball((4, 4, 3), 3) | ball((10, 7, 5), 1)
    lesion[0, 0, 4, 4, 3] = False
    found = clean_lesions(lesion)[0, 0]
    assert found[4, 4, 3]
    assert not found[9:].any()
    wanted = ball((4, 4, 3), 3)[0, 0]
    assert (found & wanted).sum() * 2 / (found.sum() + wanted.sum()) > 0.85


@pytest.mark.parametrize(
    ("voxels", "expected"),
    [
        (1, (0.5, 0.01)),
        (19, (0.5, 0.01)),
        (20, (0.5, 0.1)),
        (49, (0.5, 0.1)),
        (50, (0.5, 0.2)),
        (99, (0.5, 0.2)),
        (100, (1, 0.3)),
        (999, (1, 0.3)),
        (1_000, (1.5, 0.5)),
        (9_999, (1.5, 0.5)),
        (10_000, (2, 0.5)),
    ],
)
def test_smoothing_depends_on_the_size_as_in_the_authors_code(monkeypatch, voxels, expected):
    used = []

    def blur(volume, sigma):
        used.append(sigma)
        return np.full_like(volume, expected[1])

    monkeypatch.setattr("fairdiff_lightning.diffusion.lesion_cleanup.ndimage.gaussian_filter", blur)
    lesion = (np.arange(25**3) < voxels).reshape(25, 25, 25)
    assert not clean_lesion(lesion, np.ones_like(lesion)).any()  # the cut is strict
    assert used == [expected[0]]
    expected = (expected[0], expected[1] + 1e-6)
    assert clean_lesion(lesion, np.ones_like(lesion)).all()
    assert len(SMOOTHING) == 6


def test_specks_grow_to_something_that_can_be_seen():
    speck = np.zeros(SIZE, dtype=bool)
    speck[5, 4, 3] = True
    found = clean_lesion(speck, np.ones_like(speck))
    assert np.array_equal(found, morphology.dilation(speck, morphology.ball(1)))


def test_the_references_grid_is_larger():
    lesion = ball((5, 4, 3), 3)
    found, larger = clean_lesions(lesion), clean_lesions(lesion, zoom=REFERENCE_ZOOM)
    assert larger.shape == (1, 1, 18, 14, 10)  # scipy rounds 13.5 and 10.5 to even
    assert 1.5**3 * 0.75 < larger.sum() / found.sum() < 1.5**3 * 1.35
    centres = [volume[0, 0].nonzero().float().mean(0) for volume in (found, larger)]
    scale = (torch.tensor(larger.shape[2:]) - 1) / (torch.tensor(SIZE) - 1)
    torch.testing.assert_close(centres[1], centres[0] * scale, atol=0.3, rtol=0)


def test_the_references_volume_has_its_size():
    found = clean_lesions(ball((30, 30, 15), 8, (64, 64, 32)), zoom=REFERENCE_ZOOM)
    assert found.shape == (1, 1, 96, 96, 48)


def test_samples_are_cleaned_apart():
    lesions = torch.cat([ball((4, 4, 3), 2), torch.zeros(1, 1, *SIZE, dtype=torch.bool), ball((8, 4, 3), 3)])
    found = clean_lesions(lesions)
    for k in range(3):
        assert torch.equal(found[k], clean_lesions(lesions[k : k + 1])[0])
    assert found.flatten(1).any(1).tolist() == [True, False, True]


def test_a_boundary_of_another_shape_is_refused():
    lesion = ball((5, 4, 3), 3)
    with pytest.raises(ValueError, match=r"within has shape .* expected is that of lesions, \(1, 1, 12, 9, 7\)"):
        clean_lesions(lesion, torch.ones(1, 1, 12, 9, 6))
