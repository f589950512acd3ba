"""What to generate, as data: a plan becomes requests, and a predict loader yields them in fixed batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from fairdiff_lightning.data.frames import Frame
from fairdiff_lightning.data.mixing import equal_scale, quotas
from fairdiff_lightning.data.native import NativeDataset, Record
from fairdiff_lightning.data.sample import UNKNOWN, Sample, collate
from fairdiff_lightning.data.samplers import SequentialShards
from fairdiff_lightning.data.seeding import derive_seed, generator
from fairdiff_lightning.data.textures import Texture, TextureArgument, read_textures, texture_batch

MANIFEST = "manifest.csv"
"""The table of what a run wrote, in the folder of the files."""
TRAINING, OWN_MASKS, HEALTHY = "train", "own", "healthy"


@dataclass(frozen=True)
class GenerationPlan:
    """How many samples of which group to generate, and from which masks.

    Args:
        per_group: samples of every group.
        per_source: samples that follow each mask, whatever its group; a mask of unknown group is followed too. How
            ``masks`` and ``backgrounds`` pair is told by the other counts alone.
        total: samples over all groups, divided evenly; with ``equal_scale`` the size of the mixed training set instead.
        equal_scale: make what each group lacks for an Equal-Scale set of ``total`` (as many as there are real training
            samples of the balanced groups when None).
        masks: what image generators condition on: ``train``, the training split's own masks; a folder that a generator
            of masks wrote; ``own``, that of the background; None for generators that make the masks themselves.
        backgrounds: the scans that lesions are put into: ``train``, the training split's own; ``healthy``, those that
            the data set has without a lesion; a folder of whole scans, of which those of the data set's cases with a
            lesion are left out; None for generators that make the whole image.
        organs: masks of the organ that lesions are put into, one for each whole scan: a folder of NIfTI files of the
            scans' names, or a pattern as ``{folder}/{name}_lung.nii.gz`` of the scan's ``folder``, ``name`` and ``id``.
            None finds the lungs in the scans.
        textures: each lesion comes once in every one of these, from one seed, so that a sample is asked for as often as
            there are: names as ``cluster:2``, paths of ``.npy`` files of a histogram, or the numbers of one. Without,
            the generator chooses.
        texture_bins: of these histograms, for each lesion class.
        seed: of the plan; each sample's own seed follows from it and the sample's id.
        prefix: first part of the ids.

    Raises:
        ValueError: when it is not said how many, or twice, or fewer than one; for ``per_source`` without masks of their
            own, for textures that are none, and for other contradictions.
    """

    per_group: int | None = None
    per_source: int | None = None
    total: int | None = None
    equal_scale: bool = False
    masks: str | None = None
    backgrounds: str | None = None
    organs: str | None = None
    textures: Sequence[TextureArgument] = ()
    texture_bins: int = 16
    seed: int = 0
    prefix: str = "synthetic"

    def __post_init__(self) -> None:
        balanced = self.total is not None or self.equal_scale
        if (self.per_group is not None) + (self.per_source is not None) + balanced != 1:
            raise ValueError(
                f"generate: per_group={self.per_group}, per_source={self.per_source}, total={self.total}, "
                f"equal_scale={self.equal_scale}; give one of per_group, per_source, total, or equal_scale with or "
                "without total."
            )
        if self.per_source is not None and (self.masks in (None, OWN_MASKS) or self.backgrounds is not None):
            raise ValueError(
                f"generate: per_source={self.per_source} with masks={self.masks!r} and backgrounds="
                f"{self.backgrounds!r}: it counts the samples of each mask that is followed. Give masks='train' or a "
                "folder of masks and no backgrounds, or say how many by per_group, total or equal_scale."
            )
        if self.backgrounds == TRAINING and self.masks != OWN_MASKS:
            raise ValueError(
                f"generate: backgrounds='train' with masks={self.masks!r}: these scans show lesions of their own, and "
                "they would have no label. Give masks='own', which paints them anew, or other backgrounds."
            )
        if self.masks == OWN_MASKS and self.backgrounds is None:
            raise ValueError("generate: masks='own' are those of backgrounds; say which `backgrounds`.")
        if self.organs is not None and self.backgrounds in (None, TRAINING, HEALTHY):
            raise ValueError(
                f"generate: organs={self.organs!r} with backgrounds={self.backgrounds!r}: they tell the place in whole "
                "scans. Give backgrounds a folder of these."
            )
        self._check_textures()
        for name in ("per_group", "per_source", "total"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"generate: {name}={count}; ask for 1 sample or more, or give no plan at all.")

    def _check_textures(self) -> None:
        if read_textures(self.textures, self.texture_bins) and (self.backgrounds is None or self.equal_scale):
            raise ValueError(
                f"generate: textures with backgrounds={self.backgrounds!r}, equal_scale={self.equal_scale}: they are "
                "of lesions that are painted into scans, each once in every texture, which no balance counts. Say "
                "which `backgrounds`, and how many by per_group or total."
            )

    def counts(self, real: Mapping[str, int], masks: Mapping[str, int]) -> dict[str, int]:
        """Samples to make of each group.

        Args:
            real: group -> number of its real training samples.
            masks: group -> number of masks to follow, which ``per_source`` counts.
        """
        if self.per_group is not None:
            return dict.fromkeys(real, self.per_group)
        if self.per_source is not None:
            return {group: self.per_source * count for group, count in masks.items()}
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
        round: how many earlier requests of its group follow the same mask; where none is followed, how many there are.
        condition: the record whose mask it follows.
        background: the record whose image the lesion is put into.
        texture: that the lesion is to have; the generator's own choice when None.
    """

    id: str
    seed: int
    group: int
    round: int = 0
    condition: Record | None = None
    background: Record | None = None
    texture: Texture | None = None

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
    if plan.per_source is not None and attribute is not None:
        groups = {**groups, UNKNOWN: "unknown"}
    followed = {index: _of_group("mask", plan.masks, masks, attribute, index) for index in groups}
    counts = plan.counts(
        {name: real.get(index, 0) for index, name in groups.items()},
        {name: len(followed[index] or ()) for index, name in groups.items()},
    )
    if plan.per_source is not None and not any(counts.values()):
        raise ValueError(f"generate: per_source={plan.per_source}, but '{plan.masks}' has no mask of a wanted group.")
    made_for = {scan.id: scan for scan in backgrounds or ()}
    requests = []
    for index, name in groups.items():
        pool = _of_group("background", plan.backgrounds, backgrounds, attribute, index)
        conditions = _in_turn("mask", plan, followed[index], counts[name], name, attribute)
        scans = _in_turn("background", plan, pool, counts[name], name, attribute)
        met: Counter[str] = Counter()
        for k, (condition, scan) in enumerate(zip(conditions, scans, strict=True)):
            sample_id = f"{plan.prefix}_{_slug(name)}_{k:05d}"
            background = made_for.get(condition.source or "", scan) if condition else scan
            follow = background if plan.masks == OWN_MASKS else condition
            key = "" if follow is None else follow.id
            requests.append(Request(sample_id, derive_seed(plan.seed, sample_id), index, met[key], follow, background))
            met[key] += 1
    textures = read_textures(plan.textures, plan.texture_bins)
    return [each for request in requests for each in _in_textures(request, textures)]


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
        requests = self.batches[index]
        batch = collate([self._sample(request) for request in requests])
        textures = [request.texture for request in requests if request.texture is not None]
        return cast(Sample, {**batch, "texture": texture_batch(textures)}) if textures else batch

    def followed(self, replicas: int, rank: int) -> list[Record]:
        """The distinct records that the requests of one process follow."""
        conditions = (request.condition for batch in self.batches[rank::replicas] for request in batch)
        return list({record.id: record for record in conditions if record is not None}.values())

    def loader(self, num_workers: int, replicas: int, rank: int) -> DataLoader[Sample]:
        """Yields the batches in order, each exactly once over all devices."""
        return DataLoader(self, None, sampler=SequentialShards(self, replicas, rank), num_workers=num_workers)

    def _sample(self, request: Request) -> Sample:
        groups = [request.group, *[UNKNOWN] * (len(self.attributes) - 1)]
        asked: Sample = {  # type: ignore[typeddict-item] # a request has no image, and a mask only as a condition
            "id": request.id,
            "seed": torch.tensor(request.seed),
            "round": torch.tensor(request.round),
            "attributes": {a: torch.tensor(g) for a, g in zip(self.attributes, groups, strict=False)},
        }
        if request.condition is None and request.background is None:
            return asked
        followed = {"source": request.source} | ({"condition": request.condition.id} if request.condition else {})
        return cast(Sample, {**asked, **self.read(request), **followed})


def _in_textures(request: Request, textures: Sequence[Texture]) -> list[Request]:
    """A request once for each texture, from one seed: in one place of a whole scan, and from one noise."""
    asked = [replace(request, id=f"{request.id}_{texture.label}", texture=texture) for texture in textures]
    return asked or [request]


def _of_group(
    kind: str, place: str | None, records: Sequence[Record] | None, attribute: str | None, index: int
) -> Sequence[Record] | None:
    """The records that samples of one group may follow, None where they follow none; healthy scans are of no group."""
    if records is None or attribute is None or (kind == "background" and place != TRAINING):
        return records
    return [record for record in records if record.attributes[attribute] == index]


def _in_turn(
    kind: str, plan: GenerationPlan, pool: Sequence[Record] | None, count: int, group: str, attribute: str | None
) -> Sequence[Record | None]:
    """The record that each sample of one group follows, or nothing for each."""
    if pool is None:
        return [None] * count
    if not pool and count:
        place = plan.masks if kind == "mask" else plan.backgrounds
        raise ValueError(
            f"generate: no {kind} of '{attribute}' {group} in '{place}', but {count} samples of it are asked for. "
            "Generate masks of that group first, or leave the group out with `groups`."
        )
    return _in_rounds(pool, count, (plan.seed, f"{kind}s", group)) if pool else []


def _in_rounds(pool: Sequence[Record], count: int, names: tuple[int, str, str]) -> list[Record]:
    """The records that a group's samples follow; none is followed twice before all were."""
    if all(record.synthetic for record in pool):
        return [pool[k % len(pool)] for k in range(count)]
    rounds = range(-(-count // len(pool)))
    orders = [torch.randperm(len(pool), generator=generator(*names, turn)).tolist() for turn in rounds]
    return [pool[i] for order in orders for i in order][:count]


def _slug(name: str) -> str:
    spelled = name.replace("<", "below-").replace(">=", "from-")
    return "".join(c if c.isalnum() or c == "-" else "-" for c in spelled)
