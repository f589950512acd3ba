"""Metrics that keep per-image scores and their groups, and report them for each group."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fairdiff_lightning.metrics.functional import (
    EmptyPolicy,
    dice_score,
    group_means,
    iou_score,
    max_gap,
    overall_mean,
    predicted_classes,
    sum_by_group,
    worst_group,
)


class ScoreTable(Metric):
    """Per-image scores with the group of each image, gathered from all processes; a base for metrics of them.

    Args:
        num_groups: number of groups of the attribute.
        kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]
    groups: list[Tensor]

    def __init__(self, num_groups: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_groups = num_groups
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("groups", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, group: Tensor) -> None:
        """Add the scores (B,) or (B, C) of a batch, NaN where not defined, and its groups (B,), -1 for unknown.

        Raises:
            ValueError: ``group`` is not (B,).
        """
        if group.shape != scores.shape[:1]:
            raise ValueError(f"group has shape {tuple(group.shape)}, expected ({len(scores)},): one index per image.")
        self.scores.append(scores.detach().float().flatten())
        self.groups.append(group)

    def table(self) -> tuple[Tensor, Tensor]:
        """Return all scores (N, C) float32 and groups (N,) int64 so far, unordered; C is 1 while N is 0."""
        if len(self.groups) == 0:
            return self._no_scores().view(0, 1), self._no_groups()
        scores, groups = dim_zero_cat(self.scores), dim_zero_cat(self.groups)
        return scores.view(len(groups), len(scores) // max(len(groups), 1) or 1), groups

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states; a process without images takes part with empty tensors of the others' types."""
        if len(self.groups) == 0:
            self.scores.append(self._no_scores())
            self.groups.append(self._no_groups())
        super().sync(*args, **kwargs)

    def _no_scores(self) -> Tensor:
        return torch.empty(0, device=self.device)

    def _no_groups(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=self.device)


class GroupedScores(ScoreTable):
    """Per-image scores of the foreground classes, reported overall and for each group.

    ``compute`` returns a dict (C = num_classes - 1, G = num_groups, N images):

    ===============  ==========================================================================================
    ``overall``      (C,) mean over all images, unknown groups included
    ``group``        (G, C) mean over the images of each group, NaN for an absent one
    ``count``        (G,) int64, images of each group
    ``mean``         class mean of ``overall``
    ``worst_group``  class mean of the worst group's score
    ``max_gap``      class mean of the gap between the best and the worst group
    ``scores``       (N, C) the scores themselves, for intervals and worst cases
    ``groups``       (N,) int64, their groups
    ===============  ==========================================================================================

    Every image weighs the same; undefined scores (NaN) are skipped. Under DDP the order of images is not kept.

    Args:
        num_classes: number of classes, the background included.
        num_groups: number of groups of the attribute.
        kwargs: of ``torchmetrics.Metric``.
    """

    def __init__(self, num_classes: int, num_groups: int, **kwargs: Any) -> None:
        super().__init__(num_groups, **kwargs)
        self.num_classes = num_classes

    def update(self, scores: Tensor, group: Tensor) -> None:
        """Add the scores (B, num_classes - 1) of a batch and its groups (B,), -1 for unknown.

        Raises:
            ValueError: a shape is another one.
        """
        if scores.shape[1:] != (self.num_classes - 1,):
            raise ValueError(
                f"scores has shape {tuple(scores.shape)}, expected (B, {self.num_classes - 1}): one column for each "
                f"foreground class of num_classes={self.num_classes}."
            )
        super().update(scores, group)

    def compute(self) -> dict[str, Tensor]:
        """Return the table above."""
        scores, groups = self.table()
        scores = scores.expand(-1, self.num_classes - 1)
        overall, per_group = overall_mean(scores), group_means(scores, groups, self.num_groups)
        return {
            "overall": overall,
            "group": per_group,
            "count": sum_by_group(torch.ones_like(groups), groups, self.num_groups)[: self.num_groups],
            "mean": overall.nanmean(),
            "worst_group": worst_group(per_group, bool(self.higher_is_better)).nanmean(),
            "max_gap": max_gap(per_group).nanmean(),
            "scores": scores,
            "groups": groups,
        }

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Undo torchmetrics' squeezing of one-element results: with one class, ``overall`` stays (1,)."""
        wrapped = super()._wrap_compute(compute)
        columns = ("overall", "count", "groups")

        def compute_unsqueezed(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            result: dict[str, Tensor] = wrapped(*args, **kwargs)
            result |= {name: result[name].reshape(-1) for name in columns}
            return result | {name: result[name].reshape(-1, self.num_classes - 1) for name in ("group", "scores")}

        return compute_unsqueezed


class GroupedMaskScores(GroupedScores):
    """A per-image score of masks, reported for each group; subclasses say which score.

    Args:
        num_classes: number of classes, the background included.
        num_groups: number of groups of the attribute.
        kwargs: of ``torchmetrics.Metric``.
    """

    def update(self, pred: Tensor, target: Tensor, group: Tensor) -> None:  # type: ignore[override]
        """Score a batch.

        Args:
            pred: logits (B, K, ...), floating point, or class indices (B, 1, ...) or (B, ...).
            target: class indices (B, 1, ...) or (B, ...).
            group: (B,) group of each image, -1 for unknown.
        """
        super().update(self.score(predicted_classes(pred), target), group)

    @abstractmethod
    def score(self, pred: Tensor, target: Tensor) -> Tensor:
        """Score (B, num_classes - 1) of class indices (B, 1, ...) against the truth."""


class GroupedDice(GroupedMaskScores):
    """Dice score per image, class and group; see :class:`GroupedScores` for what ``compute`` returns.

    Args:
        num_classes: number of classes, the background included.
        num_groups: number of groups of the attribute.
        empty: what a class that the truth lacks scores, see :func:`~fairdiff_lightning.metrics.dice_score`.
        kwargs: of ``torchmetrics.Metric``.
    """

    def __init__(self, num_classes: int, num_groups: int, empty: EmptyPolicy = "skip", **kwargs: Any) -> None:
        super().__init__(num_classes, num_groups, **kwargs)
        self.empty: EmptyPolicy = empty

    def score(self, pred: Tensor, target: Tensor) -> Tensor:
        """Dice score of each image and foreground class."""
        return dice_score(pred, target, self.num_classes, self.empty)


class GroupedIoU(GroupedMaskScores):
    """Intersection over union per image, class and group; arguments and results as :class:`GroupedDice`."""

    def __init__(self, num_classes: int, num_groups: int, empty: EmptyPolicy = "skip", **kwargs: Any) -> None:
        super().__init__(num_classes, num_groups, **kwargs)
        self.empty: EmptyPolicy = empty

    def score(self, pred: Tensor, target: Tensor) -> Tensor:
        """Intersection over union of each image and foreground class."""
        return iou_score(pred, target, self.num_classes, self.empty)
