"""Splits by patient or lesion: a unit is never cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fairdiff_lightning.data.native import Record

Splits = dict[str, list[Record]]


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


def split_records(records: Sequence[Record], fractions: Sequence[float], seed: int) -> Splits:
    """Split records by unit; the owner's test set stays what it is and validation is then cut from the rest.

    Args:
        records: real samples only.
        fractions: shares of train, val and test; the last is ignored when the owner publishes a test set.
        seed: of the permutation of the units.
    """
    official = [r for r in records if r.split == "test"]
    rest = [r for r in records if r.split != "test"]
    if official:
        train, val, _ = fractions
        fractions = (train / (train + val), val / (train + val), 0.0) if train + val > 0 else fractions
    parts = split_units((r.unit for r in rest), fractions, seed)
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
