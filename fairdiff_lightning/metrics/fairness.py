"""One number for how fair a model is: statistics over groups of per-image scores or of pixels."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fairdiff_lightning.metrics.functional import (
    EquityVariant,
    confusion_counts,
    equity_scaled,
    group_means,
    group_std,
    max_gap,
    odds_gap,
    overall_mean,
    predicted_classes,
    prediction_counts,
    rate_gap,
    worst_group,
)
from fairdiff_lightning.metrics.grouped import ScoreTable


class GroupStatistic(ScoreTable):
    """A statistic of the overall score and of each group's, averaged over classes; subclasses say which.

    ``update(scores, group)`` takes per-image scores (B,) or (B, C), NaN where not defined, and groups (B,) with -1 for
    unknown, which counts in the overall score only. ``compute`` returns a scalar.

    Args:
        num_groups: number of groups of the attribute.
        kwargs: of ``torchmetrics.Metric``.
    """

    def compute(self) -> Tensor:
        """Return the class mean of the statistic."""
        scores, groups = self.table()
        return self.statistic(overall_mean(scores), group_means(scores, groups, self.num_groups)).nanmean()

    @abstractmethod
    def statistic(self, overall: Tensor, per_group: Tensor) -> Tensor:
        """Statistic (C,) of the overall score (C,) and each group's (G, C)."""


class EquityScaled(GroupStatistic):
    """Equity-scaled score of FairSeg (ICLR 2024), see :func:`~fairdiff_lightning.metrics.equity_scaled`.

    Args:
        num_groups: number of groups of the attribute.
        variant: ``gap_sum``, the definition of FairSeg and dMoE, or ``std``.
        alpha: weight of the disparity.
        kwargs: of ``torchmetrics.Metric``.
    """

    def __init__(self, num_groups: int, variant: EquityVariant = "gap_sum", alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(num_groups, **kwargs)
        self.variant: EquityVariant = variant
        self.alpha = alpha

    def statistic(self, overall: Tensor, per_group: Tensor) -> Tensor:
        """Equity-scaled score of each class."""
        return equity_scaled(overall, per_group, self.variant, self.alpha)


class WorstGroup(GroupStatistic):
    """Score of the worst group present, of scores where higher is better; arguments as :class:`GroupStatistic`."""

    def statistic(self, overall: Tensor, per_group: Tensor) -> Tensor:
        """Worst group's score for each class."""
        return worst_group(per_group)


class MaxGap(GroupStatistic):
    """Gap between the best and the worst group present; arguments as :class:`GroupStatistic`."""

    higher_is_better = False

    def statistic(self, overall: Tensor, per_group: Tensor) -> Tensor:
        """Gap of each class."""
        return max_gap(per_group)


class GroupStd(GroupStatistic):
    """Sample standard deviation (n - 1) of the groups' scores; arguments as :class:`GroupStatistic`."""

    higher_is_better = False

    def statistic(self, overall: Tensor, per_group: Tensor) -> Tensor:
        """Standard deviation of each class."""
        return group_std(per_group)


class PixelRates(Metric):
    """A gap between groups in rates of pixels, from exact int64 counts; subclasses say which.

    Args:
        num_groups: number of groups of the attribute.
        positive: classes that count as positive; any but 0 by default.
        unknown_as_group: treat the samples of unknown group as one more group, instead of leaving them out.
        kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    counts: Tensor
    cells: tuple[int, ...]
    """Shape of one group's counts."""

    def __init__(
        self,
        num_groups: int,
        positive: Sequence[int] | None = None,
        unknown_as_group: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_groups = num_groups
        self.positive = positive
        self.unknown_as_group = unknown_as_group
        self.add_state("counts", torch.zeros(num_groups + 1, *self.cells, dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the gap, in [0, 1]; NaN before any image."""
        return self.gap(self.counts if self.unknown_as_group else self.counts[: self.num_groups])

    @abstractmethod
    def gap(self, counts: Tensor) -> Tensor:
        """Gap between the groups of counts (G, *cells)."""


class DemographicParityDifference(PixelRates):
    """Largest difference between groups in the share of pixels predicted positive; arguments as :class:`PixelRates`."""

    cells = (2,)

    def update(self, pred: Tensor, group: Tensor) -> None:
        """Count a batch: logits (B, K, ...) or class indices (B, ...), groups (B,) with -1 for unknown."""
        self.counts += prediction_counts(predicted_classes(pred), group, self.num_groups, self.positive)

    def gap(self, counts: Tensor) -> Tensor:
        """Gap in the share of positive predictions."""
        return rate_gap(counts)


class EqualizedOddsDifference(PixelRates):
    """Larger of the differences in true- and in false-positive rate of pixels; arguments as :class:`PixelRates`."""

    cells = (2, 2)

    def update(self, pred: Tensor, target: Tensor, group: Tensor) -> None:
        """Count a batch: logits (B, K, ...) or class indices (B, 1, ...), truth (B, 1, ...), groups (B,)."""
        self.counts += confusion_counts(predicted_classes(pred), target, group, self.num_groups, self.positive)

    def gap(self, counts: Tensor) -> Tensor:
        """Larger of the gaps in the two rates."""
        return odds_gap(counts)
