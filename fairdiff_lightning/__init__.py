"""Fair and data-efficient medical image segmentation with PyTorch Lightning."""

from typing import TYPE_CHECKING

import lazy_loader

from fairdiff_lightning.version import __version__

if TYPE_CHECKING:
    from fairdiff_lightning.data import BCSDBTDataModule, DBTDataModule, FairSegDataModule, HAM10000DataModule
    from fairdiff_lightning.modules import (
        ControlNetSynth,
        DMoESegmenter,
        LeFusionInpaint,
        PairedGuidedDiffusion,
        PointDiffusion,
        Segmenter,
    )

__all__ = [
    "BCSDBTDataModule",
    "ControlNetSynth",
    "DBTDataModule",
    "DMoESegmenter",
    "FairSegDataModule",
    "HAM10000DataModule",
    "LeFusionInpaint",
    "PairedGuidedDiffusion",
    "PointDiffusion",
    "Segmenter",
    "__version__",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["BCSDBTDataModule", "DBTDataModule", "FairSegDataModule", "HAM10000DataModule"],
        "modules": [
            "ControlNetSynth",
            "DMoESegmenter",
            "LeFusionInpaint",
            "PairedGuidedDiffusion",
            "PointDiffusion",
            "Segmenter",
        ],
    },
)
