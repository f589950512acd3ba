import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_iou
from torch.nn import functional as F
from torchmetrics.segmentation import DiceScore

from fairdiff_lightning.metrics import cdr_error, dice_score, iou_score, overlap_counts

CASES = {
    "pred=B,gt=A": ("B", "A"),
    "pred=A,gt=A": ("A", "A"),
    "pred=S,gt=A": ("S", "A"),
    "pred=A,gt=empty": ("A", "empty"),
    "pred=empty,gt=A": ("empty", "A"),
    "both empty": ("empty", "empty"),
}
EMPTY_TRUTH = torch.zeros(1, 4, 5, dtype=torch.int64)
SOMETHING = F.pad(EMPTY_TRUTH[:, 1:, 1:] + 1, (0, 1, 0, 1))


def test_disks_equal_the_dmoe_reference(reference, dmoe_disks):
    expected = reference("dmoe")["E1_case_metrics"]
    for key, names in CASES.items():
        pred, target = (dmoe_disks[name][None].long() for name in names)
        scores = [score(pred, target, 2, empty="reference").item() for score in (dice_score, iou_score)]
        assert scores == pytest.approx([expected[key][0], expected[key][2]], abs=1e-12), key
    areas = overlap_counts(dmoe_disks["A"][None], dmoe_disks["B"][None], 2)
    assert [x.item() for x in areas] == [expected["areas"][key] for key in ("A&B", "A", "B")]


def test_fundus_equals_the_fairdiff_reference(reference, fairdiff_pair):
    expected = reference("fairdiff")["sm01_per_image"]["expected"]
    rim, cup = expected["rim"], expected["cup"]
    assert dice_score(*fairdiff_pair, 3)[0].tolist() == pytest.approx([rim[0], cup[0]], abs=1e-9)
    assert iou_score(*fairdiff_pair, 3)[0].tolist() == pytest.approx([rim[2], cup[2]], abs=1e-9)
    assert cdr_error(*fairdiff_pair).item() == pytest.approx(expected["cdr_distance"], abs=1e-9)


def test_fundus_equals_the_dmoe_reference_without_its_phantom_class(reference, dmoe_pair):
    expected = reference("dmoe")["E3_test_single_image_3class"]
    rim, cup, phantom = expected["metric_list[dice,hd95,iou] for class 1,2,3"]
    dice = dice_score(*dmoe_pair, 3, empty="reference")
    assert dice[0].tolist() == pytest.approx([rim[0], cup[0]], abs=1e-12)
    assert iou_score(*dmoe_pair, 3)[0].tolist() == pytest.approx([rim[2], cup[2]], abs=1e-12)
    assert cdr_error(*dmoe_pair).item() == pytest.approx(expected["cdr_distance"], abs=1e-12)
    logged = expected["mean_dice_as_logged(divides by 3)"]
    assert phantom[0] == 0
    assert dice.mean().item() == pytest.approx(logged * 3 / 2, abs=1e-12)  # ours: the mean of the two real classes


def test_cdr_of_disks_equals_the_dmoe_reference(reference, disk, dmoe_disks):
    def fundus(cup, disc):
        return disc.long().masked_fill(cup, 2)[None]

    pred = fundus(dmoe_disks["A"], disk(32, 32, 15, 15, 12))
    target = fundus(dmoe_disks["B"], disk(32, 32, 17, 14, 11))
    expected = reference("dmoe")["E1_case_metrics"]
    assert cdr_error(pred, target).item() == pytest.approx(
        expected["cdr example cupP=A,cupG=B,discP=disk r12,discG=disk r11"], abs=1e-12
    )
    same_areas = cdr_error(
        fundus(dmoe_disks["S"], dmoe_disks["A"]), fundus(dmoe_disks["S"], dmoe_disks["A"].roll(1, 0))
    )
    assert same_areas.item() == expected["cdr_distance(cupP=S,cupG=S,discP=A,discG=B)"] == 0


def test_cdr_without_a_disc_is_not_defined():
    assert cdr_error(EMPTY_TRUTH, SOMETHING).isnan().item()


@pytest.mark.parametrize("score", [dice_score, iou_score])
@pytest.mark.parametrize(
    ("empty", "both_empty", "false_positive"),
    [("skip", float("nan"), 0.0), ("one", 1.0, 0.0), ("zero", 0.0, 0.0), ("reference", 0.0, 1.0)],
)
def test_empty_masks_score_as_the_policy_says(score, empty, both_empty, false_positive):
    pairs = [(EMPTY_TRUTH, EMPTY_TRUTH), (SOMETHING, EMPTY_TRUTH), (EMPTY_TRUTH, SOMETHING)]
    scores = torch.stack([score(*pair, 2, empty=empty).squeeze() for pair in pairs])
    torch.testing.assert_close(scores, torch.tensor([both_empty, false_positive, 0.0]).double(), equal_nan=True)


def test_reference_policy_equals_the_fairdiff_reference(reference):
    expected = reference("fairdiff")["sm02_empty_masks"]["expected"]
    pairs = {
        "pred_nonempty_gt_empty": (SOMETHING, EMPTY_TRUTH),
        "pred_empty_gt_nonempty": (EMPTY_TRUTH, SOMETHING),
        "both_empty": (EMPTY_TRUTH, EMPTY_TRUTH),
    }
    for key, pair in pairs.items():
        scores = [score(*pair, 2, empty="reference").item() for score in (dice_score, iou_score)]
        assert scores == [expected[key][0], expected[key][2]], key


@st.composite
def mask_pairs(draw):
    seed, classes = draw(st.integers(0, 2**31)), draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 1, draw(st.integers(1, 6)), draw(st.integers(1, 5)))
    used = draw(st.integers(1, classes))  # classes from here on are empty in both
    return (*torch.randint(0, used, (2, *shape), generator=generator), classes)


def one_hot(mask, classes):
    return F.one_hot(mask[:, 0], classes).movedim(-1, 1)


@settings(deadline=None, max_examples=30)
@given(mask_pairs())
def test_scores_equal_monai_where_an_empty_pair_scores_one(pair):
    pred, target, classes = pair
    hot = one_hot(pred, classes), one_hot(target, classes)
    theirs = compute_dice(*hot, include_background=False, ignore_empty=False)
    torch.testing.assert_close(dice_score(pred, target, classes, empty="one").float(), theirs)
    theirs = compute_iou(*hot, include_background=False, ignore_empty=False)
    torch.testing.assert_close(iou_score(pred, target, classes, empty="one").float(), theirs)


@settings(deadline=None, max_examples=30)
@given(mask_pairs())
def test_mean_dice_equals_torchmetrics_where_an_empty_pair_is_skipped(pair):
    pred, target, classes = pair
    theirs = DiceScore(classes, include_background=False, average="none", aggregation_level="global")
    for p, t in zip(pred, target, strict=True):
        ours = dice_score(p[None], t[None], classes)[0].float().squeeze()
        torch.testing.assert_close(ours, theirs(*(one_hot(m[None], classes) for m in (p, t))), equal_nan=True)


@settings(deadline=None, max_examples=30)
@given(mask_pairs(), st.permutations(range(3)))
def test_each_image_is_scored_by_itself(pair, order):
    pred, target, classes = pair
    permuted = dice_score(pred[order], target[order], classes)
    torch.testing.assert_close(permuted, dice_score(pred, target, classes)[order], equal_nan=True)


def test_a_channel_dimension_is_optional_on_either_side():
    pred, target = torch.randint(0, 3, (2, 4, 1, 5, 7))
    expected = dice_score(pred, target, 3)
    torch.testing.assert_close(dice_score(pred[:, 0], target, 3), expected)
    torch.testing.assert_close(dice_score(pred, target[:, 0], 3), expected)


def test_values_of_no_class_are_in_no_class():
    pred, target = torch.tensor([[1, 1, -1, 9]]), torch.tensor([[1, 255, 255, -1]])
    assert [x.tolist() for x in overlap_counts(pred, target, 3)] == [[[1, 0]], [[2, 0]], [[1, 0]]]


def test_bad_masks_are_named():
    mask = torch.zeros(2, 1, 4, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(2, 1, 6, 4\) and target \(2, 1, 4, 6\)"):
        dice_score(mask.transpose(2, 3), mask, 2)
    with pytest.raises(ValueError, match=r"float32, expected class indices.*argmax"):
        dice_score(mask.float(), mask, 2)
    with pytest.raises(ValueError, match="num_classes is 1, expected at least 2"):
        dice_score(mask, mask, 1)
    with pytest.raises(ValueError, match="empty is 'nan', expected 'skip'"):
        dice_score(mask, mask, 2, empty="nan")
