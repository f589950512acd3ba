"""Which real cases a model has seen: kept in its checkpoint and its folder, and beside what it generates."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fairdiff_lightning.data.native import Record, atomic_path

TRAINING_CASES = "training_cases.txt"
"""Lists, in a folder of generated samples or of a generator's weights, what the generator was trained on."""
MOST_NAMED = 5


def marks(records: Iterable[Record]) -> frozenset[str]:
    """Id and unit of each record, with the bytes of its files, which tell them from those of another data set.

    By its unit a volume is known whichever of its slices were trained on.
    """
    sized = ((record, sum(map(_size, set(record.files.values())))) for record in records)
    return frozenset(f"{name}\t{size}" for record, size in sized for name in (record.id, record.unit))


def refuse_seen(what: str, seen: frozenset[str], held_out: Iterable[Record]) -> None:
    """Check that a model was trained on none of the cases that are held out.

    Args:
        what: the model, for the message.
        seen: :func:`marks` of what it was trained on.
        held_out: validation and test cases.

    Raises:
        ValueError: naming the first of them and counting the others.
    """
    found = sorted(record.id for record in held_out if not seen.isdisjoint(marks([record]))) if seen else []
    if found:
        names = ", ".join(f"'{name}'" for name in found[:MOST_NAMED])
        raise ValueError(
            f"{what} was trained on {len(found)} validation or test cases: {names}"
            f"{' ...' if len(found) > MOST_NAMED else ''}. That would spoil the test. Use it on its own split (same "
            "fold, num_folds, fractions and split_seed), or train one on this split."
        )


def refuse_generator(folder: Path, held_out: Iterable[Record]) -> None:
    """:func:`refuse_seen` for the generator of a folder's samples, by what lies beside them."""
    refuse_seen(f"the generator of '{folder}'", read_training_cases(folder), held_out)


def write_training_cases(folder: Path, seen: frozenset[str]) -> None:
    """Keep what a generator was trained on beside what it makes, or beside its own weights."""
    with atomic_path(folder / TRAINING_CASES) as path:
        path.write_text("".join(f"{mark}\n" for mark in sorted(seen)), encoding="utf-8")


def read_training_cases(folder: Path) -> frozenset[str]:
    """What the generator of a folder's samples, or the one in a folder, was trained on; nothing where none tells."""
    path = folder / TRAINING_CASES
    return frozenset(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else frozenset()


def _size(file: str) -> int:
    return os.path.getsize(file) if os.path.isfile(file) else 0
