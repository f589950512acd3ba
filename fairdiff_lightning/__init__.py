"""Fair and data-efficient medical image segmentation with PyTorch Lightning."""

from typing import TYPE_CHECKING

import lazy_loader

from fairdiff_lightning.version import __version__

if TYPE_CHECKING:
    from fairdiff_lightning.data import (
        BCSDBTDataModule,
        BUSIDataModule,
        DBTDataModule,
        DecathlonDataModule,
        DecathlonSliceDataModule,
        EmidecDataModule,
        FairSegDataModule,
        HAM10000DataModule,
        LIDCDataModule,
        ProstateDataModule,
        RadImageNetDataModule,
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
    "BUSIDataModule",
    "ControlNetSynth",
    "DBTDataModule",
    "DMoESegmenter",
    "DecathlonDataModule",
    "DecathlonSliceDataModule",
    "EmidecDataModule",
    "FairSegDataModule",
    "HAM10000DataModule",
    "LIDCDataModule",
    "LeFusionInpaint",
    "LesionMaskDiffusion",
    "PairedGuidedDiffusion",
    "PointDiffusion",
    "ProstateDataModule",
    "RadImageNetDataModule",
    "Segmenter",
    "__version__",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": [
            "BCSDBTDataModule",
            "BUSIDataModule",
            "DBTDataModule",
            "DecathlonDataModule",
            "DecathlonSliceDataModule",
            "EmidecDataModule",
            "FairSegDataModule",
            "HAM10000DataModule",
            "LIDCDataModule",
            "ProstateDataModule",
            "RadImageNetDataModule",
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
