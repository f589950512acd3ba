"""Samples per second that the data modules deliver, cold and warm, at the sizes of the real data sets.

``python benchmarks/data.py``: writes phantoms of 512 x 664 (FairSeg) and 450 x 600 (HAM10000) in their native layouts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import machine
from torch.utils.data import DataLoader

from fairdiff_lightning.data import HAM10000, FairSeg, FairSegDataModule, HAM10000DataModule, fairseg, ham10000
from fairdiff_lightning.data.native import NativeDataset, to_image_tensor
from fairdiff_lightning.data.phantoms import dermoscopy, slo_fundus
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.data.segmentation import SegmentationDataModule


def write(dataset: NativeDataset, root: Path, count: int) -> None:
    """Write ``count`` phantoms at the size of the real images."""
    for i in range(count):
        random = np.random.default_rng(i)
        if isinstance(dataset, FairSeg):
            image, mask = slo_fundus(random, (512, 664), fairseg.PHANTOM_LOOKS[i % 3])
        else:
            image, mask = dermoscopy(random, (450, 600), ham10000.PHANTOM_LOOKS[i % 5])
        groups = {name: torch.tensor(i % 2) for name in dataset.attributes}
        mask_tensor = torch.from_numpy(mask.astype(np.int64))[None]
        dataset.write(
            root, {"image": to_image_tensor(image), "mask": mask_tensor, "attributes": groups, "id": f"ISIC_{i:07d}"}
        )


def seconds_per_epoch(loader: DataLoader[Sample]) -> float:
    """Time of one pass over a loader."""
    start = time.perf_counter()
    for batch in loader:
        batch["image"].sum()
    return time.perf_counter() - start


def row(name: str, module: type[SegmentationDataModule], root: Path, cache: str, workers: int) -> str:
    """Measure one data module: median of three cold passes and of five warm ones."""
    arguments = {"root": str(root), "image_size": 224, "batch_size": 16, "num_workers": workers}
    cold, warm = [], []
    for repeat in range(3):
        os.environ["FAIRDIFF_CACHE"] = str(root.parent / f"cache-{name}-{cache}-{workers}-{repeat}")
        data = module(**arguments, cache=cache, fractions=(1.0, 0.0, 0.0))
        data.setup()
        loader = data.train_dataloader()
        cold.append(seconds_per_epoch(loader))
        warm += [seconds_per_epoch(loader) for _ in range(2)]
    count = len(data.splits["train"])
    fast, slow = count / float(np.median(warm)), count / float(np.median(cold))
    return f"| {name}, cache={cache}, {workers} workers | {slow:.0f} | {fast:.0f} | {fast / slow:.1f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=96, help="samples of each data set")
    count = parser.parse_args().count
    print(f"{machine()}; {count} samples at 224 x 224, batch 16\n")
    print("| what | cold, samples/s | warm, samples/s | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, module, dataset in (
            ("FairSeg", FairSegDataModule, FairSeg()),
            ("HAM10000", HAM10000DataModule, HAM10000()),
        ):
            root = Path(folder) / name
            write(dataset, root, count)
            for cache, workers in (("memory", 0), ("disk", 0), ("memory", 2)):
                print(row(name, module, root, cache, workers), flush=True)
