"""Patches of a real image and of its synthetic partner in one training image (DiffBoost)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from fairdiff_lightning.data.classical_augmentation import stretch
from fairdiff_lightning.data.native import Record
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.data.seeding import generator as seeded

MergeLevel = Literal["input", "logits"]


class PatchMerge(nn.Module):
    """Keeps each patch of the real sample with probability ``alpha`` and takes the others from its synthetic partner.

    Zhang et al., *DiffBoost*, IEEE TMI 2025, Algorithm 1. A synthetic image follows the edges of its real one, so that
    both have the same mask. The patches are a regular grid over the image, as many along each axis as fit; they are
    stretched to cover an image whose size is no multiple of ``patch_size``.

    Args:
        alpha: probability that a patch is real; 1 trains on real samples alone, 0 on synthetic ones alone.
        patch_size: side of a patch, pixels, or one for each axis of the image.
        level: what is merged: ``input`` the images, which pass the network once (the paper); ``logits`` what the
            network makes of each of them in a pass of its own (the authors' code).
        num_synthetic: partners of a real sample that are drawn from; 0 trains on real samples alone.
        joint_range: smallest and largest value to which each pair is rescaled as one before the network, and each image
            alone in validation, test and prediction, so that all stages see one range; (-1, 1) is the authors' code.
            None leaves the images as they are.

    Raises:
        ValueError: for values outside these ranges.
    """

    def __init__(
        self,
        alpha: float = 0.6,
        patch_size: int | tuple[int, ...] = 64,
        level: MergeLevel = "input",
        num_synthetic: int = 50,
        joint_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha}: expected the probability of a real patch, in [0, 1].")
        if min(patch_size if isinstance(patch_size, Sequence) else [patch_size]) < 1:
            raise ValueError(f"patch_size={patch_size}: expected at least 1 pixel.")
        if level not in get_args(MergeLevel):
            raise ValueError(f"level={level!r}: expected one of {list(get_args(MergeLevel))}.")
        if num_synthetic < 0:
            raise ValueError(f"num_synthetic={num_synthetic}: expected how many partners to draw from, 0 or more.")
        if joint_range is not None and not joint_range[0] < joint_range[1]:
            raise ValueError(f"joint_range={joint_range}: expected the smallest value, then the largest.")
        self.alpha, self.patch_size, self.level = alpha, patch_size, level
        self.num_synthetic, self.joint_range = num_synthetic, joint_range

    def forward(self, real: Tensor, synthetic: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Merge images, or logits, (B, C, H, W[, D]); every sample has patches of its own, shared by its channels.

        Args:
            real: of the real samples.
            synthetic: of their partners, of the same shape.
            generator: CPU generator of the draws; the global one when None.

        Raises:
            ValueError: when the shapes differ, or a patch is larger than the image.
        """
        if real.shape != synthetic.shape:
            raise ValueError(
                f"real has shape {tuple(real.shape)}, synthetic {tuple(synthetic.shape)}: partners are of one size."
            )
        return torch.where(self.mask(real.shape, generator, real.device), real, synthetic)

    def mask(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw which pixels are real: bool (B, 1, H, W[, D]).

        Args:
            shape: of the images, (B, C, H, W[, D]).
            generator: CPU generator of the draws; the global one when None.
            device: of the mask.

        Raises:
            ValueError: when a patch is larger than the image, or has another number of axes.
        """
        size = tuple(shape[2:])
        patch = self.patch_size if isinstance(self.patch_size, Sequence) else [self.patch_size] * len(size)
        if len(patch) != len(size):
            raise ValueError(
                f"patch_size={self.patch_size} for images of size {size}: expected one side for each axis."
            )
        grid = [length // side for length, side in zip(size, patch, strict=True)]
        if 0 in grid:
            raise ValueError(
                f"patch_size={self.patch_size} is larger than the image, {' x '.join(map(str, size))}. "
                "Give a smaller one, or one side for each axis of a thin volume."
            )
        cells = torch.rand(shape[0], 1, *grid, generator=generator) < self.alpha
        return F.interpolate(cells.to(device, torch.uint8, non_blocking=True), size, mode="nearest").bool()

    def rescale(self, batch: Sample) -> Sample:
        """Give images (B, C, H, W[, D]) that are not merged the range of those that are, each by itself.

        A batch without images, or of a merge without ``joint_range``, is returned as it is.
        """
        if self.joint_range is None or "image" not in batch:
            return batch
        return cast(Sample, {**batch, "image": stretch(batch["image"], *self.joint_range)})


def joint_minmax(real: Tensor, synthetic: Tensor, low: float = -1.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rescale each pair of images (B, C, ...) linearly, so that the two together span [low, high].

    A synthetic image of a wider range compresses the real one. A pair of one constant value becomes ``low``.
    """
    scaled_real, scaled_synthetic = stretch(torch.stack([real, synthetic], 1), low, high).unbind(1)
    return scaled_real, scaled_synthetic


def merge_partners(batch: Sample, merge: PatchMerge, generator: torch.Generator | None = None) -> Sample:
    """Prepare a training batch whose ``partner`` (B, C, H, W[, D]) holds synthetic images of the same masks.

    Args:
        batch: with ``image`` and ``partner``; a real sample without a partner is its own.
        merge: how.
        generator: CPU generator of the draws; the global one when None.

    Returns:
        A copy of the batch. At the level ``input`` the image is merged and there is no ``partner``; at ``logits`` both
        images are there, for one pass each.

    Raises:
        ValueError: when the batch has no ``partner``, or one of another shape.
    """
    prepared = cast(dict[str, Any], dict(batch))
    if "partner" not in prepared:
        raise ValueError(f"the batch has no 'partner', only {sorted(prepared)}: no synthetic samples were given.")
    image, partner = prepared["image"], prepared.pop("partner")
    if merge.joint_range is not None:
        image, partner = joint_minmax(image, partner, *merge.joint_range)
    if merge.level == "input":
        prepared["image"] = merge(image, partner, generator)
    else:
        prepared |= {"image": image, "partner": partner}
    return cast(Sample, prepared)


class PartnerIndex:
    """Which synthetic samples each real training sample may be merged with, and which of them it is in an epoch.

    Args:
        real: records of the training split.
        synthetic: records that were generated from them; ``source`` names the real one.
        num_synthetic: partners of each that are drawn from, the first by id.
        seed: of the draws.

    Attributes:
        alone: ids of the real samples without a partner, which are trained on as they are; a warning counts them.

    Raises:
        ValueError: when a synthetic sample names no source, or one that is not in the training split.
    """

    def __init__(
        self,
        real: Sequence[Record],
        synthetic: Sequence[Record],
        num_synthetic: int = 50,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        self._partners: dict[str, list[Record]] = {record.id: [] for record in real}
        for record in sorted(synthetic, key=lambda record: (record.id, record.digest)):
            self._partners_of_source(record).append(record)
        self._partners = {name: found[:num_synthetic] for name, found in self._partners.items()}
        self.alone = [record.id for record in real if not self.partners(record)]
        if self.alone and num_synthetic > 0:
            rank_zero_warn(
                f"{len(self.alone)} of {len(real)} real training samples, '{self.alone[0]}' the first, have no "
                "synthetic partner: they are trained on as they are."
            )

    def partners(self, record: Record) -> Sequence[Record]:
        """The synthetic samples that a real one may be merged with."""
        return self._partners[record.id]

    def draw(self, record: Record, *turn: int) -> Record | None:
        """The partner of a real sample at a turn (its epoch and others), the same for one seed; None without any."""
        partners = self.partners(record)
        if not partners:
            return None
        draws = seeded(self.seed, "partner", *turn, record.id)
        return partners[int(torch.randint(len(partners), (1,), generator=draws))]

    def _partners_of_source(self, record: Record) -> list[Record]:
        found = None if record.source is None else self._partners.get(record.source)
        if found is None:
            source = "names no source" if not record.source else f"was made from '{record.source}'"
            raise ValueError(
                f"synthetic sample '{record.id}' {source}; expected one of the {len(self._partners)} cases of the "
                "training split, since it is trained on with that case's mask. Generate from this split's training "
                "cases, or remove it."
            )
        return found
