"""What to generate, as data: a plan becomes requests, and a predict loader yields them in fixed batches."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.frames import Frame
from fairdiff_lightning.data.mixing import equal_scale, quotas
from fairdiff_lightning.data.native import NativeDataset, Record
from fairdiff_lightning.data.sample import UNKNOWN, AttributeSpec, Sample, collate
from fairdiff_lightning.data.samplers import SequentialShards
from fairdiff_lightning.data.seeding import derive_seed, generator

MANIFEST = "manifest.csv"
"""The table of what a run wrote, in the folder of the files."""
TRAINING, OWN_MASKS, HEALTHY = "train", "own", "healthy"


@dataclass(frozen=True)
class GenerationPlan:
    """How many samples of which group to generate, and from which masks.

    Args:
        per_group: samples of every group.
        total: samples over all groups, divided evenly; with ``equal_scale`` the size of the mixed training set instead.
        equal_scale: make what each group lacks for an Equal-Scale set of ``total`` (as many as there are real training
            samples of the balanced groups when None).
        masks: what image generators condition on: ``train``, the training split's own masks; a folder that a generator
            of masks wrote; ``own``, that of the background; None for generators that make the masks themselves.
        backgrounds: the scans that lesions are put into: ``train``, the training split's own; ``healthy``, those that
            the data set has without a lesion; a folder of whole scans; None for generators that make the whole image.
        seed: of the plan; each sample's own seed follows from it and the sample's id.
        prefix: first part of the ids.

    Raises:
        ValueError: when it is not said how many, or twice, or fewer than one.
    """

    per_group: int | None = None
    total: int | None = None
    equal_scale: bool = False
    masks: str | None = None
    backgrounds: str | None = None
    seed: int = 0
    prefix: str = "synthetic"

    def __post_init__(self) -> None:
        if (self.per_group is None) == (self.total is None and not self.equal_scale):
            raise ValueError(
                f"generate: per_group={self.per_group}, total={self.total}, equal_scale={self.equal_scale}; give "
                "per_group, or total, or equal_scale with or without total."
            )
        if self.backgrounds == TRAINING and self.masks != OWN_MASKS:
            raise ValueError(
                f"generate: backgrounds='train' with masks={self.masks!r}: these scans show lesions of their own, and "
                "they would have no label. Give masks='own', which paints them anew, or other backgrounds."
            )
        if self.masks == OWN_MASKS and self.backgrounds is None:
            raise ValueError("generate: masks='own' are those of backgrounds; say which `backgrounds`.")
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
        background: the record whose image the lesion is put into.
    """

    id: str
    seed: int
    group: int
    condition: Record | None = None
    background: Record | None = None

    @property
    def source(self) -> str:
        """Id of the real case behind the background, or else behind the mask; empty when there is none."""
        behind = self.background or self.condition
        if behind is None:
            return ""
        return behind.source or ("" if behind.synthetic else behind.id)


def make_requests(
    plan: GenerationPlan,
    groups: Mapping[int, str],
    real: Mapping[int, int],
    masks: Sequence[Record] | None,
    attribute: str | None,
    backgrounds: Sequence[Record] | None = None,
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
        backgrounds: records whose images lesions are put into, used in turn as masks are; a mask that was made for one
            of them goes into that one. Without ``masks`` each is followed by its own.

    Raises:
        ValueError: when a group lacks masks or backgrounds, naming it; for ``equal_scale`` without an attribute.
    """
    if plan.equal_scale and attribute is None:
        raise ValueError("generate: equal_scale without attributes: name the one to balance, or give total alone.")
    counts = plan.counts({name: real[index] for index, name in groups.items()})
    requests = []
    for index, name in groups.items():
        conditions = _chosen("mask", plan.masks, masks, counts[name], plan.seed, name, attribute, index)
        scans = _chosen("background", plan.backgrounds, backgrounds, counts[name], plan.seed, name, attribute, index)
        made_for = {scan.id: scan for scan in backgrounds or ()}
        for k, (condition, scan) in enumerate(zip(conditions, scans, strict=True)):
            sample_id = f"{plan.prefix}_{_slug(name)}_{k:05d}"
            background = made_for.get(condition.source or "", scan) if condition else scan
            follow = background if plan.masks == OWN_MASKS else condition
            requests.append(Request(sample_id, derive_seed(plan.seed, sample_id), index, follow, background))
    return requests


RequestReader = Callable[[Request], Mapping[str, Any]]


@dataclass(frozen=True)
class MaskReader:
    """Reads the mask that a generator follows, framed as training sees it.

    Args:
        dataset: reads the file.
        frame: what part of it is given.
    """

    dataset: NativeDataset
    frame: Frame

    def __call__(self, request: Request) -> Mapping[str, Any]:
        """``mask``, int64 (1, H, W[, D]) class indices, and its place; nothing where none is followed."""
        return {} if request.condition is None else self.frame.condition(self.dataset, request.condition)


class RequestBatches(Dataset[Sample]):
    """Batches of requests, always of the same composition, so that rounding is the same after a restart.

    Args:
        requests: of the whole plan.
        batch_size: requests in a batch.
        attributes: attributes of the data; the first is the one that the groups belong to, the others are unknown.
        read: gives what a generator conditions on, ``mask`` (1, H, W) for example.
        done: ids that exist already; a batch is left out when all of its ids do.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        batch_size: int,
        attributes: Sequence[str],
        read: RequestReader,
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
        if request.condition is None and request.background is None:
            return asked
        followed = {"source": request.source} | ({"condition": request.condition.id} if request.condition else {})
        return cast(Sample, {**asked, **self.read(request), **followed})


def read_masks(folder: Path, dataset: NativeDataset, specs: Sequence[AttributeSpec]) -> list[Record]:
    """Records of masks that a generator wrote, alone or with images, from the folder's ``manifest.csv``.

    Args:
        folder: where ``SyntheticDatasetWriter`` wrote them.
        dataset: in whose layout they are.
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
            file = dataset.mask_file(folder / row["file"])
            if not file.is_file():
                raise InvalidSampleError(table, f"row '{row['id']}' with the missing file '{file}'", "a file")
            attributes = {spec.name: _group_index(row.get(spec.name, ""), spec, table) for spec in specs}
            files = {"image": str(file), "mask": str(file)}
            source = row.get("source", row["id"]) or None  # predictions have no source: they are of the cases they name
            digest = hashlib.sha256(json.dumps(row).encode()).hexdigest()[:12]
            records.append(Record(row["id"], files, attributes, row["id"], None, True, source, digest))
    return records


def condition_masks(
    plan: GenerationPlan, training: Sequence[Record], dataset: NativeDataset, specs: Sequence[AttributeSpec]
) -> list[Record] | None:
    """The masks that a plan wants to be followed; None when it wants none.

    Args:
        plan: what to generate.
        training: real training samples.
        dataset: that the samples are of.
        specs: attributes of the data.

    Raises:
        InvalidSampleError: when the plan's folder holds no table of masks.
    """
    if plan.masks in (None, OWN_MASKS):
        return None
    return list(training) if plan.masks == TRAINING else read_masks(Path(str(plan.masks)), dataset, specs)


def _chosen(
    kind: str,
    place: str | None,
    records: Sequence[Record] | None,
    count: int,
    seed: int,
    group: str,
    attribute: str | None,
    index: int,
) -> Sequence[Record | None]:
    """The records of one group that its samples follow, or nothing for each; healthy scans are of no group."""
    if records is None:
        return [None] * count
    healthy = kind == "background" and place != TRAINING
    pool = [r for r in records if healthy or attribute is None or r.attributes[attribute] == index]
    if not pool and count:
        raise ValueError(
            f"generate: no {kind} of '{attribute}' {group} in '{place}', but {count} samples of it are asked for. "
            "Generate masks of that group first, or leave the group out with `groups`."
        )
    return _in_rounds(pool, count, (seed, f"{kind}s", group)) if pool else []


def _in_rounds(pool: Sequence[Record], count: int, names: tuple[int, str, str]) -> list[Record]:
    """The records that a group's samples follow; none is followed twice before all were."""
    if all(record.synthetic for record in pool):
        return [pool[k % len(pool)] for k in range(count)]
    rounds = range(-(-count // len(pool)))
    orders = [torch.randperm(len(pool), generator=generator(*names, turn)).tolist() for turn in rounds]
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
