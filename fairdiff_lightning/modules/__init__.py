"""LightningModules, one file for each method."""

from fairdiff_lightning.modules.dmoe_segmenter import DMoESegmenter
from fairdiff_lightning.modules.schedules import PolynomialDecay, WarmupCosine
from fairdiff_lightning.modules.segmenter import Segmenter

__all__ = ["DMoESegmenter", "PolynomialDecay", "Segmenter", "WarmupCosine"]
