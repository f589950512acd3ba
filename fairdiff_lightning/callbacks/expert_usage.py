"""Pictures of which experts of a mixture serve which group."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from fairdiff_lightning.callbacks.figures import heat_map, log_figure

PATIENCE = 5
"""Validations after which an expert that nobody has used is reported: routers need a few epochs to spread out."""


class ExpertUsageHeatMap(Callback):
    """Logs the experts' shares of each group as ``val/expert_usage``, and warns once when experts stay unused.

    Reads ``pl_module.expert_usage``, a torchmetrics Metric that computes shares (G + 1, E), the unknown group last, as
    :class:`~fairdiff_lightning.metrics.ExpertUsage` does; a module without one is left alone. Groups are named by the
    data module's ``attribute_groups[pl_module.attribute]``, where both are there.

    Lightning calls ``on_validation_epoch_end`` of the callbacks before the module's own
    (``_EvaluationLoop._on_evaluation_epoch_end``), so the module may reset the metric in that hook or in
    ``on_validation_epoch_start``. This callback does not reset it.
    """

    def __init__(self) -> None:
        self._unused: deque[set[int]] = deque(maxlen=PATIENCE)
        self._warned = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the heat map; every process takes part in the metric's synchronisation."""
        metric: Any = getattr(pl_module, "expert_usage", None)
        if metric is None or trainer.sanity_checking:
            return
        shares: Tensor = metric.compute().detach().float().cpu()
        if not trainer.is_global_zero or bool(shares.isnan().all()):
            return
        self._unused.append(set(unused_experts(shares)))
        unused = set.intersection(*self._unused)
        if unused and len(self._unused) == PATIENCE and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"Experts {sorted(unused)} of {shares.shape[1]} have received less than a tenth of an even share from "
                f"every group in {PATIENCE} validations: the router has collapsed. A load-balance loss of positive "
                "weight, or fewer experts, may help."
            )
        names = _row_names(trainer, pl_module, len(shares) - 1)
        experts = [f"expert {index}" for index in range(shares.shape[1])]
        log_figure(
            trainer, "val/expert_usage", heat_map(shares, names, experts, "Expert usage by group"), trainer.global_step
        )


def unused_experts(shares: Tensor) -> list[int]:
    """Experts with less than 1 / (10 E) of the mass of every known group that has any.

    Args:
        shares: (G + 1, E), the unknown group last; rows of NaN or zeros are groups without images.
    """
    known = shares[:-1][shares[:-1].nansum(1) > 0]
    if not len(known):
        return []
    rare = (known < known.sum(1, keepdim=True) / (10 * shares.shape[1])).all(0)
    return torch.where(rare)[0].tolist()


def _row_names(trainer: Trainer, pl_module: LightningModule, num_groups: int) -> list[str]:
    named = getattr(getattr(trainer, "datamodule", None), "attribute_groups", {})
    names = list(named.get(getattr(pl_module, "attribute", None), ()))
    if len(names) != num_groups:
        names = [f"group {index}" for index in range(num_groups)] if num_groups > 1 else ["all groups"]
    return [*names, "unknown"]
