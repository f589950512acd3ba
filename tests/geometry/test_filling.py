import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

from fairdiff_lightning.data import FairSeg
from fairdiff_lightning.geometry import (
    StructureSpec,
    mask_to_points,
    masks_to_points,
    points_to_mask,
    points_to_masks,
)

LESION = StructureSpec(("lesion",))


def perturbed(points, seed, sigma=1.0, sigma_z=0.2):
    """As a generator gives them: noisy, in no order."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(points.shape, generator=generator) * torch.tensor([sigma, sigma, sigma_z])
    return (points + noise)[torch.randperm(len(points), generator=generator)]


def ellipse_points(axes, centre, z, count, angle=0.0):
    t = torch.arange(count, dtype=torch.float64) * (2 * torch.pi / count) + angle
    row, col = centre[0] + axes[0] * t.sin(), centre[1] + axes[1] * t.cos()
    return torch.stack([row, col, torch.full_like(t, z)], 1)


def test_reference_mask_survives_the_round_trip(reference_mask, dice):
    decoded = points_to_mask(mask_to_points(reference_mask), (664, 798))
    assert decoded.dtype == torch.int64
    assert dice(decoded, reference_mask, 1) >= 0.998
    assert dice(decoded, reference_mask, 2) >= 0.998


def test_analytic_outlines_give_the_analytic_mask(reference_mask, dice):
    points = torch.cat(
        [ellipse_points((140, 120), (332, 400), -5.0, 300), ellipse_points((70, 60), (336, 410), 5.0, 212)]
    )
    decoded = points_to_mask(points, (664, 798))
    assert dice(decoded, reference_mask, 1) >= 0.999
    assert dice(decoded, reference_mask, 2) >= 0.999


def test_every_mask_of_the_fairseg_phantom_survives_the_round_trip(tmp_path, dice):
    dataset = FairSeg()
    dataset.write_phantom(tmp_path, seed=0)
    records = dataset.index(tmp_path).records
    masks = torch.stack([torch.from_numpy(dataset.read_mask(record).astype(np.int64))[None] for record in records])
    assert masks.shape == (400, 1, 128, 166)
    decoded = points_to_masks(masks_to_points(masks), (128, 166))
    assert decoded.shape == masks.shape
    for record, a, b in zip(records, decoded, masks, strict=True):
        assert dice(a, b, 1) >= 0.99, record.id
        assert dice(a, b, 2) >= 0.99, record.id


@pytest.mark.parametrize("radius", [12, 13.4, 17, 25, 60])
@pytest.mark.parametrize("cup", [0.35, 0.5, 0.8])
def test_small_discs_survive_the_round_trip(radius, cup, disc_and_cup, dice):
    mask = disc_and_cup((151, 187), (70.3, 91.8), (radius, radius), cup)
    decoded = points_to_mask(mask_to_points(mask), mask.shape)
    assert dice(decoded, mask, 1) >= 0.98
    assert dice(decoded, mask, 2) >= 0.98


@pytest.mark.parametrize(
    ("centre", "axes"),
    [
        ((75, 50), (50, 50)),  # touches the left border
        ((75, 44), (50, 50)),  # rim cut at the left
        ((10, 90), (60, 50)),  # cup and rim cut at the top
        ((5, 8), (60, 50)),  # cut by a corner
        ((140, 180), (70, 60)),  # the opposite corner
        ((75, 93), (120, 70)),  # cut at top and bottom
    ],
)
def test_discs_that_meet_the_border_survive_the_round_trip(centre, axes, disc_and_cup, dice):
    mask = disc_and_cup((151, 187), centre, axes)
    decoded = points_to_mask(mask_to_points(mask), mask.shape)
    assert dice(decoded, mask, 1) >= 0.98
    assert dice(decoded, mask, 2) >= 0.98


@pytest.mark.parametrize("seed", range(5))
def test_noisy_points_in_any_order_give_the_mask(seed, reference_mask, dice):
    decoded = points_to_mask(perturbed(mask_to_points(reference_mask), seed), (664, 798))
    assert dice(decoded, reference_mask, 1) >= 0.97
    assert dice(decoded, reference_mask, 2) >= 0.97


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_smoothed_away_to_well_below_its_size(seed, reference_mask, dice):
    noisy = perturbed(mask_to_points(reference_mask), seed)
    # 1 px of scatter displaces an unsmoothed outline by 0.65 px on average: Dice 0.990 on rim and cup
    decoded = points_to_mask(noisy, (664, 798))
    assert dice(decoded, reference_mask, 1) >= 0.995
    assert dice(decoded, reference_mask, 2) >= 0.995


@pytest.mark.parametrize("seed", range(3))
def test_outliers_and_flipped_tags_are_left_out(seed, reference_mask, dice):
    points = mask_to_points(reference_mask)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(512, generator=generator)
    points[chosen[:25], :2] = torch.rand(25, 2, generator=generator) * torch.tensor([664, 798])
    points[chosen[25:40], 2] *= -1
    decoded = points_to_mask(perturbed(points, seed), (664, 798))
    assert dice(decoded, reference_mask, 1) >= 0.97
    assert dice(decoded, reference_mask, 2) >= 0.97


def test_stray_points_that_spoil_the_closing_do_no_harm(reference_mask, dice):
    clean = mask_to_points(reference_mask)
    expected = points_to_mask(clean, (664, 798))
    for k, (row, col) in ((100, (70, 400)), (400, (166, 410)), (300, (336, 550))):
        stray = clean.clone()
        stray[k, :2] = torch.tensor([row, col])
        decoded = points_to_mask(stray, (664, 798))
        assert dice(decoded, expected, 1) >= 0.999
        assert dice(decoded, expected, 2) >= 0.999


def test_two_lobed_disc_keeps_its_waist(dice):
    row, col = np.mgrid[:331, :400]
    lobes = (np.hypot(row - 160, col - 140) <= 70) | (np.hypot(row - 160, col - 240) <= 70)
    cup = np.hypot((row - 160) / 25, (col - 190) / 50) <= 1
    mask = torch.from_numpy(lobes.astype(np.int64) + cup)
    for points, least in ((mask_to_points(mask), 0.99), (perturbed(mask_to_points(mask), 0), 0.98)):
        decoded = points_to_mask(points, mask.shape)
        assert dice(decoded, mask, 1) >= least
        assert dice(decoded, mask, 2) >= least


def test_edge_pixels_of_the_reference_encoder_can_be_filled_too(reference_mask, dice):
    decoded = points_to_mask(mask_to_points(reference_mask, method="fps"), (664, 798))
    assert dice(decoded, reference_mask, 1) >= 0.995
    assert dice(decoded, reference_mask, 2) >= 0.995


def test_few_points_are_taken_as_the_corners_of_a_polygon():
    corners = torch.tensor([[10.0, 10.0, -5.0], [10.0, 50.0, -5.0], [40.0, 50.0, -5.0], [40.0, 10.0, -5.0]])
    decoded = points_to_mask(corners[[2, 0, 3, 1]] + torch.tensor([0.5, 0.5, 0.0]), (60, 70), structures=LESION)
    expected = torch.zeros(60, 70, dtype=torch.int64)
    expected[11:41, 11:51] = 1
    assert (decoded != expected).sum() <= 4  # the rays pass beside the corners


@pytest.mark.parametrize("count", [12, 20, 28])
def test_corners_among_few_points_are_no_outliers(count, dice):
    square = torch.zeros(100, 120, dtype=torch.int64)
    square[20:81, 40:101] = 1
    decoded = points_to_mask(mask_to_points(square, count, structures=LESION), square.shape, structures=LESION)
    assert dice(decoded, square, 1) >= 0.99


ellipses = st.tuples(
    st.floats(-10, 130), st.floats(-10, 150), st.floats(12, 70), st.floats(12, 70), st.floats(0.3, 0.8)
)


@settings(max_examples=40, deadline=None)
@given(ellipse=ellipses)
def test_random_ellipses_survive_the_round_trip(ellipse, disc_and_cup, dice):
    centre, axes, cup = ellipse[:2], ellipse[2:4], ellipse[4]
    mask = disc_and_cup((121, 141), centre, axes, cup)
    assume((mask == 2).sum() > 60 and (mask == 1).sum() > 60)
    decoded = points_to_mask(mask_to_points(mask), mask.shape)
    assert dice(decoded, mask, 1) >= 0.97
    assert dice(decoded, mask, 2) >= 0.97
    assert dice(decoded, mask, 1, region=True) >= 0.98


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_decoding_ignores_the_order_and_tiny_perturbations(seed, disc_and_cup):
    mask = disc_and_cup((90, 120), (42.3, 61.7), (31.2, 27.9))
    generator = torch.Generator().manual_seed(seed)
    points = perturbed(mask_to_points(mask), seed).double()
    expected = points_to_mask(points, mask.shape)
    assert torch.equal(points_to_mask(points[torch.randperm(512, generator=generator)], mask.shape), expected)
    tiny = 1e-9 * torch.randn(points.shape, generator=generator, dtype=torch.float64)
    assert torch.equal(points_to_mask(points + tiny, mask.shape), expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shift=st.tuples(st.integers(-12, 40), st.integers(-20, 40)))
def test_mask_moves_with_the_points(seed, shift, disc_and_cup):
    mask = disc_and_cup((90, 120), (42.3, 61.7), (21.2, 27.9))
    points = perturbed(mask_to_points(mask), seed).double()
    large = (140, 170)
    moved = points_to_mask(points + torch.tensor([*shift, 0]), large)
    assert torch.equal(moved, points_to_mask(points, large).roll(shift, (0, 1)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.5, 60), drift=st.floats(0, 30))
def test_inner_lies_inside_outer_whatever_the_points(seed, spread, drift):
    generator = torch.Generator().manual_seed(seed)
    spec = StructureSpec(("a", "b", "c"))
    points = torch.randn(3, 120, 3, generator=generator) * torch.tensor([spread, spread, 0.3])
    points += torch.tensor([[30.0, 45.0, -5.0], [30.0, 45.0 + drift, 0.0], [30.0 + drift, 45.0, 5.0]])[:, None]
    try:
        decoded = points_to_mask(points.flatten(0, 1), (61, 90), structures=spec)
    except ValueError as error:
        assume("covers no pixel" not in str(error))
        raise
    inside = torch.ones(61, 90, dtype=torch.bool)
    for k, cloud in enumerate(points):
        cloud[:, 2] = -5.0
        inside &= points_to_mask(cloud, (61, 90), structures=LESION) == 1
        assert torch.equal(decoded > k, inside)


def test_a_cup_beyond_the_disc_is_cut_off():
    disc, cup = ellipse_points((20, 20), (40, 50), -5.0, 256), ellipse_points((15, 15), (40, 65), 5.0, 256)
    decoded = points_to_mask(torch.cat([disc, cup]), (80, 100))
    row, col = torch.meshgrid(torch.arange(80.0), torch.arange(100.0), indexing="ij")
    in_disc, in_cup = torch.hypot(row - 40, col - 50) < 20, torch.hypot(row - 40, col - 65) < 15
    assert ((decoded != in_disc.long() + (in_disc & in_cup)).sum()) <= 8  # centres on the circles
    assert not (decoded[~in_disc] == 2).any()


def test_one_structure_and_four():
    row, col = np.mgrid[:120, :150]
    angle = np.arctan2(row - 60, col - 70)
    radius = np.hypot(row - 60, col - 70) / (1 + 0.2 * np.cos(3 * angle))
    lesion = torch.from_numpy((radius <= 40).astype(np.int64))
    assert torch.equal(
        points_to_mask(mask_to_points(lesion, structures=LESION), lesion.shape, structures=LESION), lesion
    )
    four = StructureSpec(("a", "b", "c", "d"))
    rings = torch.from_numpy(sum((radius <= r).astype(np.int64) for r in (45, 33, 22, 12)))
    decoded = points_to_mask(mask_to_points(rings, 1024, structures=four), rings.shape, structures=four)
    assert (decoded != rings).float().mean() < 2e-3


def test_regions_come_back_in_one_piece():
    decoded = points_to_mask(ellipse_points((20, 30), (40, 50), -5.0, 200), (80, 100), structures=LESION)
    assert label(decoded.numpy())[1] == 1


def test_batch_equals_one_by_one(disc_and_cup):
    masks = torch.stack([disc_and_cup((90, 120), (40 + k, 60), (20 + 3 * k, 25)) for k in range(3)])[:, None]
    clouds = torch.stack([perturbed(cloud, k) for k, cloud in enumerate(masks_to_points(masks))])
    clouds[1, :40, 2] = 5.0  # counts differ between clouds
    batch = points_to_masks(clouds, (90, 120))
    assert batch.shape == (3, 1, 90, 120)
    assert torch.equal(batch[:, 0], torch.stack([points_to_mask(cloud, (90, 120)) for cloud in clouds]))
    closed = points_to_masks(clouds, (90, 120), method="closing")
    assert torch.equal(closed[2, 0], points_to_mask(clouds[2], (90, 120), method="closing"))


def test_too_few_points_name_the_structure_and_the_count():
    disc = ellipse_points((20, 20), (40, 50), -5.0, 60)
    cup = ellipse_points((10, 10), (40, 50), 5.0, 2)
    good = torch.cat([disc[:58], ellipse_points((10, 10), (40, 50), 5.0, 4)])
    with pytest.raises(ValueError, match=r"cloud 0 has 2 points of 'cup', expected at least 3"):
        points_to_mask(torch.cat([disc, cup]), (80, 100))
    with pytest.raises(ValueError, match=r"cloud 1 has 2 points of 'cup'"):
        points_to_masks(torch.stack([good, torch.cat([disc, cup])]), (80, 100))
    with pytest.raises(ValueError, match=r"cloud 0 has 0 points of 'rim'"):
        points_to_mask(cup, (80, 100))


def test_a_cloud_of_a_mask_of_another_size_is_refused(reference_mask):
    with pytest.raises(
        ValueError, match=r"'rim' covers no pixel of a mask of 128 x 166 pixels.*rows 192.*Give the size"
    ):
        points_to_mask(mask_to_points(reference_mask), (128, 166))


def test_structures_without_area_are_refused():
    same = torch.tensor([[10.0, 20.0, -5.0]]).repeat(50, 1)
    with pytest.raises(ValueError, match="'lesion' covers no pixel"):
        points_to_mask(same, (40, 50), structures=LESION)
    apart = [ellipse_points((9, 9), (20, 20), -5.0, 50), ellipse_points((9, 9), (60, 70), 5.0, 50)]
    with pytest.raises(ValueError, match="'cup' covers no pixel"):
        points_to_mask(torch.cat(apart), (80, 100))


def test_bad_arguments_are_refused():
    points = torch.rand(20, 3)
    with pytest.raises(ValueError, match=r"points must have shape \(N, 3\), but have \(2, 20, 3\)"):
        points_to_mask(points.expand(2, -1, -1), (40, 50))
    with pytest.raises(ValueError, match=r"points must have shape \(B, N, 3\), none of them 0, but have \(1, 20, 2\)"):
        points_to_mask(points[:, :2], (40, 50))
    with pytest.raises(ValueError, match="size must be a height and a width"):
        points_to_mask(points, (40, 0))
    with pytest.raises(ValueError, match=r"method must be one of .*'closing'.*but is 'fps'"):
        points_to_mask(points, (40, 50), method="fps")
    points[7, 1] = torch.nan
    with pytest.raises(ValueError, match="cloud 0: point 7 is not finite"):
        points_to_mask(points, (40, 50))
