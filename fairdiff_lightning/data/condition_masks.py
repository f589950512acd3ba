"""The masks that a plan wants to be followed: the training split's own, or a folder's."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import NativeDataset, Record
from fairdiff_lightning.data.requests import MANIFEST, OWN_MASKS, TRAINING, GenerationPlan
from fairdiff_lightning.data.sample import UNKNOWN, AttributeSpec


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


def _group_index(name: str, spec: AttributeSpec, table: Path) -> int:
    if name in ("", "unknown"):
        return UNKNOWN
    if name not in spec.groups:
        raise InvalidSampleError(f"{table}[{spec.name}]", f"{name!r}", f"one of {', '.join(spec.groups)} or nothing")
    return spec.groups.index(name)
