import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from fairdiff_lightning.metrics import GroupedDice, GroupedIoU, GroupedScores, dice_score, iou_score

NAN = float("nan")


@pytest.fixture
def batch():
    torch.manual_seed(0)
    pred, target = torch.randint(0, 3, (2, 5, 1, 6, 7))
    target[1, target[1] == 2] = 0  # image 1 has no cup, and is not predicted one
    pred[1, pred[1] == 2] = 0
    return pred, target, torch.tensor([0, 2, 2, -1, 0])  # group 1 of 3 absent


def definition(scores, group, num_groups):
    def mean(rows):
        rows = [s for s in rows if s == s]
        return sum(rows) / len(rows) if rows else NAN

    columns = list(zip(*scores.tolist(), strict=True))
    return {
        "overall": [mean(column) for column in columns],
        "group": [
            [mean([s for s, g in zip(column, group.tolist(), strict=True) if g == k]) for column in columns]
            for k in range(num_groups)
        ],
        "count": [group.tolist().count(k) for k in range(num_groups)],
    }


@pytest.mark.parametrize(("metric", "score"), [(GroupedDice, dice_score), (GroupedIoU, iou_score)])
def test_report_equals_its_definition(metric, score, batch):
    pred, target, group = batch
    metric = metric(num_classes=3, num_groups=3)
    metric.update(pred[:2], target[:2], group[:2])
    metric.update(pred[2:], target[2:], group[2:])
    report, scores = metric.compute(), score(pred, target, 3)
    expected = definition(scores, group, 3)
    assert report["overall"].tolist() == pytest.approx(expected["overall"], abs=1e-6)
    assert report["group"].isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    for ours, theirs in zip(report["group"].tolist(), expected["group"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6, nan_ok=True)
    assert report["count"].tolist() == expected["count"]
    torch.testing.assert_close(report["scores"], scores.float(), equal_nan=True)
    assert report["groups"].tolist() == group.tolist()


def test_scalars_are_class_means_over_the_groups_present():
    metric = GroupedScores(num_classes=3, num_groups=3)
    metric.update(torch.tensor([[0.9, 0.5], [0.6, 0.7], [0.3, 0.3]]), torch.tensor([0, 2, -1]))
    report = metric.compute()
    assert report["mean"].item() == pytest.approx((0.6 + 0.5) / 2)
    assert report["worst_group"].item() == pytest.approx((0.6 + 0.5) / 2)
    assert report["max_gap"].item() == pytest.approx((0.3 + 0.2) / 2)


def test_logits_score_as_their_argmax(batch):
    pred, target, group = batch
    logits = torch.randn(5, 3, 6, 7)
    from_logits, from_mask = GroupedDice(3, 3), GroupedDice(3, 3)
    from_logits.update(logits, target, group)
    from_mask.update(logits.argmax(1), target, group)
    assert_same(from_logits.compute(), from_mask.compute())


def test_one_foreground_class_and_one_group_keep_their_shapes():
    metric = GroupedDice(num_classes=2, num_groups=1)
    metric.update(
        torch.ones(1, 1, 4, 5, dtype=torch.int64), torch.ones(1, 1, 4, 5, dtype=torch.int64), torch.tensor([0])
    )
    for report in (metric.compute(), pickle.loads(pickle.dumps(metric)).compute()):
        shapes = {name: tuple(value.shape) for name, value in report.items()}
        assert shapes == {
            "overall": (1,),
            "group": (1, 1),
            "count": (1,),
            "mean": (),
            "worst_group": (),
            "max_gap": (),
            "scores": (1, 1),
            "groups": (1,),
        }


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_image_gives_nan_and_not_an_error():
    report = GroupedScores(num_classes=3, num_groups=2).compute()
    assert report["overall"].isnan().all()
    assert report["group"].shape == (2, 2)
    assert report["count"].tolist() == [0, 0]
    assert report["scores"].shape == (0, 2)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True, msg=name)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(5)), st.integers(0, 5))
def test_order_and_batches_do_not_matter(order, cut):
    torch.manual_seed(0)
    scores, group = torch.rand(5, 2), torch.tensor([0, 2, 2, -1, 0])
    once, twice = GroupedScores(3, 3), GroupedScores(3, 3)
    once.update(scores, group)
    for part in (order[:cut], order[cut:]):
        twice.update(scores[part], group[part])
    ours, theirs = twice.compute(), once.compute()
    for name in ("overall", "group", "count", "mean", "worst_group", "max_gap"):
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True)
    torch.testing.assert_close(ours["scores"], scores[order])


def test_forward_reports_the_batch_and_keeps_the_rest(batch):
    pred, target, group = batch
    metric, whole, half = GroupedDice(3, 3), GroupedDice(3, 3), GroupedDice(3, 3)
    metric(pred[:2], target[:2], group[:2])
    half.update(pred[2:], target[2:], group[2:])
    whole.update(pred, target, group)
    assert_same(metric(pred[2:], target[2:], group[2:]), half.compute())
    assert_same(metric.compute(), whole.compute())


def test_reset_forgets_and_clone_does_not_share(batch):
    metric = GroupedDice(3, 3)
    metric.update(*batch)
    other = copy.deepcopy(metric)
    metric.reset()
    metric.update(*(x[:1] for x in batch))
    assert len(metric.compute()["groups"]) == 1
    assert len(other.compute()["groups"]) == 5


def test_metrics_work_in_a_collection(batch):
    collection, alone = MetricCollection({"dice": GroupedDice(3, 3), "iou": GroupedIoU(3, 3)}), GroupedIoU(3, 3)
    for part in (slice(0, 2), slice(2, 5)):
        collection.update(*(x[part] for x in batch))
    alone.update(*batch)
    assert_same(collection["iou"].compute(), alone.compute())


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"scores has shape \(4, 3\), expected \(B, 2\)"):
        GroupedScores(3, 2).update(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"group has shape \(1,\), expected \(4,\)"):
        GroupedScores(3, 2).update(torch.rand(4, 2), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected logits \(B, K, ...\) with K > 1"):
        GroupedDice(2, 2).update(
            torch.rand(2, 1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        )
