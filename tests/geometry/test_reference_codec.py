import hashlib

import numpy as np
import pytest
import torch

from fairdiff_lightning.geometry import StructureSpec, mask_to_points, points_to_mask
from fairdiff_lightning.geometry.reference import _paint, edge_pixels


def sha1(points):
    return hashlib.sha1(points.numpy().astype("<i4").tobytes()).hexdigest()


@pytest.fixture(scope="module")
def outline(reference_mask):
    return edge_pixels(reference_mask.numpy(), z=5.0)


@pytest.fixture(scope="module")
def thinned(reference_mask):
    return mask_to_points(reference_mask, method="fps")


def test_edge_pixels_equal_pc01(reference, outline):
    expected = reference("fairdiff")["pc01_outline"]["expected"]
    assert [int((outline[:, 2] == z).sum()) for z in (-5, 5)] == [expected["n_disc"], expected["n_cup"]]
    assert outline.sum(0).tolist() == expected["column_sums"]
    assert outline.amin(0).tolist() == expected["min"]
    assert outline.amax(0).tolist() == expected["max"]
    assert outline[:3].tolist() == expected["first3"]
    assert outline[-2:].tolist() == expected["last2"]
    assert sha1(outline) == expected["sha1_int32_rows"]


def test_farthest_points_equal_pc02(reference, thinned):
    expected = reference("fairdiff")["pc02_fps"]["expected"]
    assert [int((thinned[:, 2] == z).sum()) for z in (-5, 5)] == [expected["n_disc"], expected["n_cup"]]
    assert thinned.double().sum(0).tolist() == expected["column_sums"]
    assert thinned[:4].tolist() == expected["first4"]
    assert sha1(thinned) == expected["sha1_int32_rows"]
    assert thinned.double().mean(0).tolist() == pytest.approx(expected["mean"], abs=1e-9)
    assert thinned.double().std().item() == pytest.approx(expected["std_all_coords_ddof1"], abs=1e-9)


def test_closing_equals_pc03(reference, reference_mask, outline, thinned, dice):
    expected = reference("fairdiff")["pc03_decode"]["expected"]
    noise = np.random.default_rng(0).standard_normal((512, 3)) * [1, 1, 0.2]
    clouds = {
        "all_outline_points": outline,
        "fps512": thinned,
        "fps512_plus_noise_rng0_sigma_1_1_0.2": thinned.double() + torch.from_numpy(noise),
        "cup_points_only": thinned[thinned[:, 2] > 0],
        "disc_points_only": thinned[thinned[:, 2] < 0],
    }
    assert clouds.keys() == expected.keys()
    noisy = "fps512_plus_noise_rng0_sigma_1_1_0.2"
    apart = torch.stack([torch.arange(512.0), torch.zeros(512), clouds[noisy][:, 2]], 1)  # a pixel for each
    assert sum(np.count_nonzero(layer) for layer in _paint(apart, (512, 1), 5.0)) == expected[noisy]["points_kept"]
    for name, cloud in clouds.items():
        mask = points_to_mask(cloud, (664, 798), method="closing")
        assert mask.flatten().bincount(minlength=3).tolist() == expected[name]["counts_bg_rim_cup"], name
        for key, k, region in (("dice_rim", 1, False), ("dice_cup", 2, False), ("dice_disc", 1, True)):
            if key in expected[name]:
                assert dice(mask, reference_mask, k, region) == pytest.approx(expected[name][key], abs=1e-12), name


def ring(z, radius, n=400):
    angle = torch.arange(n) * (2 * torch.pi / n)
    return torch.stack([332 + radius * angle.sin(), 400 + radius * angle.cos(), torch.full((n,), z)], 1)


def test_closing_reads_z_as_pc04(reference):
    check = reference("fairdiff")["pc04_z_threshold"]
    for z, kept_as in zip(check["inputs"]["z_values"], check["expected"]["kept_as"], strict=True):
        beside = {"cup": ring(-5.0, 120), "disc": ring(5.0, 30), "none": ring(-5.0, 120)}[kept_as]
        mask = points_to_mask(torch.cat([ring(z, 60), beside]), (664, 798), method="closing")
        expected = {"cup": (2, 1), "disc": (1, 0), "none": (1, 1)}[kept_as]  # at radius 50 and 70
        assert (int(mask[332, 450]), int(mask[332, 470])) == expected, (z, kept_as)


def test_closing_truncates_coordinates_and_lets_later_points_erase_earlier_ones(reference):
    expected = reference("fairdiff")["pc04_z_threshold"]["expected"]
    dot = torch.tensor([[-0.9, 30.9, -5.0]])
    painted = points_to_mask(dot, (50, 60), method="closing").nonzero().double()
    assert painted.amin(0)[0] == expected["row_minus_0_9_maps_to"]
    assert painted.mean(0)[1] == pytest.approx(30, abs=1)
    outside = torch.tensor([[50.0, 0.0, -5.0], [0.0, 60.0, -5.0], [-1.0, 0.0, -5.0]])
    assert not points_to_mask(outside, (50, 60), method="closing").any()
    eraser = dot * torch.tensor([1, 1, 0.9])
    assert not points_to_mask(torch.cat([dot, eraser]), (50, 60), method="closing").any()
    assert points_to_mask(torch.cat([eraser, dot]), (50, 60), method="closing").any()


def test_small_discs_are_refused_aloud_where_fairdiff_drops_them(disc_and_cup):
    mask = disc_and_cup((200, 260), (100, 120), (50, 50), cup=0.5)
    with pytest.raises(ValueError, match=r"edge pixels, fewer than num_points=512.*arc_length"):
        mask_to_points(mask, method="fps")
    assert len(mask_to_points(mask, 100, method="fps")) == 100


def test_other_structures_are_refused():
    lesion = StructureSpec(("lesion",))
    with pytest.raises(ValueError, match=r"'fps' is FairDiff's own, for two structures.*1 lesion"):
        mask_to_points(torch.ones(50, 60).long(), 20, method="fps", structures=lesion)
    with pytest.raises(ValueError, match=r"'closing' is FairDiff's own"):
        points_to_mask(torch.zeros(9, 3), (50, 60), method="closing", structures=lesion)
