"""An order of samples that a seed and an epoch fix, and a loader that goes on in the middle of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fairdiff_lightning.data.seeding import generator

WINDOW = 16
"""Files that are read from at a time, when samples lie together in files."""
CHUNK = 8192
"""Indices that are Python objects at a time: 1.35 million of them would take 50 MB in each process."""


class ResumableSampler(DistributedSampler[int]):
    """A permutation of the samples in each epoch, dealt out to the replicas, that can begin in its middle.

    The order depends on the seed and the epoch alone; rank r takes places r, r + replicas, ... of it. Where the
    replicas do not divide the samples, the first of the order are seen twice, so that all replicas make as many steps.

    Args:
        length: number of samples.
        seed: of the permutations.
        num_replicas: number of devices.
        rank: index of this device.
        block: samples that lie together in a file; with more than one, files come in a random order and samples are
            mixed among so many files (:data:`WINDOW`) only, so that few are open at a time.

    Attributes:
        consumed: samples of this rank that the next pass leaves out; another epoch leaves out none.
    """

    def __init__(self, length: int, seed: int = 0, num_replicas: int = 1, rank: int = 0, block: int = 1) -> None:
        data = cast(Dataset[int], range(length))
        super().__init__(data, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.length, self.block, self.consumed = length, block, 0

    def __iter__(self) -> Iterator[int]:
        """Sample indices of this rank for the current epoch that are left."""
        order = self._order(generator(self.seed, "order", self.epoch))
        places = torch.arange(self.consumed, self.num_samples) * self.num_replicas + self.rank
        for chunk in torch.split(order[places % max(self.length, 1)], CHUNK):
            yield from chunk.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; another one than the current begins at its first sample."""
        if epoch != self.epoch:
            self.consumed = 0
        super().set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Epoch and place in it, and what makes the order; the same on every rank."""
        return {"epoch": self.epoch, "consumed": self.consumed, **self._facts()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where the state was taken.

        Raises:
            ValueError: when the samples, the seed or the number of replicas are others, which makes another order.
        """
        for name, value in self._facts().items():
            if state[name] != value:
                raise ValueError(
                    f"the checkpoint's order of samples has {name}={state[name]}, this run's has {value}: the epoch "
                    f"cannot go on in its middle. Resume with the same data, seed and number of devices, or start "
                    "anew from the checkpoint's weights."
                )
        self.epoch, self.consumed = state["epoch"], state["consumed"]

    def _order(self, random: torch.Generator) -> Tensor:
        """All samples (length,) in the order of an epoch."""
        order = torch.randperm(self.length, generator=random)
        if self.block == 1:
            return order
        place = torch.randperm(-(-self.length // self.block), generator=random)  # of each file in the order of files
        return order[torch.argsort(place[order // self.block] // WINDOW, stable=True)]

    def _facts(self) -> dict[str, int]:
        return {"length": self.length, "seed": self.seed, "num_replicas": self.num_replicas, "block": self.block}


class ResumableLoader(DataLoader[Any]):
    """A loader whose state is what it has handed out, not what its processes have prefetched.

    Lightning stores the state of a training loader that has ``state_dict`` in every checkpoint, and gives it back to a
    run that resumes. The sampler is a :class:`ResumableSampler`; a pass that is begun anew in the same epoch, without
    :meth:`load_state_dict`, starts at the first sample.
    """

    resumed: bool = False
    """Whether the next pass goes on where a state was taken."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # begun at the first batch, when the epoch is known
        """The batches that are left of the current epoch."""
        sampler = cast(ResumableSampler, self.sampler)
        if not self.resumed:
            sampler.consumed = 0
        self.resumed = False
        batches = super().__iter__()
        for batch in batches:
            sampler.consumed = min(sampler.consumed + cast(int, self.batch_size), sampler.num_samples)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Place in the epoch after the batches that were handed out, and what makes the order."""
        return {**cast(ResumableSampler, self.sampler).state_dict(), "batch_size": cast(int, self.batch_size)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after the batches that were handed out when the state was taken.

        Raises:
            ValueError: when data, seed, batch size or number of devices are others.
        """
        if state["batch_size"] != self.batch_size:
            raise ValueError(
                f"the checkpoint was taken in the middle of an epoch in batches of {state['batch_size']}, this run has "
                f"batch_size={self.batch_size}: Lightning counts batches. Resume with the same batch_size."
            )
        cast(ResumableSampler, self.sampler).load_state_dict(state)
        self.resumed = True
