"""How close generated images are to real ones, logged after each validation of a generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from fairdiff_lightning.callbacks.step_outputs import require_keys
from fairdiff_lightning.data.seeding import derive_seed
from fairdiff_lightning.metrics import (
    FeatureExtractor,
    frechet_distance,
    generation_scores,
    kernel_distance,
    nearest_real_distance,
    ssim_between,
)
from fairdiff_lightning.metrics.extractors import check_unit_range
from fairdiff_lightning.metrics.generation import distance_function

_OUTPUTS = {"generated": "a batch of samples for the first samples of the batch, or None"}
_GENERATED = {"image": "generated images (N, C, H, W) in [0, 1]"}
_BATCH = {"image": "real images (B, C, H, W) in [0, 1]", "id": "one name per image"}

Bank = dict[str, Tensor]
"""Features (D,) or an image (C, H, W) by the sample's id."""


class GenerationMetrics(Callback):
    """Logs how the samples that a generator makes while validating compare with the validation images.

    Works with any LightningModule whose ``validation_step`` returns a dict with ``generated``: None, or a dict with
    ``image`` (N, C, H, W) in [0, 1], made for the first N samples of the batch.

    ================================================  ================================================================
    logged                                            what
    ================================================  ================================================================
    ``val/fid/<extractor>``, ``val/kid/<extractor>``  Fréchet and kernel distance of features
    ``val/mmd/<extractor>``                           minimum matching distance
    ``val/coverage/<extractor>``                      fraction of the validation images that are some sample's nearest
    ``val/1nna/<extractor>``                          leave-one-out accuracy of the nearest neighbour, 0.5 is best
    ``val/nearest_real/<extractor>``                  distance to the nearest training image, mean over the samples;
                                                      memorisation when it falls towards 0
    ``val/nearest_real_min/<extractor>``              the smallest of them: the best copy
    ``val/ssim_between``                              similarity of random pairs of samples; high is little diversity
    ================================================  ================================================================

    Training images are those of the training batches seen so far, as augmented when first seen: nothing is read twice,
    and a validation without training logs no ``nearest_real``. Features of real images are kept by id, so each image
    passes the extractor once. Under DDP the samples of all processes are compared, repeated ids once.

    The extractor belongs to this callback: it is in no parameter list, checkpoint, average or optimizer of the module.

    Args:
        extractor: a :class:`~fairdiff_lightning.metrics.FeatureExtractor`, a name that it knows, or any module from
            images to (N, D). ``inception`` needs its file of weights on this machine.
        distance: between features, for all but FID and KID; ``cosine`` is FairDiff's.
        max_real: largest numbers of validation and of training images, over all processes.
        num_pairs: largest number of pairs whose similarity is averaged.
        multiscale: MS-SSIM instead of SSIM; for images of at least 176 pixels a side.
        seed: of the pairs and of KID's subsets.
        reference_behaviour: swap the roles in MMD and coverage, as FairDiff's code does.

    Raises:
        ValueError: while validating, when the step or the batch lacks a key, or images are not in [0, 1].
        FileNotFoundError: at the start, when the extractor's weights are not there.
    """

    def __init__(
        self,
        extractor: FeatureExtractor | nn.Module | str = "inception",
        distance: Literal["cosine", "euclidean"] = "cosine",
        max_real: int = 10_000,
        num_pairs: int = 50,
        multiscale: bool = False,
        seed: int = 0,
        reference_behaviour: bool = False,
    ) -> None:
        distance_function(distance)
        self.distance: Literal["cosine", "euclidean"] = distance
        self.max_real, self.num_pairs, self.multiscale = max_real, num_pairs, multiscale
        self.seed, self.reference_behaviour = seed, reference_behaviour
        self._source = extractor
        self._extractor: FeatureExtractor | None = None
        self._training: Bank = {}
        self._real: Bank = {}
        self._generated: Bank = {}
        self._pictures: Bank = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the extractor, and forget the images of an earlier run."""
        if self._extractor is None:
            source = self._source
            self._extractor = source if isinstance(source, FeatureExtractor) else FeatureExtractor(source)
        self._real = {}
        if stage == "fit":
            self._training = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the features of training images not seen before."""
        if len(self._training) < self._share(trainer):
            self._remember(self._training, batch, "the training batch", trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the samples of the last validation."""
        self._generated, self._pictures = {}, {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the features of the batch's real and generated images."""
        if trainer.sanity_checking:
            return
        where = f"{type(pl_module).__name__}.validation_step"
        if batch_idx == 0:
            require_keys(outputs, _OUTPUTS, where, self)
        self._remember(self._real, batch, "the validation batch", trainer)
        made = outputs.get("generated") if isinstance(outputs, Mapping) else None
        if made is None:
            return
        images = require_keys(made, _GENERATED, f"'generated' of {where}", self)["image"].detach().float()
        check_unit_range(images, f"{type(self).__name__}, generated by {where}")
        names = batch["id"][: len(images)]
        self._generated.update(zip(names, self._features(images), strict=True))
        self._pictures.update(zip(names, images.cpu(), strict=True))
        for name in self._in_drawn_order(self._pictures)[2 * self.num_pairs :]:
            del self._pictures[name]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare what all processes have kept, and log it."""
        if trainer.sanity_checking:
            return
        assert self._extractor is not None
        device = pl_module.device if pl_module.device.type == "cuda" else torch.device("cpu")
        generated, real, training = (
            _stacked(_gathered(trainer, bank), device) for bank in (self._generated, self._real, self._training)
        )
        if len(generated) == 0:
            rank_zero_warn(
                f"{type(self).__name__}: this validation generated no sample, so there is nothing to compare."
            )
            return
        scores = generation_scores(generated, real, self.distance, self.reference_behaviour)
        del scores["nearest_real"]  # here it is the distance to training images
        scores["fid"] = frechet_distance(generated, real)
        scores["kid"] = kernel_distance(generated, real, seed=self.seed)
        if len(training):
            nearest = nearest_real_distance(distance_function(self.distance)(generated, training))
            scores |= {"nearest_real": nearest.mean(), "nearest_real_min": nearest.min()}
        values = {f"val/{name}/{self._extractor.name}": value for name, value in scores.items()}
        pictures = _gathered(trainer, self._pictures)
        if len(pictures) > 1:
            drawn = self._in_drawn_order(pictures)[: 2 * self.num_pairs]
            images = torch.stack([pictures[name] for name in drawn]).to(device)
            values["val/ssim_between"] = ssim_between(images, self.num_pairs, self.seed, self.multiscale)
        pl_module.log_dict(values, sync_dist=True)

    def _share(self, trainer: Trainer) -> int:
        return -(-self.max_real // trainer.world_size)

    def _remember(self, bank: Bank, batch: Any, where: str, trainer: Trainer) -> None:
        """Add features of the batch's images that the bank has not, as far as there is room."""
        batch = require_keys(batch, _BATCH, where, self)
        fresh = [index for index, name in enumerate(batch["id"]) if name not in bank]
        fresh = fresh[: self._share(trainer) - len(bank)]
        if not fresh:
            return
        images = batch["image"][fresh]
        if not bank:  # once: the host waits for the answer
            check_unit_range(images, f"{type(self).__name__}, {where}")
        bank.update(zip([batch["id"][index] for index in fresh], self._features(images), strict=True))

    def _features(self, images: Tensor) -> Tensor:
        assert self._extractor is not None
        features: Tensor = self._extractor.to(images.device)(images)
        return features

    def _in_drawn_order(self, names: Sequence[str] | Bank) -> list[str]:
        """A permutation that does not depend on the order in which processes see the names."""
        return sorted(names, key=lambda name: derive_seed(self.seed, name))


def _gathered(trainer: Trainer, mine: Bank) -> Bank:
    """What all processes have kept, on the CPU and in the order of the ids."""
    part = (list(mine), torch.stack(list(mine.values())).cpu() if mine else torch.empty(0))
    parts: list[Any] = [part]
    if trainer.world_size > 1:
        parts = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, part)
    found = {name: row for names, rows in parts for name, row in zip(names, rows, strict=True)}
    return {name: found[name] for name in sorted(found)}


def _stacked(bank: Bank, device: torch.device) -> Tensor:
    return torch.stack(list(bank.values())).to(device) if bank else torch.empty(0, device=device)
