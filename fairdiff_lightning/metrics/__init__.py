"""Per-image scores, statistics of them over groups, and torchmetrics classes; names load on first use."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fairdiff_lightning.metrics.diversity import ssim_between
    from fairdiff_lightning.metrics.extractors import FeatureExtractor
    from fairdiff_lightning.metrics.fairness import (
        DemographicParityDifference,
        EqualizedOddsDifference,
        EquityScaled,
        GroupStd,
        MaxGap,
        WorstGroup,
    )
    from fairdiff_lightning.metrics.feature_distances import frechet_distance, kernel_distance
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
    from fairdiff_lightning.metrics.generation import (
        chamfer_distances,
        cosine_distances,
        coverage,
        euclidean_distances,
        generation_scores,
        minimum_matching_distance,
        nearest_real_distance,
        one_nearest_neighbour_accuracy,
    )
    from fairdiff_lightning.metrics.generation_metrics import GenerationScores
    from fairdiff_lightning.metrics.grouped import GroupedDice, GroupedIoU, GroupedScores
    from fairdiff_lightning.metrics.surface import GroupedHausdorff95, GroupedSurfaceDice, surface_scores
    from fairdiff_lightning.metrics.usage import ExpertUsage

__all__ = [
    "DemographicParityDifference",
    "EqualizedOddsDifference",
    "EquityScaled",
    "ExpertUsage",
    "FeatureExtractor",
    "GenerationScores",
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
    "chamfer_distances",
    "cosine_distances",
    "coverage",
    "demographic_parity_difference",
    "dice_score",
    "equalized_odds_difference",
    "equity_scaled",
    "euclidean_distances",
    "frechet_distance",
    "generation_scores",
    "group_means",
    "group_std",
    "iou_score",
    "kernel_distance",
    "max_gap",
    "minimum_matching_distance",
    "nearest_real_distance",
    "one_nearest_neighbour_accuracy",
    "overall_mean",
    "overlap_counts",
    "ssim_between",
    "surface_scores",
    "worst_group",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "diversity": ["ssim_between"],
        "extractors": ["FeatureExtractor"],
        "fairness": [
            "DemographicParityDifference",
            "EqualizedOddsDifference",
            "EquityScaled",
            "GroupStd",
            "MaxGap",
            "WorstGroup",
        ],
        "feature_distances": ["frechet_distance", "kernel_distance"],
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
        "generation": [
            "chamfer_distances",
            "cosine_distances",
            "coverage",
            "euclidean_distances",
            "generation_scores",
            "minimum_matching_distance",
            "nearest_real_distance",
            "one_nearest_neighbour_accuracy",
        ],
        "generation_metrics": ["GenerationScores"],
        "grouped": ["GroupedDice", "GroupedIoU", "GroupedScores"],
        "surface": ["GroupedHausdorff95", "GroupedSurfaceDice", "surface_scores"],
        "usage": ["ExpertUsage"],
    },
)
