"""Shards: many images and their edges in a file each, written and read by ``litdata``."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import atomic_path, make_directory_once
from fairdiff_lightning.data.radimagenet_samples import SampleMaker
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.data.seeding import derive_seed, generator

FACTS = "shards.json"
SECTION = 64
"""Shards that are written at a time: what a killed process has to repeat."""
AT_ONCE = 256
"""Images that are asked for at once."""
Reader = Callable[[list[int]], Iterator[dict[str, Any]]]
"""Gives the items at some places: ``id`` (path), ``image`` and ``edge`` (encoded)."""


class RadImageNetShards(Dataset[Sample]):
    """Samples of the shards that :func:`write_shards` wrote.

    Args:
        folder: of one split.
        maker: makes samples of pictures.
    """

    def __init__(self, folder: Path, maker: SampleMaker) -> None:
        self.folder, self.maker, self._rows = folder, maker, litdata().StreamingDataset(str(folder))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Sample:
        """The sample at a place; neighbours lie in one file."""
        return self.maker(self._rows[int(place)], self.folder)


def write_shards(directory: Path, readers: Mapping[str, Reader], facts: Mapping[str, Any], seed: int) -> None:
    """Write splits in a random order into shards; after a kill, a second call goes on.

    Args:
        directory: gets a folder for each split.
        readers: of the splits.
        facts: what is known of them, as JSON: ``rows``, the number of items of each split, ``samples_per_shard``, and
            what else tells one writing from another.
        seed: of the order.

    Raises:
        ImportError: without ``litdata``.
        ValueError: when the folder has shards, or parts of others.
    """
    litdata()
    if (directory / FACTS).exists():
        raise ValueError(f"'{directory}' has shards already; delete it, or choose another folder.")
    work = directory / f".{derive_seed(json.dumps(facts), seed):016x}"
    if not work.exists() and any((directory / part).exists() for part in readers):
        raise ValueError(f"'{directory}' has parts of other data or settings; delete it, or choose another folder.")
    for part, read in readers.items():
        order = torch.randperm(facts["rows"][part], generator=generator(seed, "shards", part))
        _write_part(directory / part, work / part, order, read, facts["samples_per_shard"])
    with atomic_path(directory / FACTS) as temporary:
        temporary.write_text(json.dumps(facts))
    shutil.rmtree(work)


def read_facts(directory: Path) -> dict[str, Any]:
    """What is known of shards, all files of which are there.

    Raises:
        InvalidSampleError: when they are not whole.
    """
    if not (directory / FACTS).is_file():
        raise InvalidSampleError(directory, f"no {FACTS}", "whole shards; let write_shards go on, or name its folder")
    facts: dict[str, Any] = json.loads((directory / FACTS).read_text())
    for part in facts["rows"]:
        chunks = json.loads((directory / part / "index.json").read_text())["chunks"]
        files = [directory / part / chunk["filename"] for chunk in chunks]
        gone = [file for file in files if not file.is_file()]
        if gone:
            found = f"gone, and it is the first of {len(gone)} such shards of {len(files)}"
            raise InvalidSampleError(gone[0], found, "every shard; put them back, or write the shards anew")
    return facts


def litdata() -> Any:
    """The library of shards, an extra.

    Raises:
        ImportError: when it is not installed.
    """
    try:
        importlib.import_module("litdata.streaming")
        return importlib.import_module("litdata")
    except ImportError as error:
        raise ImportError(
            f"shards are written and read by litdata ({error}): pip install 'fairdiff_lightning[shards]', or leave "
            "shards empty to read the folder tree."
        ) from error


def _write_part(target: Path, work: Path, order: torch.Tensor, read: Reader, samples_per_shard: int) -> None:
    """Write a split section by section, each whole or not at all, and join them."""
    length = SECTION * samples_per_shard
    sections = {work / f"{k // length:05d}": order[k : k + length] for k in range(0, len(order), length)}
    for section, places in sections.items():
        items = (item for k in range(0, len(places), AT_ONCE) for item in read(places[k : k + AT_ONCE].tolist()))
        make_directory_once(section, partial(_write_section, items=items, samples_per_shard=samples_per_shard))
    make_directory_once(target, partial(_join, list(sections)))


def _write_section(target: Path, items: Iterator[dict[str, Any]], samples_per_shard: int) -> None:
    writer = litdata().streaming.Cache(str(target), chunk_size=samples_per_shard)
    for number, item in enumerate(items):
        writer[number] = item
    writer.done()
    writer.merge()


def _join(sections: list[Path], target: Path) -> None:
    if len(sections) == 1:
        shutil.copytree(sections[0], target, dirs_exist_ok=True)
    else:
        litdata().merge_datasets([str(section) for section in sections], str(target))
