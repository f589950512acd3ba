"""Lightning callbacks that report, picture and write what modules predict; names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairdiff_lightning.callbacks.epoch_seed import EpochSeed
    from fairdiff_lightning.callbacks.expert_usage import ExpertUsageHeatMap
    from fairdiff_lightning.callbacks.fairness_report import FairnessReport
    from fairdiff_lightning.callbacks.prediction_writer import PredictionWriter
    from fairdiff_lightning.callbacks.sample_grid import SampleGrid

__all__ = ["EpochSeed", "ExpertUsageHeatMap", "FairnessReport", "PredictionWriter", "SampleGrid"]

_MODULES = {
    "EpochSeed": "epoch_seed",
    "ExpertUsageHeatMap": "expert_usage",
    "FairnessReport": "fairness_report",
    "PredictionWriter": "prediction_writer",
    "SampleGrid": "sample_grid",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
