"""Per-image scores, statistics of them over groups, and torchmetrics classes; names load on first use."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fairdiff_lightning.metrics.fairness import (
        DemographicParityDifference,
        EqualizedOddsDifference,
        EquityScaled,
        GroupStd,
        MaxGap,
        WorstGroup,
    )
    from fairdiff_lightning.metrics.functional import (
        bootstrap_interval,
        cdr_error,
        demographic_parity_difference,
        dice_score,
        equalized_odds_difference,
        equity_scaled,
        group_means,
        group_std,
        iou_score,
        max_gap,
        overall_mean,
        overlap_counts,
        worst_group,
    )
    from fairdiff_lightning.metrics.grouped import GroupedDice, GroupedIoU, GroupedScores
    from fairdiff_lightning.metrics.surface import GroupedHausdorff95, GroupedSurfaceDice, surface_scores
    from fairdiff_lightning.metrics.usage import ExpertUsage

__all__ = [
    "DemographicParityDifference",
    "EqualizedOddsDifference",
    "EquityScaled",
    "ExpertUsage",
    "GroupStd",
    "GroupedDice",
    "GroupedHausdorff95",
    "GroupedIoU",
    "GroupedScores",
    "GroupedSurfaceDice",
    "MaxGap",
    "WorstGroup",
    "bootstrap_interval",
    "cdr_error",
    "demographic_parity_difference",
    "dice_score",
    "equalized_odds_difference",
    "equity_scaled",
    "group_means",
    "group_std",
    "iou_score",
    "max_gap",
    "overall_mean",
    "overlap_counts",
    "surface_scores",
    "worst_group",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "fairness": [
            "DemographicParityDifference",
            "EqualizedOddsDifference",
            "EquityScaled",
            "GroupStd",
            "MaxGap",
            "WorstGroup",
        ],
        "functional": [
            "bootstrap_interval",
            "cdr_error",
            "demographic_parity_difference",
            "dice_score",
            "equalized_odds_difference",
            "equity_scaled",
            "group_means",
            "group_std",
            "iou_score",
            "max_gap",
            "overall_mean",
            "overlap_counts",
            "worst_group",
        ],
        "grouped": ["GroupedDice", "GroupedIoU", "GroupedScores"],
        "surface": ["GroupedHausdorff95", "GroupedSurfaceDice", "surface_scores"],
        "usage": ["ExpertUsage"],
    },
)
