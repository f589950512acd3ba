"""Samplers that stay what they are under DDP: Lightning leaves any ``DistributedSampler`` alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch.utils.data import Dataset, DistributedSampler

from fairdiff_lightning.data.seeding import generator


class GroupBalancedSampler(DistributedSampler[int]):
    """Each epoch shows every group equally often, in rounds of one sample a group, on every device.

    Small groups are repeated, each repetition a fresh permutation. Samples of an unknown group (-1) are left out.
    The order depends on the seed and the epoch alone; rank r takes the rounds r, r + world size, ...

    Args:
        groups: group index of every sample.
        seed: of the permutations.
        num_replicas: number of devices.
        rank: index of this device.

    Raises:
        ValueError: when no sample has a known group.
    """

    def __init__(self, groups: Sequence[int], seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(cast(Dataset[int], groups), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        index = torch.as_tensor(groups)
        self.members = [torch.nonzero(index == g).flatten() for g in torch.unique(index[index >= 0]).tolist()]
        if not self.members:
            raise ValueError("no sample has a known group, so groups cannot be balanced; choose sampler='shuffle'.")
        rounds = max(len(m) for m in self.members)
        self.rounds = -(-rounds // num_replicas) * num_replicas
        self.num_samples = self.rounds // num_replicas * len(self.members)
        self.total_size = self.num_samples * num_replicas

    def __iter__(self) -> Iterator[int]:
        """Sample indices of this rank for the current epoch."""
        return (index for index, _ in self.visits())

    def visits(self) -> Iterator[tuple[int, int]]:
        """The same indices, each with how often the epoch has shown that sample before, on any device."""
        random = generator(self.seed, self.epoch)
        columns = [_repeated_permutations(m, self.rounds, random) for m in self.members]
        order = torch.stack(columns, 1)
        before = torch.stack([torch.arange(self.rounds) // len(m) for m in self.members], 1)
        within_round = torch.argsort(torch.rand(order.shape, generator=random), 1)
        mine = slice(self.rank, None, self.num_replicas)
        indices, counts = (of.gather(1, within_round)[mine].flatten().tolist() for of in (order, before))
        return zip(indices, counts, strict=True)


class SequentialShards(DistributedSampler[int]):
    """Every sample exactly once over all devices, in order: nothing is repeated to even out the ranks.

    For testing and predicting, where a repeated sample would be counted twice.

    Args:
        data: the data set.
        num_replicas: number of devices.
        rank: index of this device.
    """

    def __init__(self, data: Sized, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(cast(Dataset[int], data), num_replicas=num_replicas, rank=rank, shuffle=False)
        self.indices = range(rank, len(data), num_replicas)
        self.num_samples = len(self.indices)

    def __iter__(self) -> Iterator[int]:
        """Sample indices of this rank."""
        return iter(self.indices)


def _repeated_permutations(members: torch.Tensor, count: int, random: torch.Generator) -> torch.Tensor:
    repeats = -(-count // len(members))
    return torch.cat([members[torch.randperm(len(members), generator=random)] for _ in range(repeats)])[:count]


class EpochSampler(DistributedSampler[Any]):
    """Yields (index, epoch, visit) of another sampler's indices: loader processes draw blocks and partners from these.

    Args:
        sampler: the other one.
    """

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        super().__init__(sampler.dataset, sampler.num_replicas, sampler.rank, shuffle=False)
        self.sampler = sampler

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """The indices of this rank, with the current epoch and how often it has shown the sample before."""
        sampler = self.sampler
        visits = sampler.visits() if isinstance(sampler, GroupBalancedSampler) else ((index, 0) for index in sampler)
        return ((index, sampler.epoch, visit) for index, visit in visits)

    def __len__(self) -> int:
        return len(cast(Sized, self.sampler))

    def set_epoch(self, epoch: int) -> None:
        """Settle the order, and the draws, of an epoch."""
        self.sampler.set_epoch(epoch)
