"""Splits by patient or lesion: a unit is never cut, and nothing made from a held-out case is trained on."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fairdiff_lightning.data.native import Record, atomic_path
from fairdiff_lightning.data.sample import UNKNOWN, AttributeSpec

Splits = dict[str, list[Record]]
HELD_OUT = ("val", "test")


def split_units(units: Iterable[str], fractions: Sequence[float], seed: int) -> dict[str, str]:
    """Assign each unit to ``train``, ``val`` or ``test``.

    The held-out part is drawn first and then divided, each by a fresh generator of the same seed: with (0.8, 0.1, 0.1)
    and seed 0 this is the HAM10000 split of MEDFAIR. Three units or more leave none of the three parts empty unless
    its fraction is 0.

    Args:
        units: patient or lesion of every sample, repeats allowed.
        fractions: shares of train, val and test, which sum to 1.
        seed: of the permutations.

    Returns:
        Unit -> part.

    Raises:
        ValueError: when the fractions are not three shares of 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"fractions {list(fractions)}: expected three shares (train, val, test) that sum to 1.")
    names = np.unique(np.asarray(list(units), dtype=object).astype(str))
    _, val, test = fractions
    wanted = int(val > 0) + int(test > 0)
    held_out = min(max(math.ceil(round((val + test) * len(names), 9)), wanted), len(names)) if wanted else 0
    order = np.random.RandomState(seed).permutation(len(names))  # the published split is made by this generator
    rest = names[order[:held_out]]
    order_rest = np.random.RandomState(seed).permutation(held_out)
    num_test = math.ceil(round(test / (val + test) * held_out, 9)) if wanted else 0
    if wanted == 2 and held_out >= 2:
        num_test = min(max(num_test, 1), held_out - 1)
    parts = dict.fromkeys(names[order[held_out:]].tolist(), "train")
    parts |= dict.fromkeys(rest[order_rest[:num_test]].tolist(), "test")
    return parts | dict.fromkeys(rest[order_rest[num_test:]].tolist(), "val")


def split_records(
    records: Sequence[Record], fractions: Sequence[float], seed: int, drawn_over: str | None = None
) -> Splits:
    """Split records by unit; the owner's test set stays what it is, and nothing that is marked ``train`` is tested on.

    Without a published test set, the test split is drawn from the units of which no record is marked, by the fractions.
    Units that are marked ``train``, and all but the test set where there is one, are divided into training and
    validation by the first two. Only fractions of (0, 0, 1) take everything for the test, marked or not.

    Args:
        records: all real samples, before any filter: what is left out of one run must not move a case in another.
        fractions: shares of train, val and test; the last is ignored when the owner publishes a test set.
        seed: of the permutation of the units.
        drawn_over: attribute; units of which it is known are drawn first, by themselves, and the others after them.
    """
    official = [r for r in records if r.split == "test"]
    rest = [r for r in records if r.split != "test"]
    train, val, _ = fractions
    untested = (train / (train + val), val / (train + val), 0.0) if train + val > 0 else fractions
    units = {r.unit for r in rest}
    trained = units if official else {r.unit for r in rest if r.split == "train"}
    first = {r.unit for r in rest if drawn_over is None or r.attributes[drawn_over] != UNKNOWN}
    parts: dict[str, str] = {}
    for drawn in (first, units - first):
        parts |= split_units(drawn & trained, untested, seed) | split_units(drawn - trained, fractions, seed)
    splits: Splits = {"train": [], "val": [], "test": list(official)}
    for record in rest:
        splits[parts[record.unit]].append(record)
    return splits


def check_disjoint(splits: Splits) -> None:
    """Check that no unit stands in two splits and that nothing synthetic stands in validation or test.

    Raises:
        ValueError: naming a unit, or a synthetic sample, and the splits.
    """
    seen: dict[str, str] = {}
    for part, records in splits.items():
        for record in records:
            if record.synthetic:
                if part != "train":
                    raise ValueError(f"synthetic sample {record.id!r} stands in the {part} split.")
                continue
            if seen.setdefault(record.unit, part) != part:
                raise ValueError(f"unit {record.unit!r} stands in both the {seen[record.unit]} and the {part} split.")


def held_out_keys(splits: Splits, case_key: Callable[[str], str]) -> frozenset[str]:
    """Keys of the validation and test cases.

    Args:
        splits: of all real samples, before any filter: a case that is filtered out is held out all the same.
        case_key: of a data set, see :meth:`~fairdiff_lightning.data.native.NativeDataset.case_key`.
    """
    return frozenset(case_key(record.id) for part in HELD_OUT for record in splits[part])


def refuse_leaks(made: Sequence[Record], held_out: frozenset[str], case_key: Callable[[str], str]) -> None:
    """Check that nothing was made from a held-out case.

    Args:
        made: synthetic samples, or masks to follow.
        held_out: from :func:`held_out_keys`.
        case_key: of the data set.

    Raises:
        ValueError: naming the first such sample and its source.
    """
    leaks = [record for record in made if record.source and case_key(record.source) in held_out]
    if leaks:
        raise ValueError(
            f"synthetic sample '{leaks[0].id}' ({next(iter(leaks[0].files.values()))}) is derived from the validation "
            f"or test case '{leaks[0].source}', as are {len(leaks) - 1} others: training on it would spoil the test. "
            "Generate from this split's training cases (same fractions and split_seed), or remove these samples."
        )


def as_synthetic(record: Record, folder: Path) -> Record:
    """A record of a folder of synthetic samples; one that is not marked as such may be a copy of the case it names."""
    source = record.source or (None if record.synthetic else record.id)
    return replace(record, id=str(folder / record.id), synthetic=True, source=source)


def count_groups(splits: Splits, specs: Sequence[AttributeSpec]) -> dict[str, dict[str, dict[str, int]]]:
    """Split -> attribute -> group name -> number of samples, unknown ones included."""

    def counts(records: Sequence[Record], spec: AttributeSpec) -> dict[str, int]:
        found = Counter(record.attributes[spec.name] for record in records)
        return {name: found[g] for g, name in enumerate(spec.groups)} | {"unknown": found[UNKNOWN]}

    return {part: {spec.name: counts(records, spec) for spec in specs} for part, records in splits.items()}


def write_split_table(path: Path, splits: Splits, unit: str, attributes: Sequence[str]) -> None:
    """Write who is where, atomically: id, unit, split, synthetic, and the group of every attribute."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["id", unit, "split", "synthetic", *attributes])
        for part, records in splits.items():
            rows.writerows(
                [r.id, r.unit, part, int(r.synthetic), *(r.attributes[a] for a in attributes)] for r in records
            )
