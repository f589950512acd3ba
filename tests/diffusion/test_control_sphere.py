import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.diffusion.control_sphere import (
    check_room,
    check_spheres,
    control_sphere,
    draw_spheres,
    encode_spheres,
    sphere_agreement,
)

SIZE = (9, 7, 5)
VOXELS = st.lists(st.tuples(*(st.integers(0, side - 1) for side in SIZE)), min_size=1, max_size=20)


def volume(voxels, size=SIZE):
    mask = torch.zeros(1, 1, *size, dtype=torch.int64)
    for voxel in voxels:
        mask[(0, 0, *voxel)] = 1
    return mask


@pytest.fixture
def lesion():
    """The reference's mask; it has depth first, here it is last."""
    mask = torch.zeros(32, 64, 64, dtype=torch.uint8)
    mask[10:14, 20:27, 30:41] = 1
    mask[14, 22, 35] = 1
    return mask.permute(1, 2, 0)[None, None]


def test_truncated_spheres_are_those_of_the_authors_code(reference, lesion):
    expected = reference("lefusion")["diffmask_sphere"]
    depth, row, column = expected["center_int"]
    found = control_sphere(lesion, truncate=True)
    assert found.tolist() == [[row, column, depth, expected["radius_int"]]]
    inside = draw_spheres(found, lesion.shape[2:])
    assert int(inside.sum()) == expected["sphere_voxels"]
    assert int(lesion.sum()) == expected["mask_voxels"]
    assert int((~inside & (lesion > 0)).sum()) == expected["mask_voxels_outside_sphere"]
    assert encode_spheres(inside, "uint8_wrap").unique().tolist() == expected["after_times2_minus1_unique"]


def test_exact_spheres_have_the_references_centroid_and_radius(reference, lesion):
    expected = reference("lefusion")["diffmask_sphere"]
    depth, row, column = expected["centroid_float"]
    found = control_sphere(lesion)
    assert found[0].tolist() == pytest.approx([row, column, depth, expected["radius_float"]], abs=1e-5)
    assert not (~draw_spheres(found, lesion.shape[2:]) & (lesion > 0)).any()


def test_wrapped_bytes_are_what_unsigned_arithmetic_gives():
    inside = draw_spheres(torch.tensor([[4.0, 3, 2, 2]]), SIZE)
    assert torch.equal(encode_spheres(inside, "uint8_wrap"), (inside.to(torch.uint8) * 2 - 1).float())
    assert torch.equal(encode_spheres(inside), inside.float() * 2 - 1)


def test_spheres_are_drawn_as_numpy_has_them():
    spheres = [(4.2, 3.0, 1.5, 2.3), (0.0, 6.0, 4.0, 3.0)]
    grid = np.indices(SIZE)
    for found, (h, w, d, radius) in zip(draw_spheres(torch.tensor(spheres), SIZE)[:, 0], spheres, strict=True):
        squared = (grid[0] - h) ** 2 + (grid[1] - w) ** 2 + (grid[2] - d) ** 2
        assert np.array_equal(found.numpy(), squared <= radius**2 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(VOXELS)
def test_a_sphere_holds_every_voxel_of_its_lesion(voxels):
    mask = volume(voxels)
    found = control_sphere(mask)
    assert draw_spheres(found, SIZE)[mask > 0].all()
    smaller = found - torch.tensor([0, 0, 0, 0.01])
    assert not draw_spheres(smaller, SIZE)[mask > 0].all()


@settings(deadline=None, max_examples=60)
@given(VOXELS, st.tuples(*(st.integers(0, 6) for _ in SIZE)))
def test_a_moved_lesion_moves_its_sphere_and_no_more(voxels, by):
    size = tuple(side + 6 for side in SIZE)
    here = control_sphere(volume(voxels, size))
    there = control_sphere(volume([tuple(a + b for a, b in zip(voxel, by, strict=True)) for voxel in voxels], size))
    torch.testing.assert_close(there, here + torch.tensor([[*by, 0]]), atol=1e-4, rtol=0)


def test_classes_count_as_one_lesion_and_samples_apart():
    masks = torch.zeros(2, 2, *SIZE, dtype=torch.bool)
    masks[0, 0, 1, 2, 3] = masks[0, 1, 5, 2, 3] = True
    masks[1, 1, 8, 0, 0] = True
    assert control_sphere(masks).tolist() == [[3, 2, 3, 2], [8, 0, 0, 0]]


def test_an_empty_mask_has_a_sphere_without_voxels():
    empty = torch.zeros(1, 1, *SIZE)
    assert control_sphere(empty).tolist() == [[0, 0, 0, -1]]
    assert not draw_spheres(control_sphere(empty), SIZE).any()
    assert draw_spheres(control_sphere(empty, truncate=True), SIZE).nonzero().tolist() == [[0, 0, 0, 0, 0]]


def test_agreement_is_counted_in_voxels():
    spheres = torch.tensor([[4.0, 3, 2, 1], [4.0, 3, 2, 1], [4.0, 3, 2, 1]])
    masks = torch.zeros(3, 1, *SIZE)
    masks[0] = draw_spheres(spheres[:1], SIZE)[0]
    masks[1, 0, 4, 3, 2] = masks[1, 0, 6, 3, 2] = masks[1, 0, 7, 3, 2] = masks[1, 0, 0, 0, 0] = 1  # two are far
    volumes, outside = sphere_agreement(masks, spheres)
    assert volumes.tolist() == pytest.approx([1, 4 / 7, 0])
    assert outside.tolist() == pytest.approx([0, 0.5, 0])


def test_unknown_encodings_are_refused():
    with pytest.raises(ValueError, match="sphere_encoding 'bytes'; expected is signed or uint8_wrap"):
        encode_spheres(torch.ones(1, dtype=torch.bool), "bytes")


@pytest.mark.parametrize(
    ("sphere", "message"),
    [
        ([4, 3, 2, 0], "the sphere of sample 1 has centre .* and radius 0.0"),
        ([4, 3, 2, -1], "radius above 0"),
        ([9, 3, 2, 2], "inside of the volume of 9 x 7 x 5"),
        ([4, -0.5, 2, 2], "inside of the volume"),
        ([4, float("nan"), 2, 2], "sample 1"),
        ([4, 3, 2, float("inf")], "sample 1"),
    ],
)
def test_spheres_that_ask_for_nothing_are_refused(sphere, message):
    with pytest.raises(ValueError, match=message):
        check_spheres(torch.tensor([[4.0, 3, 2, 2], sphere]), SIZE)


def test_spheres_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"spheres have shape \(4,\); expected is \(B, 4\)"):
        check_spheres(torch.ones(4), SIZE)


def test_spheres_without_room_are_refused():
    inside = draw_spheres(torch.tensor([[4.0, 3, 2, 1], [4.5, 3.5, 2.5, 0.1]]), SIZE)
    with pytest.raises(ValueError, match=r"sphere of sample 1 has no voxel, .* larger radius"):
        check_room(inside, torch.ones_like(inside))
    elsewhere = torch.zeros_like(inside[:1])
    elsewhere[0, 0, 0] = True
    with pytest.raises(ValueError, match="sphere of sample 0 lies outside of the boundary entirely"):
        check_room(inside[:1], elsewhere)
