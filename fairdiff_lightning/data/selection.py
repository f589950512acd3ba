"""Which records are used: filters by group, files that cannot be read, and a report of what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from lightning.pytorch.utilities import rank_zero_warn

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import Index, NativeDataset, Record
from fairdiff_lightning.data.sample import UNKNOWN, AttributeSpec
from fairdiff_lightning.data.splits import Splits


@dataclass(frozen=True)
class GroupFilter:
    """Says of a record why it is not wanted.

    Args:
        groups: attribute -> indices of the groups to keep.
        known: attributes of which the group must be known.
    """

    groups: Mapping[str, Set[int]] = field(default_factory=dict)
    known: Sequence[str] = ()

    @classmethod
    def of(cls, dataset: NativeDataset, groups: Mapping[str, Sequence[str]], known: Sequence[str]) -> GroupFilter:
        """The filter of groups that are given by name.

        Raises:
            ValueError: for an attribute or a group that the data set does not have.
        """
        return cls({name: _indices(find_attribute(dataset, name), wanted) for name, wanted in groups.items()}, known)

    def kept(self, spec: AttributeSpec) -> dict[int, str]:
        """Index -> name of the groups of an attribute that are kept."""
        kept = self.groups.get(spec.name, range(len(spec)))
        return {index: name for index, name in enumerate(spec.groups) if index in kept}

    def reason(self, record: Record) -> str | None:
        """Why the record is left out; None when it is kept."""
        for name in self.known:
            if record.attributes[name] == UNKNOWN:
                return f"unknown {name}"
        for name, groups in self.groups.items():
            if record.attributes[name] not in groups:
                return f"{name} not asked for"
        return None


def find_attribute(dataset: NativeDataset, name: str) -> AttributeSpec:
    """An attribute of a data set by its name.

    Raises:
        ValueError: when it has none of this name.
    """
    known = dataset.attributes
    if name not in known:
        raise ValueError(f"attributes: {dataset.name} has no '{name}'; it has {', '.join(known)}.")
    return known[name]


def select(
    parts: Splits,
    index: Index,
    wanted: GroupFilter,
    decode: Callable[[Record], object] | None,
    where: str,
) -> Splits:
    """Leave out of each part what is not wanted or cannot be read; all of it is counted in one warning.

    Args:
        parts: the records of ``index``, in parts.
        index: what else its tree lacks, and the files that could not even be listed.
        wanted: which groups to keep.
        decode: reads a record, to leave out those that cannot be; None reads nothing and takes no error.
        where: the data set and its folder, for messages.

    Raises:
        InvalidSampleError: for a file that could not be listed, when there is no ``decode``; for an id that stands
            twice among what is kept.
        ValueError: when nothing is left.
    """
    if index.errors and decode is None:
        raise index.errors[0]
    left_out, errors = Counter(index.left_out), list(index.errors)

    def keep(record: Record) -> bool:
        reason = wanted.reason(record)
        if reason is not None:
            left_out[reason] += 1
            return False
        error = _error_of(record, decode)
        errors.extend([error] if error else [])
        return error is None

    kept = {part: [record for record in records if keep(record)] for part, records in parts.items()}
    if errors:
        left_out[f"unreadable, the first: {errors[0]}"] = len(errors)
    records = [record for part in kept.values() for record in part]
    if left_out:
        counts = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        rank_zero_warn(f"{where}: {len(records)} samples. Left out: {counts}.")
    if not records:
        raise errors[0] if errors else ValueError(f"no sample of {where} is left.")
    _refuse_repeats(records, where)
    return kept


def _indices(spec: AttributeSpec, names: Sequence[str]) -> frozenset[int]:
    unknown = [name for name in names if name not in spec.groups]
    if unknown:
        raise ValueError(f"groups[{spec.name}]: no group {unknown}; the groups are {', '.join(spec.groups)}.")
    return frozenset(map(spec.groups.index, names))


def _error_of(record: Record, decode: Callable[[Record], object] | None) -> InvalidSampleError | None:
    if decode is not None:
        try:
            decode(record)
        except InvalidSampleError as error:
            return error
    return None


def _refuse_repeats(records: Sequence[Record], where: str) -> None:
    repeated = sorted(name for name, count in Counter(record.id for record in records).items() if count > 1)
    if repeated:
        files = [record.files for record in records if record.id == repeated[0]]
        raise InvalidSampleError(where, f"id {repeated[0]!r} twice, in {files}", "ids that are unique")
