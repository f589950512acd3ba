"""Textures of lesions as histograms: those that training showed, and prototypes of them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from fairdiff_lightning.diffusion.lesion_histogram import jitter
from fairdiff_lightning.diffusion.noise import Generators, gaussian

_PROTOTYPE = re.compile(r"(cluster|exemplar):(\d+)")


class TextureBank(nn.Module):
    """Histograms of the training lesions and ``count`` prototypes of them, kept in the checkpoint.

    LeFusion (arXiv:2403.14066) shows three prototypes for the lung; each row of its published file is the histogram of
    one real lesion, here called an exemplar. The clustering itself is not published: this is k-means, ordered from dark
    to bright.

    Args:
        count: number of prototypes.
        classes: lesion classes, which a histogram has a row for.
        bins: of each row.

    Raises:
        ValueError: for fewer prototypes than one.

    Attributes:
        histograms: (N, classes * bins), of the lesions that were measured.
        groups: (N,) int64, the group of each of them, -1 when unknown.
        centroids: (count, classes * bins), means of the clusters, each class over the lesions that have it.
        exemplars: (count, classes * bins), the lesion nearest to each.
    """

    histograms: Tensor
    groups: Tensor
    centroids: Tensor
    exemplars: Tensor

    def __init__(self, count: int, classes: int, bins: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"textures {count}; expected is 1 prototype or more.")
        self.classes, self.bins = classes, bins
        self.register_buffer("histograms", torch.zeros(0, classes * bins))
        self.register_buffer("groups", torch.zeros(0, dtype=torch.int64))
        for name in ("centroids", "exemplars"):
            self.register_buffer(name, torch.zeros(count, classes * bins))

    def measure(self, histograms: Tensor, groups: Tensor | None = None) -> None:
        """Keep the histograms (N, classes * bins) of the training lesions, and their groups (N,), and find prototypes.

        Raises:
            ValueError: for fewer different histograms than prototypes, two of which would be one.
        """
        count, found = len(self.centroids), histograms.double().cpu().numpy()
        different = len(np.unique(found.round(6), axis=0))
        if different < count:
            fewer = f"Ask for at most {different} `textures`, or train" if different else "Train"
            raise ValueError(
                f"{len(found)} real training lesions with {different} different histograms make no {count} textures. "
                f"{fewer} on more lesions that no generator made."
            )
        centroids, _ = kmeans2(found, count, minit="++", seed=np.random.default_rng(0), iter=100, missing="warn")
        rows = centroids.reshape(count, self.classes, self.bins)
        brightness = rows.sum(1) @ np.arange(self.bins) / rows.sum((1, 2)).clip(min=1e-9)
        order = np.argsort(brightness)
        nearest = ((found[:, None] - centroids[order]) ** 2).sum(-1).argmin(0)
        shares = rows[order]
        shares = shares / np.where(shares.any(-1, keepdims=True), shares.sum(-1, keepdims=True), 1)
        device = self.histograms.device
        self.histograms = histograms.float().to(device)
        unknown = torch.full((len(histograms),), -1, dtype=torch.int64)
        self.groups = (unknown if groups is None else groups).to(device)
        self.centroids.copy_(torch.from_numpy(shares).flatten(1))
        self.exemplars.copy_(self.histograms[torch.from_numpy(nearest).to(device)])

    def check(self, texture: str) -> None:
        """Refuse a name that :meth:`draw` does not know.

        Raises:
            ValueError: with those that it knows.
        """
        chosen = _PROTOTYPE.fullmatch(texture)
        if texture not in ("empirical", "group", "random") and not chosen:
            raise ValueError(
                f"texture {texture!r}; expected is 'cluster:<k>', 'exemplar:<k>', 'random', 'empirical' or 'group'."
            )
        if chosen and int(chosen[2]) >= len(self.centroids):
            raise ValueError(
                f"texture {texture!r}: there are {len(self.centroids)}, counted from 0, from dark to bright."
            )

    def draw(
        self,
        texture: str,
        random: Generators,
        groups: Tensor | None = None,
        present: Tensor | None = None,
        amount: float = 0.1,
    ) -> Tensor:
        """A histogram (B, classes * bins) for each generator.

        Args:
            texture: ``cluster:<k>`` or ``exemplar:<k>``, a prototype; ``random``, any centroid; ``empirical``, any
                training lesion as it is; ``group``, any training lesion of the sample's group.
            random: one for each sample.
            groups: (B,) group of each sample, for ``group``; any lesion where it is -1.
            present: (B, classes) bool, the classes that are to be painted: one that the drawn lesion does not have gets
                the histogram of another training lesion.
            amount: largest relative change of a bin of a prototype, see
                :func:`~fairdiff_lightning.diffusion.lesion_histogram.jitter`.

        Raises:
            ValueError: for another name, a prototype, group or class that there is not, or before anything was
                measured.
        """
        self.check(texture)
        if not len(self.histograms):
            raise ValueError(f"texture={texture!r}: no training lesion was measured; train first, or give histograms.")
        if texture == "empirical":
            drawn = self.histograms[self._indices(len(self.histograms), random)]
        elif texture == "group":
            drawn = self._of_groups(groups, random)
        else:
            drawn = self._prototypes(texture, random, amount)
        return drawn if present is None else self._completed(drawn, present, random)

    def _prototypes(self, texture: str, random: Generators, amount: float) -> Tensor:
        chosen = _PROTOTYPE.fullmatch(texture)
        table = self.exemplars if chosen and chosen[1] == "exemplar" else self.centroids
        index = self._indices(len(table), random) if chosen is None else [int(chosen[2])] * len(random)
        rows = table[index].view(len(random), self.classes, self.bins)
        return jitter(rows, gaussian(rows, random), amount).flatten(1)

    def _completed(self, drawn: Tensor, present: Tensor, random: Generators) -> Tensor:
        """Give each class that is to be painted a histogram; an absent one was never trained."""
        rows, known = (table.view(len(table), self.classes, self.bins) for table in (drawn.clone(), self.histograms))
        lacking = present.to(rows.device) & (rows.sum(-1) == 0)
        for sample, lesion_class in lacking.nonzero().tolist():
            candidates = known[known[:, lesion_class].any(-1), lesion_class]
            if not len(candidates):
                raise ValueError(f"no training lesion has lesion class number {lesion_class}: its texture is unknown.")
            rows[sample, lesion_class] = candidates[self._indices(len(candidates), [random[sample]])[0]]
        return rows.flatten(1)

    def _of_groups(self, groups: Tensor | None, random: Generators) -> Tensor:
        asked = [-1] * len(random) if groups is None else groups.tolist()
        members = {g: ((self.groups == g) | (g == -1)).nonzero().flatten() for g in set(asked)}
        empty = sorted(g for g, found in members.items() if not len(found))
        if empty:
            raise ValueError(f"texture 'group': no training lesion is of group {empty}, so its texture is not known.")
        rows = [members[g][self._indices(len(members[g]), [one])] for g, one in zip(asked, random, strict=True)]
        return self.histograms[torch.cat(rows)]

    @staticmethod
    def _indices(count: int, random: Generators) -> list[int]:
        return [int(torch.randint(count, (1,), generator=generator)) for generator in random]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}histograms")
        if saved is not None and saved.shape[1:] == self.histograms.shape[1:]:  # as many as that run had
            self.histograms = self.histograms.new_zeros(saved.shape)
            self.groups = self.groups.new_zeros(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *rest)
