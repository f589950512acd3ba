"""Per-image scores, statistics of them over groups, and torchmetrics classes; names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_HOME = {
    "DemographicParityDifference": "fairness",
    "EqualizedOddsDifference": "fairness",
    "EquityScaled": "fairness",
    "ExpertUsage": "usage",
    "GroupStd": "fairness",
    "GroupedDice": "grouped",
    "GroupedHausdorff95": "surface",
    "GroupedIoU": "grouped",
    "GroupedScores": "grouped",
    "GroupedSurfaceDice": "surface",
    "MaxGap": "fairness",
    "WorstGroup": "fairness",
    "bootstrap_interval": "functional",
    "cdr_error": "functional",
    "demographic_parity_difference": "functional",
    "dice_score": "functional",
    "equalized_odds_difference": "functional",
    "equity_scaled": "functional",
    "group_means": "functional",
    "group_std": "functional",
    "iou_score": "functional",
    "max_gap": "functional",
    "overall_mean": "functional",
    "overlap_counts": "functional",
    "surface_scores": "surface",
    "worst_group": "functional",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
