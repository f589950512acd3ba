"""LightningModules, one file for each method."""

from fairdiff_lightning.modules.controlnet_synth import ControlNetSynth
from fairdiff_lightning.modules.dmoe_segmenter import DMoESegmenter
from fairdiff_lightning.modules.generative import GenerativeModule
from fairdiff_lightning.modules.lefusion_inpaint import LeFusionInpaint
from fairdiff_lightning.modules.lesion_mask_diffusion import LesionMaskDiffusion
from fairdiff_lightning.modules.paired_guided_diffusion import PairedGuidedDiffusion
from fairdiff_lightning.modules.point_diffusion import PointDiffusion
from fairdiff_lightning.modules.schedules import LinearDecay, PolynomialDecay, WarmupCosine
from fairdiff_lightning.modules.segmenter import Segmenter

__all__ = [
    "ControlNetSynth",
    "DMoESegmenter",
    "GenerativeModule",
    "LeFusionInpaint",
    "LesionMaskDiffusion",
    "LinearDecay",
    "PairedGuidedDiffusion",
    "PointDiffusion",
    "PolynomialDecay",
    "Segmenter",
    "WarmupCosine",
]
