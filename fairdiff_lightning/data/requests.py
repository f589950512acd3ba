"""What to generate, as data: a plan becomes requests, and a predict loader yields them in fixed batches."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.mixing import equal_scale, quotas
from fairdiff_lightning.data.native import Record
from fairdiff_lightning.data.sample import UNKNOWN, AttributeSpec, Sample, collate
from fairdiff_lightning.data.seeding import derive_seed, generator

MANIFEST = "manifest.csv"
TRAINING_MASKS = "train"


@dataclass(frozen=True)
class GenerationPlan:
    """How many samples of which group to generate, and from which masks.

    Args:
        per_group: samples of every group.
        total: samples over all groups, divided evenly; with ``equal_scale`` the size of the mixed training set instead.
        equal_scale: make what each group lacks for an Equal-Scale set of ``total`` (as many as there are real training
            samples when None).
        masks: what image generators condition on: ``train``, the training split's own masks, or a folder that a
            generator of masks wrote; None for generators that make the masks themselves.
        seed: of the plan; each sample's own seed follows from it and the sample's id.
        prefix: first part of the ids.

    Raises:
        ValueError: when it is not said how many, or twice.
    """

    per_group: int | None = None
    total: int | None = None
    equal_scale: bool = False
    masks: str | None = None
    seed: int = 0
    prefix: str = "synthetic"

    def __post_init__(self) -> None:
        if (self.per_group is None) == (self.total is None and not self.equal_scale):
            raise ValueError(
                f"generate: per_group={self.per_group}, total={self.total}, equal_scale={self.equal_scale}; give "
                "per_group, or total, or equal_scale with or without total."
            )

    def counts(self, real: Mapping[str, int]) -> dict[str, int]:
        """Samples to make of each group.

        Args:
            real: group -> number of its real training samples.
        """
        if self.per_group is not None:
            return dict.fromkeys(real, self.per_group)
        if self.equal_scale:
            size = sum(real.values()) if self.total is None else self.total
            return {group: made for group, (_, made) in equal_scale(real, size).items()}
        return quotas(self.total or 0, list(real))


@dataclass(frozen=True)
class Request:
    """One sample that is asked for.

    Args:
        id: of the sample to come; with the plan's seed it settles everything random.
        seed: in [0, 2**63).
        group: index of its group, -1 when unknown.
        condition: the record whose mask it follows.
    """

    id: str
    seed: int
    group: int
    condition: Record | None = None


def make_requests(
    plan: GenerationPlan,
    groups: Mapping[int, str],
    real: Mapping[int, int],
    masks: Sequence[Record] | None,
    attribute: str | None,
) -> list[Request]:
    """Turn a plan into requests; the k-th sample of a group is the same whatever the plan's size.

    Args:
        plan: how many, and the seed.
        groups: index -> name of the groups.
        real: index -> number of real training samples.
        masks: records to condition on; each mask of a group is used once before any is used again.
        attribute: whose groups these are; None when there is one group without a name.

    Raises:
        ValueError: when a group lacks masks to condition on, naming it.
    """
    counts = plan.counts({name: real[index] for index, name in groups.items()})
    requests = []
    for index, name in groups.items():
        pool = [m for m in masks or () if attribute is None or m.attributes[attribute] == index]
        if masks is not None and not pool and counts[name]:
            raise ValueError(
                f"generate: no mask of '{attribute}' {name} in '{plan.masks}', but {counts[name]} samples of it are "
                "asked for. Generate masks of that group first, or leave the group out with `groups`."
            )
        rounds = -(-counts[name] // len(pool)) if pool else 0
        order = [
            i
            for turn in range(rounds)
            for i in torch.randperm(len(pool), generator=generator(plan.seed, "masks", name, turn)).tolist()
        ]
        for k in range(counts[name]):
            sample_id = f"{plan.prefix}_{_slug(name)}_{k:05d}"
            condition = pool[order[k]] if pool else None
            requests.append(Request(sample_id, derive_seed(plan.seed, sample_id), index, condition))
    return requests


class RequestBatches(Dataset[Sample]):
    """Batches of requests, always of the same composition, so that rounding is the same after a restart.

    Args:
        requests: of the whole plan.
        batch_size: requests in a batch.
        attributes: attributes of the data; the first is the one that the groups belong to, the others are unknown.
        read: gives what a generator conditions on, ``mask`` (1, H, W).
        done: ids that exist already; a batch is left out when all of its ids do.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        batch_size: int,
        attributes: Sequence[str],
        read: Callable[[Record], Mapping[str, Any]],
        done: frozenset[str] = frozenset(),
    ) -> None:
        batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
        self.batches = [batch for batch in batches if not all(request.id in done for request in batch)]
        self.attributes, self.read = attributes, read

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Sample:
        return collate([self._sample(request) for request in self.batches[index]])

    def _sample(self, request: Request) -> Sample:
        groups = [request.group, *[UNKNOWN] * (len(self.attributes) - 1)]
        asked: Sample = {  # type: ignore[typeddict-item] # a request has no image, and a mask only as a condition
            "id": request.id,
            "seed": torch.tensor(request.seed),
            "attributes": {a: torch.tensor(g) for a, g in zip(self.attributes, groups, strict=False)},
        }
        if request.condition is None:
            return asked
        condition = request.condition
        source = condition.source or ("" if condition.synthetic else condition.id)
        return cast(Sample, {**asked, **self.read(condition), "condition": condition.id, "source": source})


def read_masks(folder: Path, specs: Sequence[AttributeSpec]) -> list[Record]:
    """Records of masks that a generator wrote, from the folder's ``manifest.csv``.

    Args:
        folder: where ``SyntheticDatasetWriter`` wrote them.
        specs: attributes whose groups the table names.

    Raises:
        InvalidSampleError: when there is no table, or a row names no file or an unknown group.
    """
    table = folder / MANIFEST
    if not table.is_file():
        raise InvalidSampleError(table, "no such file", "the folder of a finished `predict` of a generator of masks")
    records = []
    with table.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            file = folder / row["file"]
            if not file.is_file():
                raise InvalidSampleError(table, f"row '{row['id']}' with the missing file '{row['file']}'", "a file")
            attributes = {spec.name: _group_index(row.get(spec.name, ""), spec, table) for spec in specs}
            files = {"image": str(file), "mask": str(file)}
            records.append(
                Record(row["id"], files, attributes, row["id"], synthetic=True, source=row.get("source") or None)
            )
    return records


def _group_index(name: str, spec: AttributeSpec, table: Path) -> int:
    if name in ("", "unknown"):
        return UNKNOWN
    if name not in spec.groups:
        raise InvalidSampleError(f"{table}[{spec.name}]", f"{name!r}", f"one of {', '.join(spec.groups)} or nothing")
    return spec.groups.index(name)


def _slug(name: str) -> str:
    spelled = name.replace("<", "below-").replace(">=", "from-")
    return "".join(c if c.isalnum() or c == "-" else "-" for c in spelled)
