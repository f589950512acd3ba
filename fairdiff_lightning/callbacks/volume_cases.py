"""Volumes of a test that sees their slices: masks are kept packed, and scored when all are there."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fairdiff_lightning.data.sample import collate
from fairdiff_lightning.data.slice_stack import volume_scores
from fairdiff_lightning.metrics.functional import EmptyPolicy


class PackedMasks(Mapping[str, NDArray[np.uint8]]):
    """Masks (H, W) of class indices by id, compressed: a slice of 512 x 512 pixels takes about a kilobyte.

    Args:
        packed: id -> height, width and content, as ``packed`` of another one has it.
    """

    def __init__(self, packed: Mapping[str, tuple[int, int, bytes]] | None = None) -> None:
        self.packed = dict(packed or {})

    def add(self, name: str, mask: torch.Tensor) -> None:
        """Keep a mask (1, H, W) or (H, W)."""
        array = np.ascontiguousarray(mask.detach().cpu().numpy().astype(np.uint8)).reshape(mask.shape[-2:])
        self.packed[name] = (array.shape[0], array.shape[1], zlib.compress(array.tobytes(), 1))

    def __getitem__(self, name: str) -> NDArray[np.uint8]:
        height, width, content = self.packed[name]
        return np.frombuffer(zlib.decompress(content), np.uint8).reshape(height, width)

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)


def score_volumes(
    datamodule: Any, masks: Mapping[str, NDArray[np.uint8]], num_classes: int, empty: EmptyPolicy, surfaces: bool
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What a test step would have returned for each volume, and the batch that it would have seen.

    Args:
        datamodule: whose ``join`` puts slices together.
        masks: id of a slice -> its prediction.
        num_classes: number of classes, the background included.
        empty: what a class that the truth lacks scores.
        surfaces: whether distances are measured too, mm.
    """
    for sample, prediction in datamodule.join(masks):
        batch: Any = collate([sample])
        spacing = batch["spacing"][0].tolist() if surfaces else None
        scores = volume_scores(prediction[None], batch["mask"], num_classes, spacing, empty)
        yield {"prediction": prediction[None], **scores}, batch
