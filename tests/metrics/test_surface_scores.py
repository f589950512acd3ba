import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_surface_dice
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from torch.nn import functional as F

from fairdiff_lightning.metrics import GroupedHausdorff95, GroupedSurfaceDice, surface_scores


def test_disks_equal_the_dmoe_reference(reference, dmoe_disks):
    expected = reference("dmoe")["E1_case_metrics"]
    cases = {
        "pred=B,gt=A": ("B", "A"),
        "pred=A,gt=A": ("A", "A"),
        "pred=S,gt=A": ("S", "A"),
        "pred=A,gt=empty": ("A", "empty"),
        "pred=empty,gt=A": ("empty", "A"),
        "both empty": ("empty", "empty"),
    }
    for key, names in cases.items():
        scores = surface_scores(*(dmoe_disks[name][None].long() for name in names), 2, empty="reference")
        assert scores.hausdorff95.item() == pytest.approx(expected[key][1], abs=1e-6), key
    for key, names in {"asd(B,A)": "BA", "asd(A,B)": "AB"}.items():
        scores = surface_scores(*(dmoe_disks[name][None].long() for name in names), 2)
        assert scores.average_distance.item() == pytest.approx(expected[key], abs=1e-6)


def test_fundus_equals_the_fairdiff_reference(reference, fairdiff_pair):
    expected = reference("fairdiff")["sm01_per_image"]["expected"]
    scores = surface_scores(*fairdiff_pair, 3)
    assert scores.hausdorff95[0].tolist() == pytest.approx([expected["rim"][1], expected["cup"][1]], abs=1e-6)
    assert scores.average_distance[0].tolist() == pytest.approx([expected["asd_rim"], expected["asd_cup"]], abs=1e-6)
    assert scores.surface_dice[0].tolist() == pytest.approx([expected["nsd_rim"], expected["nsd_cup"]], abs=1e-6)


def test_fundus_equals_the_dmoe_reference_without_its_phantom_class(reference, dmoe_pair):
    expected = reference("dmoe")["E3_test_single_image_3class"]
    scores = surface_scores(*dmoe_pair, 3, empty="reference")
    rows = expected["metric_list[dice,hd95,iou] for class 1,2,3"]
    assert scores.hausdorff95[0].tolist() == pytest.approx([row[1] for row in rows[:2]], abs=1e-6)
    assert scores.average_distance[0].tolist() == pytest.approx(expected["asd"][:2], abs=1e-6)
    assert scores.surface_dice[0].tolist() == pytest.approx(expected["nsd(5px)"][:2], abs=1e-6)


def test_reference_policy_equals_the_fairdiff_reference(reference, dmoe_disks):
    expected = reference("fairdiff")["sm02_empty_masks"]["expected"]
    something, nothing = dmoe_disks["A"][None], dmoe_disks["empty"][None]
    pairs = {
        "pred_nonempty_gt_empty": (something, nothing),
        "pred_empty_gt_nonempty": (nothing, something),
        "both_empty": (nothing, nothing),
    }
    for key, pair in pairs.items():
        assert surface_scores(*pair, 2, empty="reference").hausdorff95.item() == expected[key][1], key


def surface(mask):
    return np.argwhere(mask & ~binary_erosion(mask))


@pytest.mark.parametrize("spacing", [None, (0.5, 2.0, 1.5)])
def test_volumes_equal_the_definition(spacing):
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.rand(2, 2, 5, 8, 6, generator=generator) > 0.8
    scores = surface_scores(pred, target, 2, spacing=spacing, tolerance=1.2)
    for index in range(2):
        scale = np.array(spacing or (1, 1, 1))
        distances = cdist(surface(pred[index].numpy()) * scale, surface(target[index].numpy()) * scale)
        outward, backward = distances.min(1), distances.min(0)
        both = np.concatenate([outward, backward])
        assert scores.hausdorff95[index].item() == pytest.approx(np.percentile(both, 95), abs=1e-5)
        assert scores.average_distance[index].item() == pytest.approx(outward.mean(), abs=1e-5)
        assert scores.symmetric_distance[index].item() == pytest.approx(both.mean(), abs=1e-5)
        assert scores.surface_dice[index].item() == pytest.approx((both <= 1.2).mean(), abs=1e-5)


@pytest.mark.parametrize("counts", [(1, 1), (2, 1), (19, 1), (13, 29), (2**24, 1)])
def test_percentile_of_few_and_of_very_many_distances_lies_on_the_line_between_two(monkeypatch, counts):
    distances = torch.arange(sum(counts), dtype=torch.float32) / 2
    parts = iter(distances.flip(0).split(counts))  # from the far end, so that nothing is sorted
    monkeypatch.setattr("monai.metrics.utils.get_surface_distance", lambda *_, **__: next(parts))
    mask = torch.ones(1, 1, 1, 1, dtype=torch.int64)
    expected = 0.95 * (sum(counts) - 1) / 2
    assert surface_scores(mask, mask, 2).hausdorff95.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_surface_dice_equals_monai(dmoe_pair):
    pred, target = (mask.roll(shift, 3) for mask, shift in zip(dmoe_pair, (3, 0), strict=True))
    hot = (F.one_hot(mask[:, 0], 3).movedim(-1, 1) for mask in (pred, target))
    theirs = compute_surface_dice(*hot, class_thresholds=[2.0, 2.0])
    torch.testing.assert_close(surface_scores(pred, target, 3, tolerance=2.0).surface_dice, theirs)


def test_a_missed_structure_is_as_far_as_the_image_is_wide():
    nothing = torch.zeros(2, 1, 3, 4, dtype=torch.int64)
    something = nothing.clone()
    something[0, 0, 1, 1] = 1
    for pair in ((something, nothing), (nothing, something)):
        scores = surface_scores(*pair, 2)
        assert scores.hausdorff95[0].item() == scores.average_distance[0].item() == 5
        assert scores.surface_dice[0].item() == 0
        assert all(math.isnan(score[1]) for score in scores)
    assert surface_scores(something, nothing, 2, spacing=(2.0, 2.0)).hausdorff95[0].item() == 10


def test_metrics_report_groups_and_know_which_way_is_better(dmoe_pair):
    pred, target = (mask.expand(3, -1, -1, -1).clone() for mask in dmoe_pair)
    pred[2] = target[2]
    group = torch.tensor([0, -1, 1])
    distance, share = GroupedHausdorff95(3, 3), GroupedSurfaceDice(3, 3, tolerance=1.0)
    for metric in (distance, share):
        metric.update(pred, target, group)
    expected = surface_scores(pred, target, 3, tolerance=1.0)
    report = distance.compute()
    torch.testing.assert_close(report["group"][0], expected.hausdorff95[0])
    assert report["group"][1].tolist() == [0, 0]
    assert report["worst_group"] == expected.hausdorff95[0].mean()
    assert share.compute()["worst_group"] == expected.surface_dice[0].mean()


def test_masks_of_different_size_are_named():
    with pytest.raises(ValueError, match=r"pred has shape \(1, 4, 5\) and target \(1, 5, 4\)"):
        surface_scores(torch.zeros(1, 1, 4, 5).long(), torch.zeros(1, 5, 4).long(), 2)
