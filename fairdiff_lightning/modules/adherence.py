"""Whether generated images show the masks that were asked for, judged by a frozen segmenter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.metrics.functional import dice_score
from fairdiff_lightning.modules.dmoe_segmenter import DMoESegmenter
from fairdiff_lightning.modules.segmenter import Segmenter


class MaskJudge:
    """A trained segmenter that finds masks in generated images.

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
        self.segmenter: Segmenter = segmenter.eval().requires_grad_(False)
        for name, wanted in (("num_classes", num_classes), ("in_channels", in_channels)):
            found = self.segmenter.hparams[name]
            if found != wanted:
                raise ValueError(f"adherence='{path}': its {name} is {found}, the generator's is {wanted}.")

    @torch.no_grad()
    def __call__(self, sample: dict[str, Any]) -> Tensor:
        """Dice (B, K - 1) of the requested masks and those found in the images; NaN where a class is in neither.

        Args:
            sample: generated ``image`` (B, C, H, W), requested ``mask`` (B, 1, H, W) and ``attributes``.
        """
        segmenter = self.segmenter.to(sample["image"].device)
        size = segmenter.hparams["image_size"] or segmenter.hparams["roi_size"]
        image = F.interpolate(sample["image"], size, mode="bilinear", antialias=True)
        logits = segmenter.infer(cast(Sample, {**sample, "image": image}), "predict")
        found = F.interpolate(logits.float(), sample["mask"].shape[-2:], mode="bilinear").argmax(1, keepdim=True)
        return dice_score(found, sample["mask"], segmenter.hparams["num_classes"])
