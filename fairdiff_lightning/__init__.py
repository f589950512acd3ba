"""Fair and data-efficient medical image segmentation with PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fairdiff_lightning.version import __version__

if TYPE_CHECKING:
    from fairdiff_lightning.data import FairSegDataModule, HAM10000DataModule
    from fairdiff_lightning.modules import DMoESegmenter, Segmenter

__all__ = ["DMoESegmenter", "FairSegDataModule", "HAM10000DataModule", "Segmenter", "__version__"]

_HOMES = {
    "DMoESegmenter": "modules",
    "FairSegDataModule": "data",
    "HAM10000DataModule": "data",
    "Segmenter": "modules",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
