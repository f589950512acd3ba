"""What to generate, as data: a plan becomes requests, and a predict loader yields them in fixed batches."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.mixing import equal_scale, quotas
from fairdiff_lightning.data.native import NativeDataset, Record, check_classes
from fairdiff_lightning.data.resize import Resize, centre_region, crop_to, resize_mask
from fairdiff_lightning.data.sample import UNKNOWN, AttributeSpec, Sample, collate
from fairdiff_lightning.data.samplers import SequentialShards
from fairdiff_lightning.data.seeding import derive_seed, generator

MANIFEST = "manifest.csv"
"""The table of what a run wrote, in the folder of the files."""
TRAINING_MASKS = "train"


@dataclass(frozen=True)
class GenerationPlan:
    """How many samples of which group to generate, and from which masks.

    Args:
        per_group: samples of every group.
        total: samples over all groups, divided evenly; with ``equal_scale`` the size of the mixed training set instead.
        equal_scale: make what each group lacks for an Equal-Scale set of ``total`` (as many as there are real training
            samples of the balanced groups when None).
        masks: what image generators condition on: ``train``, the training split's own masks, or a folder that a
            generator of masks wrote; None for generators that make the masks themselves.
        seed: of the plan; each sample's own seed follows from it and the sample's id.
        prefix: first part of the ids.

    Raises:
        ValueError: when it is not said how many, or twice, or fewer than one.
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
        for name, count in (("per_group", self.per_group), ("total", self.total)):
            if count is not None and count < 1:
                raise ValueError(f"generate: {name}={count}; ask for 1 sample or more, or give no plan at all.")

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

    @property
    def source(self) -> str:
        """Id of the real case behind the condition; empty when there is none."""
        if self.condition is None:
            return ""
        return self.condition.source or ("" if self.condition.synthetic else self.condition.id)


def make_requests(
    plan: GenerationPlan,
    groups: Mapping[int, str],
    real: Mapping[int, int],
    masks: Sequence[Record] | None,
    attribute: str | None,
) -> list[Request]:
    """Turn a plan into requests; the k-th sample of a group is the same whatever the plan's size.

    Real masks are followed in an order that the plan's seed draws anew for each round. Generated masks are all alike,
    so they are followed in their own order: as long as no mask is needed twice, more of them change no request.

    Args:
        plan: how many, and the seed.
        groups: index -> name of the groups.
        real: index -> number of real training samples.
        masks: records to condition on; each mask of a group is used once before any is used again.
        attribute: whose groups these are; None when there is one group without a name.

    Raises:
        ValueError: when a group lacks masks to condition on, naming it; for ``equal_scale`` without an attribute.
    """
    if plan.equal_scale and attribute is None:
        raise ValueError("generate: equal_scale without attributes: name the one to balance, or give total alone.")
    counts = plan.counts({name: real[index] for index, name in groups.items()})
    requests = []
    for index, name in groups.items():
        pool = [m for m in masks or () if attribute is None or m.attributes[attribute] == index]
        if masks is not None and not pool and counts[name]:
            raise ValueError(
                f"generate: no mask of '{attribute}' {name} in '{plan.masks}', but {counts[name]} samples of it are "
                "asked for. Generate masks of that group first, or leave the group out with `groups`."
            )
        conditions = _in_rounds(pool, counts[name], plan.seed, name) if pool else [None] * counts[name]
        for k, condition in enumerate(conditions):
            sample_id = f"{plan.prefix}_{_slug(name)}_{k:05d}"
            requests.append(Request(sample_id, derive_seed(plan.seed, sample_id), index, condition))
    return requests


@dataclass(frozen=True)
class MaskReader:
    """Reads the mask that a generator follows, cropped and resized as training sees it.

    Args:
        dataset: reads the file.
        crop: side of the centre crop, pixels.
        size: height and width of the mask that is given, pixels; None keeps the crop as it is.
        resize: see :func:`~fairdiff_lightning.data.resize.resize_mask`.
    """

    dataset: NativeDataset
    crop: int | None
    size: tuple[int, int] | None
    resize: Resize

    def __call__(self, record: Record) -> dict[str, torch.Tensor]:
        """``mask``, int64 (1, H, W) class indices."""
        mask = self.dataset.read_mask(record)
        check_classes(mask, len(self.dataset.classes), str(record.files))
        cropped = crop_to(mask, centre_region(mask.shape, self.crop))
        return {"mask": torch.from_numpy(resize_mask(cropped, self.size, self.resize).astype(np.int64))[None]}


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
        done: Iterable[str] = (),
    ) -> None:
        done = frozenset(done)
        batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
        self.batches = [batch for batch in batches if not all(request.id in done for request in batch)]
        self.attributes, self.read = attributes, read

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Sample:
        return collate([self._sample(request) for request in self.batches[index]])

    def loader(self, num_workers: int, replicas: int, rank: int) -> DataLoader[Sample]:
        """Yields the batches in order, each exactly once over all devices."""
        return DataLoader(self, None, sampler=SequentialShards(self, replicas, rank), num_workers=num_workers)

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
        return cast(Sample, {**asked, **self.read(condition), "condition": condition.id, "source": request.source})


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
            source = row.get("source", row["id"]) or None  # predictions have no source: they are of the cases they name
            digest = hashlib.sha256(json.dumps(row).encode()).hexdigest()[:12]
            records.append(Record(row["id"], files, attributes, row["id"], None, True, source, digest))
    return records


def condition_masks(
    plan: GenerationPlan, training: Sequence[Record], specs: Sequence[AttributeSpec]
) -> list[Record] | None:
    """The masks that a plan wants to be followed; None when it wants none.

    Args:
        plan: what to generate.
        training: real training samples.
        specs: attributes of the data.

    Raises:
        InvalidSampleError: when the plan's folder holds no table of masks.
    """
    if plan.masks is None:
        return None
    return list(training) if plan.masks == TRAINING_MASKS else read_masks(Path(plan.masks), specs)


def _in_rounds(pool: Sequence[Record], count: int, seed: int, group: str) -> list[Record]:
    """The masks that a group's samples follow; none is followed twice before all were."""
    if all(mask.synthetic for mask in pool):
        return [pool[k % len(pool)] for k in range(count)]
    rounds = range(-(-count // len(pool)))
    orders = [torch.randperm(len(pool), generator=generator(seed, "masks", group, turn)).tolist() for turn in rounds]
    return [pool[i] for order in orders for i in order][:count]


def _group_index(name: str, spec: AttributeSpec, table: Path) -> int:
    if name in ("", "unknown"):
        return UNKNOWN
    if name not in spec.groups:
        raise InvalidSampleError(f"{table}[{spec.name}]", f"{name!r}", f"one of {', '.join(spec.groups)} or nothing")
    return spec.groups.index(name)


def _slug(name: str) -> str:
    spelled = name.replace("<", "below-").replace(">=", "from-")
    return "".join(c if c.isalnum() or c == "-" else "-" for c in spelled)
