"""Cross-validation by case: who is held out in which fold, and one score over the folds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np

from fairdiff_lightning.data.native import Record
from fairdiff_lightning.data.splits import Splits, split_units


def case_folds(cases: Iterable[str], k: int = 3, seed: int | None = None) -> list[list[str]]:
    """Divide cases into ``k`` parts, each held out once; the first ``len(cases) % k`` parts have one more.

    Args:
        cases: patient or volume of every sample, repeats allowed.
        k: number of parts.
        seed: of the shuffling, which does not depend on the order of the cases; None keeps their order, as the authors
            of DiffBoost do with that of ``dataset.json``.

    Raises:
        ValueError: when there are fewer than two parts, or fewer cases than parts.
    """
    names = list(dict.fromkeys(cases))
    if not 2 <= k <= len(names):
        raise ValueError(f"k={k} folds of {len(names)} cases: expected from 2 folds to as many as there are cases.")
    if seed is not None:
        names = [str(name) for name in np.random.default_rng(seed).permutation(sorted(names))]
    return [[names[i] for i in part] for part in np.array_split(np.arange(len(names)), k)]


def fold_records(records: Sequence[Record], fold: int, k: int = 3, val: float = 0.1, seed: int | None = 0) -> Splits:
    """Split real records for one fold: its cases are the test set, the others train and validate.

    DiffBoost's authors select the best epoch on the test set; here validation is cut from the training cases. Cases
    that are marked ``test`` stay the test set in every fold: only the others are divided, and those of the fold
    validate.

    Args:
        records: all real samples, before any filter; ``unit`` is the case.
        fold: which part is the test set, from 0.
        k: number of parts.
        val: share of the other cases that validate, where the fold is the test set.
        seed: of the shuffling; None keeps the order of the records, and validation is then drawn with seed 0.

    Raises:
        ValueError: when there is no such fold, or too few cases.
    """
    official = [record for record in records if record.split == "test"]
    divided = [record for record in records if record.split != "test"]
    parts = case_folds((record.unit for record in divided), k, seed)
    if not 0 <= fold < k:
        raise ValueError(f"fold={fold} of k={k}: expected 0 to {k - 1}.")
    chosen = set(parts[fold])
    held_out = [record for record in divided if record.unit in chosen]
    rest = [record for record in divided if record.unit not in chosen]
    if official:
        return {"train": rest, "val": held_out, "test": official}
    inner = split_units((record.unit for record in rest), (1 - val, val, 0), seed or 0)
    splits: Splits = {"train": [], "val": [], "test": held_out}
    for record in rest:
        splits[inner[record.unit]].append(record)
    return splits


def cross_fold_summary(means: Sequence[float], stds: Sequence[float]) -> tuple[float, float]:
    """Mean and spread over folds as DiffBoost reports them: the mean of the means, the root mean square of the stds.

    Args:
        means: over the cases of each fold.
        stds: over the cases of each fold.

    Raises:
        ValueError: when there is no fold, or not one std for each mean.
    """
    if not means or len(means) != len(stds):
        raise ValueError(f"{len(means)} means and {len(stds)} stds: expected one of each for every fold.")
    return fmean(means), math.sqrt(fmean(std**2 for std in stds))
