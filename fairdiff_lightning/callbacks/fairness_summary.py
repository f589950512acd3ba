"""Fairness of per-image scores over the groups of one attribute, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairdiff_lightning.metrics.functional import (
    bootstrap_interval,
    equity_scaled,
    group_means,
    group_std,
    max_gap,
    overall_mean,
    sum_by_group,
    worst_group,
)

METRICS = ("dice", "iou")
METRIC_NAMES = {"dice": "Dice", "iou": "IoU"}
STATISTICS = {
    "worst": "worst group",
    "gap": "max gap",
    "std": "group std",
    "es": "ES",
    "es_std": "ES-std",
}
"""Statistics over groups, key -> label; ES is equity-scaled by the sum of gaps, ES-std by the standard deviation."""
CLASS_MEAN = "mean"


@dataclass(frozen=True)
class Cell:
    """A number with its interval (NaN without one) and the number of images that it rests on."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class FairnessSummary:
    """Scores over the groups of an attribute: arrays (S, M, C + 1) over rows, metrics, and classes with their mean.

    Args:
        attribute: its name.
        groups: names of its groups.
        group_sizes: images of each group.
        unknown: images whose group is not known; they count in the overall scores only.
        classes: names of the foreground classes, and ``mean``.
        value: rows are overall, each group, each of :data:`STATISTICS`; metrics are :data:`METRICS`.
        low: lower ends of the intervals.
        high: upper ends.
        n: images with a defined score.
    """

    attribute: str
    groups: tuple[str, ...]
    group_sizes: tuple[int, ...]
    unknown: int
    classes: tuple[str, ...]
    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    n: NDArray[np.int64]

    @property
    def compares(self) -> bool:
        """Whether there are groups to compare; statistics over groups tell nothing of one."""
        return len(self.groups) > 1

    @property
    def images(self) -> int:
        """Number of images, those of unknown group included."""
        return sum(self.group_sizes) + self.unknown

    def cell(self, row: int, metric: str, column: int = -1) -> Cell:
        """One number; row 0 is overall, then the groups; column -1 is the class mean."""
        at = (row, METRICS.index(metric), column)
        return Cell(float(self.value[at]), float(self.low[at]), float(self.high[at]), int(self.n[at]))

    def statistic(self, name: str, metric: str, column: int = -1) -> Cell:
        """One of :data:`STATISTICS`."""
        return self.cell(1 + len(self.groups) + list(STATISTICS).index(name), metric, column)

    def worst_name(self, metric: str, column: int = -1) -> str:
        """Name of the worst group; empty when no group has a score, or for the mean when the classes disagree."""
        scores = self.value[1 : 1 + len(self.groups), METRICS.index(metric)]
        columns = range(len(self.classes) - 1) if column in (-1, len(self.classes) - 1) else [column]
        names = {self.groups[np.nanargmin(scores[:, c])] for c in columns if not np.isnan(scores[:, c]).all()}
        return names.pop() if len(names) == 1 else ""


def summarize(
    scores: Tensor,
    group: Tensor,
    attribute: str,
    groups: Sequence[str],
    classes: Sequence[str],
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> FairnessSummary:
    """Compute the scores of each group, the statistics over groups and their bootstrap intervals.

    Class means are means of the classes' statistics, as in the metric classes. An interval needs two images in what it
    describes: those of the group, and for statistics over groups those of every group that has any.

    Args:
        scores: (N, 2, C) Dice and IoU of each image and foreground class, NaN where not defined.
        group: (N,) int64 group indices, -1 unknown.
        attribute: its name.
        groups: names of the G groups.
        classes: names of the C foreground classes.
        num_resamples: of the bootstrap.
        confidence: coverage of the intervals.
        seed: of the bootstrap.
    """

    def statistic(sample: Tensor, group: Tensor) -> Tensor:
        return _table(sample, group, len(groups))

    value = statistic(scores[..., None], group)[..., 0]
    low, high = bootstrap_interval(scores, group, statistic, num_resamples, confidence, seed)
    counts, smallest = _counts(scores, group, len(groups))
    missing = value.isnan() | (smallest < 2)
    sizes = sum_by_group(torch.ones_like(group), group, len(groups)).tolist()
    return FairnessSummary(
        attribute,
        tuple(groups),
        tuple(sizes[:-1]),
        sizes[-1],
        (*classes, CLASS_MEAN),
        value.numpy(),
        low.masked_fill(missing, torch.nan).numpy(),
        high.masked_fill(missing, torch.nan).numpy(),
        counts.numpy(),
    )


def _table(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Rows of the summary (S, M, C + 1, R) from resampled scores (N, M, C, R)."""
    overall, per_group = overall_mean(scores), group_means(scores, group, num_groups)
    over_groups = [
        worst_group(per_group),
        max_gap(per_group),
        group_std(per_group),
        equity_scaled(overall, per_group, "gap_sum"),
        equity_scaled(overall, per_group, "std"),
    ]
    table = torch.cat([overall[None], per_group, torch.stack(over_groups)])
    return torch.cat([table, table.nanmean(-2, keepdim=True)], dim=-2)


def _counts(scores: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Images behind each number, and images of the smallest part that its interval resamples: both (S, M, C + 1)."""
    defined = ~scores.isnan()
    defined = torch.cat([defined, defined.any(-1, keepdim=True)], dim=-1).long()
    own = torch.cat([defined.sum(0)[None], sum_by_group(defined, group, num_groups)[:num_groups]])
    counts = torch.cat([own, own[:1].expand(len(STATISTICS), -1, -1)])
    smallest = own.masked_fill(own == 0, len(scores) + 2)
    smallest[..., -1] = smallest[..., :-1].amin(-1)
    smallest = torch.cat([smallest, smallest[1:].amin(0).expand(len(STATISTICS), -1, -1)])
    return counts, smallest
