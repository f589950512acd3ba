import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.metrics import (
    demographic_parity_difference,
    equalized_odds_difference,
    equity_scaled,
    group_means,
    group_std,
    max_gap,
    overall_mean,
    worst_group,
)

NAN = float("nan")


def flatten(groups):
    scores = torch.tensor([score for group in groups for score in group], dtype=torch.float64)
    return scores, torch.tensor([index for index, group in enumerate(groups) for _ in group])


def equity(groups, **kwargs):
    scores, group = flatten(groups)
    return equity_scaled(overall_mean(scores), group_means(scores, group, len(groups)), **kwargs).item()


def test_equity_scaled_equals_the_dmoe_reference(reference):
    expected = reference("dmoe")["E2_equity_scaled"]
    groups = expected["groups"]
    scores, group = flatten(groups)
    assert overall_mean(scores).item() == pytest.approx(expected["overall"], abs=1e-12)
    assert group_means(scores, group, 3).tolist() == pytest.approx(expected["group_means"], abs=1e-12)
    assert equity(groups) == pytest.approx(expected["es"], abs=1e-12)
    assert equity(groups, alpha=2) == pytest.approx(expected["es_alpha2"], abs=1e-12)
    assert equity(groups, variant="std") == pytest.approx(expected["es_std"], abs=1e-12)
    assert expected["es_with_empty_group"] == "nan"
    assert math.isnan(equity([*groups, []], absent="nan"))
    assert math.isnan(equity([*groups, []], absent="nan", variant="std"))
    assert equity([[0.8, 0.8], [0.8], [0.8]]) == pytest.approx(expected["es_equal_groups"], abs=1e-12)


def test_equity_scaled_equals_the_fairdiff_reference(reference):
    check = reference("fairdiff")["fm01_equity"]
    groups, expected = check["inputs"]["groups"], check["expected"]
    assert overall_mean(flatten(groups)[0]).item() == pytest.approx(expected["overall"], abs=1e-12)
    assert equity(groups) == pytest.approx(expected["es_abs"], abs=1e-12)
    assert equity(groups, variant="std") == pytest.approx(expected["es_std"], abs=1e-12)
    assert equity(groups, alpha=2) == pytest.approx(expected["es_abs_alpha2"], abs=1e-12)


def test_absent_groups_are_skipped():
    groups = [[0.7, 0.9], [], [0.5]]
    present = [groups[0], groups[2]]
    for variant in ("gap_sum", "std"):
        assert equity(groups, variant=variant) == pytest.approx(equity(present, variant=variant))
    per_group = torch.tensor([0.8, NAN, 0.5])
    assert worst_group(per_group).item() == pytest.approx(0.5)
    assert worst_group(per_group, higher_is_better=False).item() == pytest.approx(0.8)
    assert max_gap(per_group).item() == pytest.approx(0.3)
    assert group_std(per_group).item() == pytest.approx(statistics.stdev([0.8, 0.5]))


def test_nothing_is_said_of_no_group():
    overall, per_group = torch.tensor(0.8), torch.full((3,), NAN)
    assert all(math.isnan(f(per_group)) for f in (worst_group, max_gap, group_std))
    assert math.isnan(equity_scaled(overall, per_group))
    alone = torch.tensor([0.8, NAN])
    assert math.isnan(group_std(alone))
    assert math.isnan(equity_scaled(overall, alone, "std"))
    assert equity_scaled(overall, alone) == overall


def test_classes_are_scaled_one_by_one():
    torch.manual_seed(0)
    overall, per_group = torch.rand(4), torch.rand(3, 4)
    per_group[1, 2] = NAN
    for variant in ("gap_sum", "std"):
        columns = [equity_scaled(overall[c], per_group[:, c], variant) for c in range(4)]
        torch.testing.assert_close(equity_scaled(overall, per_group, variant), torch.stack(columns))


scores_and_groups = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.one_of(st.floats(0, 1), st.just(NAN)), min_size=n, max_size=n),
        st.lists(st.integers(-1, 2), min_size=n, max_size=n),
    )
)


@settings(deadline=None, max_examples=100)
@given(scores_and_groups)
def test_means_equal_their_definition(data):
    scores, groups = data
    defined = [(s, g) for s, g in zip(scores, groups, strict=True) if not math.isnan(s)]

    def mean(values):
        return statistics.fmean(values) if values else NAN

    ours = group_means(torch.tensor(scores).double(), torch.tensor(groups), 3).tolist()
    assert ours == pytest.approx([mean([s for s, g in defined if g == k]) for k in range(3)], nan_ok=True)
    assert overall_mean(torch.tensor(scores).double()).item() == pytest.approx(
        mean([s for s, _ in defined]), nan_ok=True
    )


@settings(deadline=None, max_examples=50)
@given(scores_and_groups, st.sampled_from(["gap_sum", "std"]), st.floats(0, 5))
def test_equity_never_exceeds_the_overall_score(data, variant, alpha):
    scores, groups = (torch.tensor(x) for x in data)
    overall, per_group = overall_mean(scores), group_means(scores, groups, 3)
    scaled = equity_scaled(overall, per_group, variant, alpha)
    assert scaled.isnan() or scaled <= overall


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 1), st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_equal_groups_keep_the_overall_score(score, groups):
    scores, groups = torch.full((len(groups),), score, dtype=torch.float64), torch.tensor(groups)
    overall, per_group = overall_mean(scores), group_means(scores, groups, 3)
    assert equity_scaled(overall, per_group).item() == pytest.approx(score, rel=1e-9)
    assert max_gap(per_group).item() == pytest.approx(0, abs=1e-12)


def test_pixel_rates_equal_fairlearn(reference):
    expected = reference("fairdiff")["fm03_dpd_deodds"]["expected"]
    i = torch.arange(600)
    true, pred = ((7 * i) % 13 < 4).long()[:, None], ((i**2 + 3 * i) % 17 < 6).long()[:, None]
    q = i**2 % 7
    group = torch.where(q < 2, 0, torch.where(q < 4, 1, 2))
    unknown = torch.where(i % 12 == 0, -1, group)
    assert demographic_parity_difference(pred, group, 3).item() == pytest.approx(expected["dpd"], abs=1e-12)
    assert equalized_odds_difference(pred, true, group, 3).item() == pytest.approx(expected["deodds"], abs=1e-12)
    assert demographic_parity_difference(pred, unknown, 3, unknown_as_group=True).item() == pytest.approx(
        expected["dpd_with_unknown_as_group"], abs=1e-12
    )
    assert equalized_odds_difference(pred, true, unknown, 3, unknown_as_group=True).item() == pytest.approx(
        expected["deodds_with_unknown_as_group"], abs=1e-12
    )
    known = unknown >= 0
    assert demographic_parity_difference(pred, unknown, 3) == demographic_parity_difference(
        pred[known], group[known], 3
    )


def test_positive_classes_are_chosen():
    torch.manual_seed(0)
    pred, target = torch.randint(0, 4, (2, 5, 1, 6, 7))
    group = torch.tensor([0, 1, 1, -1, 0])
    chosen = equalized_odds_difference(pred, target, group, 3, positive=(1, 3))
    assert chosen == equalized_odds_difference(pred % 2, target % 2, group, 3)
    assert demographic_parity_difference(pred, group, 3, positive=(2,)) == demographic_parity_difference(
        pred == 2, group, 3
    )


def test_odds_skip_a_rate_that_a_group_lacks():
    target = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])  # group 0 has no positive pixel
    pred = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1], [0, 1, 1, 1]])
    true_positive, false_positive = 1.0 - 0.5, 0.5 - 0.0
    difference = equalized_odds_difference(pred, target, torch.tensor([0, 1, 2]), 3)
    assert difference == max(true_positive, false_positive)


def test_bad_groups_and_variants_are_named():
    scores = torch.rand(3)
    with pytest.raises(ValueError, match=r"group holds \[0, 4\], expected values in \[-1, 3\)"):
        group_means(scores, torch.tensor([0, 4, 0]), 3)
    with pytest.raises(ValueError, match=r"holds \[-2, 0, 1\]"):
        group_means(scores, torch.tensor([0, 1, -2]), 3)
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(3,\)"):
        group_means(scores, torch.tensor([0, 1]), 3)
    with pytest.raises(ValueError, match="variant is 'sum', expected 'gap_sum' or 'std'"):
        equity_scaled(scores.mean(), scores, variant="sum")
