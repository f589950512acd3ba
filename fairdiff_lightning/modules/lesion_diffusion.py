"""What the diffusions of lesions and of lesion masks have in common: lesion classes, noise, and what they measure."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torchmetrics import MeanMetric

from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.diffusion import build_scheduler, build_training_scheduler, class_masks
from fairdiff_lightning.diffusion.cosine import cosine_arguments
from fairdiff_lightning.diffusion.inpaint import check_chain
from fairdiff_lightning.modules.generative import GenerativeModule
from fairdiff_lightning.networks.checkpoint import LoadReport, Source
from fairdiff_lightning.networks.class_networks import ClassNetworks
from fairdiff_lightning.networks.lesion_backbones import VolumeUNet
from fairdiff_lightning.networks.lesion_unet import LesionUNet
from fairdiff_lightning.networks.lesion_weights import Weights

ROUNDING = ("16-true", "bf16-true")
"""Precisions of the trainer that batches are turned into too."""


class LesionDiffusion(GenerativeModule, ABC):
    """Base of LeFusion's two diffusions. A subclass saves its hyperparameters, calls :meth:`adopt`, builds ``network``.

    Args:
        optimizer: built on the trainable parameters.
        lr_scheduler: built on the optimizer.
        lr_interval: when the scheduler steps.
        num_validation_samples: samples that each validation generates, over all devices.
    """

    reference: ClassVar[Mapping[str, Any]]
    """What the authors' code does: replaces the settings of the same name with ``reference_behaviour``."""
    measures: ClassVar[tuple[str, ...]]
    """Means over the samples that validation generates, logged as ``val/...``."""

    network: LesionUNet | VolumeUNet | ClassNetworks

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        lr_interval: Literal["step", "epoch"],
        num_validation_samples: int,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_interval, num_validation_samples)
        self.metrics = torch.nn.ModuleDict({name: MeanMetric() for name in self.measures})

    def adopt(self, lesions: Iterable[int], boundary: Iterable[int] = ()) -> None:
        """Take over the hyperparameters: the classes, the settings and the noise.

        Args:
            lesions: classes that are synthesised when ``lesion_classes`` is None.
            boundary: classes that lesions may lie in.

        Raises:
            ValueError: for classes that the mask does not have, or a chain that could not sample.
        """
        h: Any = self.hparams
        self.settings: dict[str, Any] = dict(h) | (dict(self.reference) if h.reference_behaviour else {})
        self.image_size = (h.image_size[0], h.image_size[1], h.image_size[2])
        self.classes = tuple(lesions if h.lesion_classes is None else h.lesion_classes)
        check_lesion_classes(self.classes, tuple(boundary), h.num_classes)
        self.noise, self.settings["eta"] = lesion_noise(self.settings)

    def setup(self, stage: str) -> None:
        """Refuse to generate in a precision that would round the scans and their places.

        Raises:
            ValueError: for ``16-true`` and ``bf16-true``, in which Lightning turns whole batches.
        """
        precision = getattr(self.trainer, "precision", None)
        if stage == "predict" and precision in ROUNDING:
            raise ValueError(
                f"precision {precision!r} rounds the scan and the affine of every request before anything is made. "
                "Generate with '32-true', or with 'bf16-mixed' (or '16-mixed'), which keeps them as they are."
            )

    def make_sampler(self) -> Any:
        """A new scheduler for sampling, along the noise of training."""
        return build_scheduler(self.settings["sampler"], self.settings["sampler_args"], like=self.noise)

    def num_requests(self, batch: Sample) -> int:
        """Samples up to the first one without a lesion."""
        lesions = class_masks(batch["mask"], self.classes).flatten(1).any(1)
        return int(lesions.cumprod(0).sum())

    def on_validation_epoch_end(self) -> None:
        """Log what was measured on the generated samples."""
        super().on_validation_epoch_end()
        for name, module in self.metrics.items():
            metric = cast(MeanMetric, module)
            if not self.trainer.sanity_checking and metric.update_called:
                self.log(f"val/{name}", metric.compute())
            metric.reset()

    def load_reference_weights(self, source: Source, weights: Weights = "raw") -> LoadReport:
        """Load the authors' checkpoint, strictly; they generate with the ``raw`` weights.

        Raises:
            CheckpointMismatchError: naming every missing, unexpected or misshapen tensor.
        """
        return self.network.load_reference_weights(source, weights)


def lesion_noise(settings: Mapping[str, Any]) -> tuple[Any, float]:
    """The scheduler of the training noise, and how much noise sampling adds on its way.

    Args:
        settings: of the module: ``scheduler``, ``sampler``, their arguments, ``num_steps``, ``eta`` and jumps.

    Raises:
        ValueError: for a sampler, a number of steps or jumps that could not sample, before any training.
    """
    with torch.device("cpu"):
        noise = build_training_scheduler(settings["scheduler"], cosine_arguments(settings["scheduler_args"]))
        sampler = build_scheduler(settings["sampler"], settings["sampler_args"], like=noise)
        ancestral = type(sampler).__name__ == "DDIMScheduler"
        eta = float(ancestral) if settings["eta"] is None else settings["eta"]
        jumps = {name: settings[name] for name in ("jump_length", "jump_n_sample") if name in settings}
        check_chain(sampler, settings["num_steps"], eta, **jumps)
    return noise, eta


def check_lesion_classes(lesions: Sequence[int], boundary: Sequence[int], num_classes: int) -> None:
    """Check the classes that are synthesised, and those that they may lie in.

    Raises:
        ValueError: for none, one that stands twice, or one that the mask does not have.
    """
    chosen = [*lesions, *boundary]
    if not lesions or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(1, num_classes)):
        raise ValueError(
            f"lesion_classes {tuple(lesions)} and boundary_classes {tuple(boundary)}; expected are different classes "
            f"from 1 to {num_classes - 1} (num_classes={num_classes}), and at least one lesion class."
        )
