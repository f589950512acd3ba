import numpy as np
import pytest
import torch

from fairdiff_lightning.geometry import DISC_AND_CUP, StructureSpec, mask_to_points, masks_to_points


@pytest.fixture(scope="module")
def mask(disc_and_cup):
    return disc_and_cup((90, 120), (40, 63), (30, 25), cup=0.5)


def test_every_cloud_has_the_same_layout(mask, disc_and_cup):
    small = disc_and_cup((90, 120), (50, 50), (12, 12), cup=0.2)
    for cloud in (mask_to_points(mask, 101), mask_to_points(small, 101)):
        assert cloud.shape == (101, 3)
        assert cloud.dtype == torch.float32
        assert cloud[:, 2].tolist() == [-5.0] * 51 + [5.0] * 50


def test_points_are_equally_spaced_along_a_closed_contour(mask):
    points = mask_to_points(mask, 512)
    for block in (points[:256, :2], points[256:, :2]):
        steps = (block.roll(-1, 0) - block).norm(dim=1)
        assert steps.max() < 1.01 * steps.median()  # corners of the contour are cut, nothing is jumped
        assert steps.min() > 0.7 * steps.median()


def test_outline_of_a_disc_is_its_circle():
    row, col = np.mgrid[:300, :320]
    disc = torch.from_numpy((np.hypot(row - 140.3, col - 160.8) <= 100).astype(np.int64))
    points = mask_to_points(disc, 400, structures=StructureSpec(("disc",)))
    radius = torch.hypot(points[:, 0] - 140.3, points[:, 1] - 160.8)
    assert radius.mean() == pytest.approx(100, abs=0.1)
    assert (radius - 100).abs().max() < 0.75
    assert (points[:, 2] == -5).all()


def test_outline_lies_half_a_pixel_outside_the_outermost_pixels():
    mask = torch.zeros(20, 30, dtype=torch.uint8)
    mask[5:15, 10:28] = 1
    points = mask_to_points(mask, 4000, structures=StructureSpec(("box",)))
    assert points.amin(0)[:2].tolist() == pytest.approx([4.5, 9.5], abs=1e-3)
    assert points.amax(0)[:2].tolist() == pytest.approx([14.5, 27.5], abs=1e-3)


def test_outline_of_a_region_cut_by_the_border_follows_the_border():
    points = mask_to_points(torch.ones(20, 30, dtype=torch.bool), 4000, structures=StructureSpec(("all",)))
    assert points.amin(0)[:2].tolist() == pytest.approx([-0.5, -0.5], abs=1e-3)
    assert points.amax(0)[:2].tolist() == pytest.approx([19.5, 29.5], abs=1e-3)


def test_largest_piece_decides_and_holes_are_filled():
    mask = torch.zeros(40, 50, dtype=torch.int64)
    mask[10:30, 10:30] = 1
    plain = mask_to_points(mask, 300, structures=StructureSpec(("box",)))
    mask[12:28, 12:28] = 0
    mask[2:5, 40:45] = 1
    assert torch.equal(mask_to_points(mask, 300, structures=StructureSpec(("box",))), plain)


def test_outline_moves_with_the_mask(disc_and_cup):
    here, there = (disc_and_cup((90, 120), centre, (20, 25)) for centre in ((30, 40), (60, 77)))
    moved = mask_to_points(here, 100) + torch.tensor([30, 37, 0])
    torch.testing.assert_close(mask_to_points(there, 100), moved, rtol=0, atol=1e-4)


def test_arrays_tensors_channels_and_batches_agree(mask):
    expected = mask_to_points(mask, 64)
    assert torch.equal(mask_to_points(mask.numpy().astype(np.uint8), 64), expected)
    assert torch.equal(mask_to_points(mask[None], 64), expected)
    other = mask.flip(1)
    batch = masks_to_points(torch.stack([mask, other, mask])[:, None], 64)
    assert torch.equal(batch, torch.stack([expected, mask_to_points(other, 64), expected]))


def test_three_structures_have_tags_between_those_of_two():
    spec = StructureSpec(("edema", "core", "enhancing"))
    mask = torch.zeros(50, 60, dtype=torch.int64)
    for k, margin in enumerate((5, 10, 15), 1):
        mask[margin:-margin, margin:-margin] = k
    points = mask_to_points(mask, 100, z=2.0, structures=spec)
    assert points[:, 2].tolist() == [-2.0] * 34 + [0.0] * 33 + [2.0] * 33
    third = torch.tensor([-9.0, -1.1, -0.9, 0.9, 1.1, 2.0])
    assert spec.classify(third, z=2.0).tolist() == [0, 0, 1, 1, 2, 2]


def test_two_structures_are_told_by_the_sign():
    assert DISC_AND_CUP.classify(torch.tensor([-5.0, -1e-3, 1e-3, 4.999, 60.0]), z=5.0).tolist() == [0, 0, 1, 1, 1]


def test_a_cup_that_fills_the_disc_has_the_disc_outline():
    mask = torch.zeros(20, 30, dtype=torch.int64)
    mask[5:15, 8:20] = 2
    points = mask_to_points(mask, 60)
    assert torch.equal(points[:30, :2], points[30:, :2])


def test_empty_mask_is_refused():
    with pytest.raises(ValueError, match=r"mask is empty.*0 background, 1 rim, 2 cup"):
        mask_to_points(torch.zeros(20, 30, dtype=torch.int64))


def test_mask_without_cup_is_refused(mask):
    for method in ("arc_length", "fps"):
        with pytest.raises(ValueError, match=r"no pixel of 'cup' \(class 2\)"):
            mask_to_points(mask.clamp(max=1), 30, method=method)


def test_class_outside_the_spec_is_refused_with_its_place(mask):
    mask = mask.clone()
    mask[7, 11] = 3
    with pytest.raises(ValueError, match=r"class 3 at row 7, column 11; expected 0 background, 1 rim, 2 cup"):
        mask_to_points(mask)
    with pytest.raises(ValueError, match=r"class -2 at row"):
        mask_to_points(-mask.clamp(max=2))


@pytest.mark.parametrize("shape", [(2, 20, 30), (20,), (1, 1, 20, 30), (0, 30)])
def test_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"must have shape \(H, W\) or \(1, H, W\), but has"):
        mask_to_points(torch.ones(shape, dtype=torch.int64))


def test_batch_says_which_mask_is_at_fault(mask):
    batch = torch.stack([mask, mask, torch.zeros_like(mask)])[:, None]
    with pytest.raises(ValueError, match=r"mask 2 of the batch: mask is empty"):
        masks_to_points(batch)
    with pytest.raises(
        ValueError, match=r"masks must have shape \(B, 1, H, W\), none of them 0, but have \(3, 90, 120\)"
    ):
        masks_to_points(batch[:, 0])


def test_other_bad_arguments_are_refused(mask):
    with pytest.raises(ValueError, match="integer class indices, but is float32"):
        mask_to_points(mask.float())
    with pytest.raises(ValueError, match=r"num_points must be at least 6.*but is 5"):
        mask_to_points(mask, 5)
    with pytest.raises(ValueError, match=r"method must be one of .*but is 'polygon'"):
        mask_to_points(mask, method="polygon")
    with pytest.raises(ValueError, match="z must be positive"):
        mask_to_points(mask, z=0.0)
    with pytest.raises(ValueError, match="no name twice"):
        StructureSpec(("cup", "cup"))
