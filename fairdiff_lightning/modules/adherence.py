"""Whether generated images show the masks that were asked for, judged by a frozen segmenter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from fairdiff_lightning.data.sample import UNKNOWN, Sample
from fairdiff_lightning.metrics.functional import dice_score
from fairdiff_lightning.modules.dmoe_segmenter import DMoESegmenter
from fairdiff_lightning.modules.segmenter import Segmenter


class MaskJudge:
    """A trained segmenter that finds masks in generated images, and the mean of what it found.

    It is no ``nn.Module`` on purpose: a generator that has one neither trains nor saves nor averages it.

    Args:
        path: checkpoint of a :class:`Segmenter` or :class:`DMoESegmenter`.
        num_classes: classes of the masks.
        in_channels: channels of the images.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it segments other classes or images of other channels.
    """

    def __init__(self, path: str, num_classes: int, in_channels: int) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"adherence: no checkpoint of a segmenter at '{path}'.")
        arguments = torch.load(path, map_location="cpu", weights_only=True).get("hyper_parameters", {})
        kind = DMoESegmenter if "routing" in arguments else Segmenter
        segmenter = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
        self.path = path
        self.segmenter: Segmenter = segmenter.eval().requires_grad_(False)
        for name, wanted in (("num_classes", num_classes), ("in_channels", in_channels)):
            found = self.segmenter.hparams[name]
            if found != wanted:
                raise ValueError(f"adherence='{path}': its {name} is {found}, the generator's is {wanted}.")
        # a sample without a class has no score for it: it counts in neither sum
        self._means = [MeanMetric(nan_strategy="ignore") for _ in range(num_classes)]

    def __call__(self, sample: Mapping[str, Any]) -> Tensor:
        """Dice (B, K - 1) of the requested masks and those found in the images; NaN where a class is in neither.

        Args:
            sample: generated ``image`` (B, C, H, W), requested ``mask`` (B, 1, H, W) and ``attributes``.

        Raises:
            ValueError: without a mask, or without the attribute whose groups the segmenter routes by.
        """
        if "mask" not in sample:
            raise ValueError(
                f"adherence='{self.path}' compares masks, but the samples have {sorted(sample)}: give data with masks "
                "(condition='edge' does not need them), or leave `adherence` out."
            )
        found = self._find(cast(Sample, {**sample, "attributes": self._attributes(sample)}))
        return dice_score(found, sample["mask"], self.segmenter.hparams["num_classes"])

    def update(self, sample: Mapping[str, Any]) -> None:
        """Judge samples and remember how well they follow their masks."""
        dice = self(sample)
        for mean, values in zip(self._means, (dice.nanmean(1), *dice.unbind(1)), strict=True):
            mean.to(dice.device).update(values)

    def compute(self) -> dict[str, Tensor]:
        """Mean over samples, of all devices: ``adherence`` over the classes of each, and ``adherence/class_<k>``.

        NaN only for a class that no sample has. The next samples begin anew.
        """
        names = ("adherence", *(f"adherence/class_{k}" for k in range(1, len(self._means))))
        values = {name: mean.compute() for name, mean in zip(names, self._means, strict=True)}
        for mean in self._means:
            mean.reset()
        return values

    @torch.no_grad()
    def _find(self, sample: Sample) -> Tensor:
        """Masks (B, 1, H, W) in the images, at the size of the requested ones."""
        segmenter, image = self.segmenter.to(sample["image"].device), sample["image"]
        h = segmenter.hparams
        size = h["image_size"] or (h["roi_size"] if h["inference"] == "whole" else None)
        if size is not None:  # windows slide over images of any size
            image = F.interpolate(image, size, mode="bilinear", antialias=True)
        logits = segmenter.infer(cast(Sample, {**sample, "image": image}), "predict")
        resized = F.interpolate(logits.float(), sample["mask"].shape[-2:], mode="bilinear")
        return resized.argmax(1, keepdim=True)

    def _attributes(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """The samples' groups; unknown for an attribute that only the segmenter has, unless it routes by it."""
        given: dict[str, Tensor] = sample["attributes"]
        wanted = self.segmenter.attribute
        if wanted is None or wanted in given:
            return given
        if self.segmenter.hparams.get("routing") == "group":
            raise ValueError(
                f"adherence='{self.path}' routes by the groups of '{wanted}', but the samples carry {sorted(given)}: "
                "name it in the data module's `attributes`, or judge by a plain Segmenter."
            )
        return {**given, wanted: torch.full((len(sample["image"]),), UNKNOWN, device=sample["image"].device)}
