"""Fair and data-efficient medical image segmentation with PyTorch Lightning."""

from typing import TYPE_CHECKING

import lazy_loader

from fairdiff_lightning.version import __version__

if TYPE_CHECKING:
    from fairdiff_lightning.data import (
        BCSDBTDataModule,
        DBTDataModule,
        DecathlonDataModule,
        EmidecDataModule,
        FairSegDataModule,
        HAM10000DataModule,
        LIDCDataModule,
        ProstateDataModule,
    )
    from fairdiff_lightning.modules import (
        ControlNetSynth,
        DMoESegmenter,
        LeFusionInpaint,
        LesionMaskDiffusion,
        PairedGuidedDiffusion,
        PointDiffusion,
        Segmenter,
    )

__all__ = [
    "BCSDBTDataModule",
    "ControlNetSynth",
    "DBTDataModule",
    "DMoESegmenter",
    "DecathlonDataModule",
    "EmidecDataModule",
    "FairSegDataModule",
    "HAM10000DataModule",
    "LIDCDataModule",
    "LeFusionInpaint",
    "LesionMaskDiffusion",
    "PairedGuidedDiffusion",
    "PointDiffusion",
    "ProstateDataModule",
    "Segmenter",
    "__version__",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": [
            "BCSDBTDataModule",
            "DBTDataModule",
            "DecathlonDataModule",
            "EmidecDataModule",
            "FairSegDataModule",
            "HAM10000DataModule",
            "LIDCDataModule",
            "ProstateDataModule",
        ],
        "modules": [
            "ControlNetSynth",
            "DMoESegmenter",
            "LeFusionInpaint",
            "LesionMaskDiffusion",
            "PairedGuidedDiffusion",
            "PointDiffusion",
            "Segmenter",
        ],
    },
)
