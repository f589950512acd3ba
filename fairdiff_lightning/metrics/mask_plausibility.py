"""Whether generated masks are of the kind of the real ones: how large, how many, and where their parts lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric

NUM_BINS = 16
MAX_COUNT = 8


def mask_histograms(masks: Tensor) -> dict[str, Tensor]:
    """Histograms of what masks look like, all foreground classes together.

    Args:
        masks: (B, 1, H, W) class indices, 0 the background.

    Returns:
        ``area``: share of the frame, by the square root of it in 16 bins, the empty masks in one of their own, (17,);
        ``count``: connected parts (corners connect), none to 8 or more, (9,);
        ``location``: centroids of the masks that are not empty, in 4 x 4 fields of the frame, (16,). All float32.
    """
    foreground = masks[:, 0] > 0
    size = torch.tensor(foreground.shape[1:], device=masks.device)
    area = foreground.float().mean((1, 2))
    bin_of_area = torch.where(area > 0, 1 + (area.sqrt() * NUM_BINS).long().clamp(max=NUM_BINS - 1), 0)
    parts = [ndimage.label(image, np.ones((3, 3)))[1] for image in foreground.cpu().numpy()]
    counts = torch.tensor(parts, device=masks.device, dtype=torch.int64).clamp(max=MAX_COUNT)
    centroids = torch.stack([image.nonzero().float().mean(0) for image in foreground])  # NaN of an empty mask
    field = ((centroids + 0.5) / size * 4).nan_to_num().long().clamp(0, 3)
    return {
        "area": torch.bincount(bin_of_area, minlength=NUM_BINS + 1).float(),
        "count": torch.bincount(counts, minlength=MAX_COUNT + 1).float(),
        "location": torch.bincount((field[:, 0] * 4 + field[:, 1])[area > 0], minlength=16).float(),
    }


class MaskPlausibility(Metric):
    """Overlap of the histograms of generated and of real masks: 1 when their shares agree, 0 when no bin has both.

    It is the Dice of the normalised histograms: the sum over the bins of the smaller share. The histograms are those of
    :func:`mask_histograms`.

    Args:
        kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sizes = {"area": NUM_BINS + 1, "count": MAX_COUNT + 1, "location": 16}
        for name, bins in sizes.items():
            self.add_state(f"real_{name}", torch.zeros(bins), dist_reduce_fx="sum")
            self.add_state(f"generated_{name}", torch.zeros(bins), dist_reduce_fx="sum")

    def update(self, masks: Tensor, real: bool) -> None:
        """Add real or generated masks (B, 1, H, W)."""
        for name, histogram in mask_histograms(masks).items():
            state: Tensor = getattr(self, f"{'real' if real else 'generated'}_{name}")
            state += histogram

    def compute(self) -> dict[str, Tensor]:
        """Overlap of ``area``, ``count`` and ``location``; NaN without masks, or of the location without foreground."""
        return {name: self._overlap(name) for name in ("area", "count", "location")}

    def _overlap(self, name: str) -> Tensor:
        real, generated = getattr(self, f"real_{name}"), getattr(self, f"generated_{name}")
        overlap: Tensor = torch.minimum(real / real.sum(), generated / generated.sum()).sum()
        return overlap
