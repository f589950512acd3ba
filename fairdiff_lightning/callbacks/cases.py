"""Per-image scores of a test run, and small pictures of its worst cases."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fairdiff_lightning.callbacks.slices import orthogonal
from fairdiff_lightning.data.resample import move

PICTURE_SIZE = 256
SURFACES = ("hd95", "assd", "nsd")
"""Scores of surfaces that a step may return."""
EVERYONE = "all"
"""Attribute, and its one group, of images that have no attribute."""


@dataclass(frozen=True)
class Case:
    """One image of the test set.

    Args:
        id: of the sample.
        groups: attribute -> group index, -1 when unknown.
        dice: score of each foreground class, NaN where not defined.
        iou: the same for intersection over union.
        surfaces: those of :data:`SURFACES` that were measured.
    """

    id: str
    groups: dict[str, int]
    dice: tuple[float, ...]
    iou: tuple[float, ...]
    surfaces: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def mean_dice(self) -> float:
        """Mean over the classes where it is defined, NaN without any."""
        defined = [score for score in self.dice if not math.isnan(score)]
        return sum(defined) / len(defined) if defined else math.nan


@dataclass(frozen=True)
class Picture:
    """What an overlay shows: image (C, h, w) float32, truth and prediction (1, h, w) uint8."""

    image: NDArray[np.float32]
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]


def read_cases(outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> list[Case]:
    """Turn a step's scores (B, C), ``dice``, ``iou`` and those of surfaces, and the batch's groups into cases.

    Without an attribute all are of one group, :data:`EVERYONE`.

    Raises:
        ValueError: a score is not (B, C).
    """
    ids = [str(sample_id) for sample_id in batch["id"]]
    surfaces = [name for name in SURFACES if name in outputs]
    scores = {}
    for metric in ("dice", "iou", *surfaces):
        found = outputs[metric]
        if found.dim() != 2 or len(found) != len(ids):
            raise ValueError(
                f"outputs['{metric}'] has shape {tuple(found.shape)}, expected ({len(ids)}, C): a score of each image "
                "of the batch for each foreground class, NaN where it is not defined."
            )
        scores[metric] = [tuple(row) for row in found.detach().double().cpu().tolist()]
    groups = {name: group.tolist() for name, group in batch["attributes"].items()} or {EVERYONE: [0] * len(ids)}
    return [
        Case(
            sample_id,
            {name: group[i] for name, group in groups.items()},
            scores["dice"][i],
            scores["iou"][i],
            {name: scores[name][i] for name in surfaces},
        )
        for i, sample_id in enumerate(ids)
    ]


def worst_cases(cases: Iterable[Case], num_worst: int) -> list[Case]:
    """The cases of lowest Dice: for each attribute ``num_worst`` of those whose group is known, worst first."""
    scored = [case for case in cases if not math.isnan(case.mean_dice)]
    worst: dict[str, Case] = {}
    for attribute in {name for case in scored for name in case.groups}:
        known = (case for case in scored if case.groups[attribute] >= 0)
        worst |= {case.id: case for case in heapq.nsmallest(num_worst, known, key=_badness)}
    return sorted(worst.values(), key=_badness)


def take_picture(outputs: Mapping[str, Any], batch: Mapping[str, Any], index: int) -> Picture:
    """Shrink image ``index`` of a batch with its truth and prediction to at most 256 pixels a side.

    The truth is the batch's ``native_mask`` where there is one; ``region`` says which part of it the image shows. Of a
    volume three orthogonal planes are shown side by side, at the size that the network saw.
    """
    image = batch["image"][index].detach().float()
    truth = batch.get("native_mask", batch["mask"])[index].detach()
    prediction = outputs["prediction"][index].detach()
    if image.dim() == 4:
        image, truth, prediction = _planes(image, prediction, batch, index)
    elif "native_mask" in batch and "region" in batch:
        top, left, height, width = batch["region"][index].tolist()
        if prediction.shape == truth.shape:
            prediction = prediction[..., top : top + height, left : left + width]
        truth = truth[..., top : top + height, left : left + width]
    height, width = truth.shape[-2:]
    scale = min(1.0, PICTURE_SIZE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    shown = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return Picture(shown.cpu().numpy(), _shrink_mask(truth, size), _shrink_mask(prediction, size))


def _planes(image: Tensor, prediction: Tensor, batch: Mapping[str, Any], index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three orthogonal planes of image, truth and prediction."""
    truth = batch["mask"][index].detach()
    if "native_affine" in batch:
        prediction = move(prediction, batch["native_affine"][index], batch["affine"][index], truth.shape[1:])
    spacing = batch["spacing"][index].tolist() if "spacing" in batch else None
    image, truth, prediction = orthogonal([image, truth, prediction], truth, spacing)
    return image, truth, prediction


def _shrink_mask(mask: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    small = F.interpolate(mask[None].float(), size, mode="nearest-exact")[0]
    return small.to(torch.uint8).cpu().numpy()


def _badness(case: Case) -> tuple[float, str]:
    return case.mean_dice, case.id
