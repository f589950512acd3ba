"""Volumes per second that the data modules read, cold and cached, and how fast sliding windows segment.

``python benchmarks/volumes.py``: phantoms in their native layouts (gzipped NIfTI), without loader processes.
The mixture in chunks has a benchmark of its own, ``volume_mixture.py``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from typing import Any

import torch
from timing import interleaved, print_table, ratio

from fairdiff_lightning.data import LIDCDataModule, ProstateDataModule, VolumeDataModule
from fairdiff_lightning.modules import Segmenter

CASES: dict[str, tuple[type[VolumeDataModule], dict[str, Any]]] = {
    "LIDC blocks, 64 x 64 x 32": (LIDCDataModule, {}),
    "prostate, resampled to 3 mm, 64 x 64 x 64": (
        ProstateDataModule,
        {"spacing": (3.0, 3.0, 3.0), "image_size": (64, 64, 64), "patch_size": None, "crop_foreground": False},
    ),
    "prostate, blocks of 64 x 64 x 32 of 1.5 x 1.5 x 3 mm": (
        ProstateDataModule,
        {"spacing": (1.5, 1.5, 3.0), "patch_size": (64, 64, 32), "crop_foreground": False},
    ),
}


def read(data: VolumeDataModule, epochs: int) -> float:
    """Volumes per second over the training split."""
    loader = data.train_dataloader()
    start, count = time.perf_counter(), 0
    for _ in range(epochs):
        count += sum(len(batch["id"]) for batch in loader)
    return count / (time.perf_counter() - start)


def reading(epochs: int) -> list[tuple[str, ...]]:
    """Cold and warm, for each kind of cache."""
    rows = []
    for name, (module, arguments) in CASES.items():
        for cache in ("memory", "disk"):
            data = module(batch_size=1, augment=False, cache=cache, **arguments)
            data.prepare_data()
            data.setup()
            cold, warm = read(data, 1), read(data, epochs)
            rows.append((name, cache, f"{cold:.1f}", f"{warm:.0f}", f"{warm / cold:.0f}"))
    return rows


def windows(rounds: int) -> list[tuple[str, ...]]:
    """A volume at once against sliding windows of half its sides."""
    facts: dict[str, Any] = {"network_args": {"feature_size": 16}, "in_channels": 1, "image_size": (64, 64, 64)}
    whole = Segmenter("resunet3d", **facts).eval()
    sliding = Segmenter("resunet3d", **facts, inference="sliding", roi_size=(64, 64, 64), overlap=0.5).eval()
    batch: Any = {"image": torch.rand(1, 1, 128, 128, 128), "attributes": {}, "id": ["volume"]}
    with torch.inference_mode():
        work = {"whole": partial(whole.infer, batch, "test"), "sliding": partial(sliding.infer, batch, "test")}
        seconds = interleaved(work, rounds)
    megavoxels = 128**3 / 1e6
    first = seconds["whole"]
    return [(name, f"{megavoxels / min(s):.2f}", f"{ratio(first, s):.2f}") for name, s in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5, help="warm passes")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FAIRDIFF_CACHE"] = folder
        print_table(("what", "cache", "cold, volumes/s", "cached, volumes/s", "ratio"), reading(args.epochs))
    print()
    print_table(("inference, 128 x 128 x 128", "million voxels/s", "whole/this"), windows(args.rounds))


if __name__ == "__main__":
    main()
