"""Fair and data-efficient medical image segmentation with PyTorch Lightning."""

from typing import TYPE_CHECKING

import lazy_loader

from fairdiff_lightning.version import __version__

if TYPE_CHECKING:
    from fairdiff_lightning.data import FairSegDataModule, HAM10000DataModule
    from fairdiff_lightning.modules import ControlNetSynth, DMoESegmenter, PointDiffusion, Segmenter

__all__ = [
    "ControlNetSynth",
    "DMoESegmenter",
    "FairSegDataModule",
    "HAM10000DataModule",
    "PointDiffusion",
    "Segmenter",
    "__version__",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["FairSegDataModule", "HAM10000DataModule"],
        "modules": ["ControlNetSynth", "DMoESegmenter", "PointDiffusion", "Segmenter"],
    },
)
