"""Lightning callbacks that report, picture and write what modules predict; names load on first use."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fairdiff_lightning.callbacks.epoch_seed import EpochSeed
    from fairdiff_lightning.callbacks.expert_usage import ExpertUsageHeatMap
    from fairdiff_lightning.callbacks.fairness_report import FairnessReport
    from fairdiff_lightning.callbacks.generated_grid import GeneratedGrid
    from fairdiff_lightning.callbacks.generation_metrics import GenerationMetrics
    from fairdiff_lightning.callbacks.prediction_writer import PredictionWriter
    from fairdiff_lightning.callbacks.sample_grid import SampleGrid
    from fairdiff_lightning.callbacks.synthetic_dataset_writer import SyntheticDatasetWriter
    from fairdiff_lightning.callbacks.trainable_ema import TrainableEMA, warn_about_lost_ema

__all__ = [
    "EpochSeed",
    "ExpertUsageHeatMap",
    "FairnessReport",
    "GeneratedGrid",
    "GenerationMetrics",
    "PredictionWriter",
    "SampleGrid",
    "SyntheticDatasetWriter",
    "TrainableEMA",
    "warn_about_lost_ema",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "epoch_seed": ["EpochSeed"],
        "expert_usage": ["ExpertUsageHeatMap"],
        "fairness_report": ["FairnessReport"],
        "generated_grid": ["GeneratedGrid"],
        "generation_metrics": ["GenerationMetrics"],
        "prediction_writer": ["PredictionWriter"],
        "sample_grid": ["SampleGrid"],
        "synthetic_dataset_writer": ["SyntheticDatasetWriter"],
        "trainable_ema": ["TrainableEMA", "warn_about_lost_ema"],
    },
)
