import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from fairdiff_lightning.metrics import (
    DemographicParityDifference,
    EqualizedOddsDifference,
    EquityScaled,
    GroupStd,
    MaxGap,
    WorstGroup,
    demographic_parity_difference,
    equalized_odds_difference,
)


@pytest.fixture
def reference_scores(reference):
    groups = reference("dmoe")["E2_equity_scaled"]["groups"]
    scores = torch.tensor([score for group in groups for score in group])
    return scores, torch.tensor([index for index, group in enumerate(groups) for _ in group])


def test_metrics_equal_the_dmoe_reference(reference, reference_scores):
    expected = reference("dmoe")["E2_equity_scaled"]
    means = torch.tensor(expected["group_means"])
    values = {
        EquityScaled(3): expected["es"],
        EquityScaled(3, alpha=2.0): expected["es_alpha2"],
        EquityScaled(3, variant="std"): expected["es_std"],
        WorstGroup(3): min(means),
        MaxGap(3): max(means) - min(means),
        GroupStd(3): means.std(),
    }
    for metric, value in values.items():
        metric.update(*reference_scores)
        assert metric.compute().item() == pytest.approx(float(value), abs=1e-6), metric


def test_classes_are_averaged_after_scaling(reference_scores):
    scores, group = reference_scores
    both, first, second = EquityScaled(3), EquityScaled(3), EquityScaled(3)
    both.update(torch.stack([scores, scores.square()], dim=1), group)
    first.update(scores, group)
    second.update(scores.square(), group)
    torch.testing.assert_close(both.compute(), (first.compute() + second.compute()) / 2)


def test_unknown_groups_count_in_the_overall_score_only(reference_scores):
    scores, group = reference_scores
    metric = EquityScaled(3)
    metric.update(scores, group)
    metric.update(torch.tensor([0.1]), torch.tensor([-1]))
    overall = torch.cat([scores, torch.tensor([0.1])]).mean()
    gaps = sum((scores[group == g].mean() - overall).abs() for g in range(3))
    torch.testing.assert_close(metric.compute(), overall / (1 + gaps))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(-1, 2)), min_size=2, max_size=10), st.data())
def test_parts_of_the_data_give_the_value_of_the_whole(rows, data):
    cut = data.draw(st.integers(1, len(rows) - 1))
    scores, group = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    for metric in (EquityScaled, WorstGroup, MaxGap, GroupStd):
        whole, parts = metric(3), metric(3)
        whole.update(scores, group)
        parts(scores[:cut], group[:cut])
        parts(scores[cut:], group[cut:])
        torch.testing.assert_close(parts.compute(), whole.compute(), equal_nan=True)


def test_a_collection_computes_all_of_them(reference_scores):
    collection = MetricCollection([EquityScaled(3), WorstGroup(3), MaxGap(3), GroupStd(3)])
    scores, group = reference_scores
    for part in (slice(0, 4), slice(4, 9)):
        collection.update(scores[part], group[part])
    values = collection.compute()
    assert values["WorstGroup"].item() == pytest.approx(0.7, abs=1e-6)
    assert values["MaxGap"].item() == pytest.approx(0.2, abs=1e-6)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize(
    "metric", [EquityScaled(2), WorstGroup(2), DemographicParityDifference(2), EqualizedOddsDifference(2)]
)
def test_no_image_gives_nan_and_not_an_error(metric):
    assert metric.compute().isnan()


@pytest.mark.parametrize("unknown_as_group", [False, True])
def test_pixel_metrics_equal_the_functions(unknown_as_group):
    torch.manual_seed(0)
    logits, target = torch.randn(6, 3, 5, 7), torch.randint(0, 3, (6, 1, 5, 7))
    group = torch.tensor([0, 0, 2, 2, -1, 0])
    parity = DemographicParityDifference(3, positive=(2,), unknown_as_group=unknown_as_group)
    odds = EqualizedOddsDifference(3, positive=(2,), unknown_as_group=unknown_as_group)
    for part in (slice(0, 1), slice(1, 6)):
        parity.update(logits[part], group[part])
        odds.update(logits[part].argmax(1), target[part], group[part])
    pred = logits.argmax(1)
    assert parity.compute() == demographic_parity_difference(pred, group, 3, (2,), unknown_as_group)
    assert odds.compute() == equalized_odds_difference(pred, target, group, 3, (2,), unknown_as_group)


def test_pixel_counts_stay_exact_beyond_float_precision():
    metric = DemographicParityDifference(2)
    metric.counts += 2**53
    metric.update(torch.tensor([[1]]), torch.tensor([0]))
    assert metric.counts[0].tolist() == [2**53, 2**53 + 1]
