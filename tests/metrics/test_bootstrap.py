from functools import partial

import pytest
import torch

from fairdiff_lightning.metrics import (
    bootstrap_interval,
    equity_scaled,
    group_means,
    overall_mean,
    worst_group,
)


def mean(scores, group):
    return overall_mean(scores)


def equity(scores, group):
    return equity_scaled(overall_mean(scores), group_means(scores, group, 3))


@pytest.fixture
def data():
    torch.manual_seed(0)
    group = torch.arange(300) % 5 - 1  # -1 .. 3, group 3 the better one
    return (0.7 + 0.05 * group + 0.1 * torch.randn(300)).clamp(0, 1).double(), group.clamp(max=2)


def test_mean_interval_is_the_normal_one(data):
    scores, _ = data
    low, high = bootstrap_interval(scores, None, mean, num_resamples=4000)
    margin = 1.96 * scores.std(correction=0) / len(scores) ** 0.5
    assert low.item() == pytest.approx((scores.mean() - margin).item(), abs=0.05 * margin.item() + 5e-4)
    assert high.item() == pytest.approx((scores.mean() + margin).item(), abs=0.05 * margin.item() + 5e-4)


def test_interval_covers_the_true_mean_as_often_as_it_says():
    torch.manual_seed(1)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(torch.rand(60), None, mean, num_resamples=200, confidence=0.8, seed=seed)
        hits += int(low < 0.5 < high)
    assert 0.70 < hits / 200 < 0.90


def test_resamples_keep_the_group_sizes(data):
    scores, group = data
    seen = []

    def statistic(resampled, same_group):
        assert same_group is group
        seen.append(resampled)
        return resampled.mean(0)

    origin = group.double()  # a score that tells the group it came from
    bootstrap_interval(origin, group, statistic, num_resamples=50)
    assert (torch.cat(seen, -1) == origin[:, None]).all()


def test_every_statistic_equals_the_one_by_one_computation(data):
    scores, group = data
    kept = []

    def recording(resampled, same_group):
        kept.append(resampled)
        return equity(resampled, same_group)

    low, high = bootstrap_interval(scores, group, recording, num_resamples=101, confidence=0.9)
    each = torch.stack([equity(column, group) for column in torch.cat(kept, -1).unbind(-1)])
    torch.testing.assert_close(torch.stack([low, high]), each.quantile(torch.tensor([0.05, 0.95]).double()))


def test_group_means_and_classes_keep_their_shapes(data):
    scores, group = data
    scores = torch.stack([scores, scores.square()], dim=1)
    low, high = bootstrap_interval(scores, group, partial(group_means, num_groups=3), num_resamples=300)
    means = group_means(scores, group, 3)
    assert low.shape == high.shape == (3, 2)
    assert (low < means).all()
    assert (means < high).all()
    worst_low, worst_high = bootstrap_interval(
        scores[:, 0], group, lambda s, g: worst_group(group_means(s, g, 3)), num_resamples=300
    )
    assert worst_low < means[:, 0].min() < worst_high


def test_the_seed_decides(data):
    scores, group = data
    first, again, other = (bootstrap_interval(scores, group, equity, 100, seed=s) for s in (3, 3, 4))
    assert first == again
    assert first != other


def test_chunks_are_all_used():
    scores = torch.rand(2**21 + 1)  # one resample at a time
    low, high = bootstrap_interval(scores, None, mean, num_resamples=3)
    assert low < high


def test_identical_scores_leave_no_interval():
    low, high = bootstrap_interval(torch.full((7,), 0.5), torch.tensor([0, 1, 2, -1, 0, 0, 1]), equity)
    assert low == high == pytest.approx(0.5)


def test_undefined_scores_are_left_out():
    scores = torch.tensor([0.5, 0.7, float("nan"), 0.6])
    low, high = bootstrap_interval(scores, torch.tensor([0, 0, 1, 1]), partial(group_means, num_groups=3))
    assert low[0] == pytest.approx(0.5)
    assert high[0] == pytest.approx(0.7)
    assert low[1] == high[1] == pytest.approx(0.6)
    assert low[2].isnan()
    assert high[2].isnan()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="scores is empty"):
        bootstrap_interval(torch.empty(0), None, mean)
    with pytest.raises(ValueError, match="confidence is 95"):
        bootstrap_interval(torch.rand(3), None, mean, confidence=95)
