"""Draws generated lesions into a picture: the scan before, the mask, the scan after; two of each folder.

``python examples/show_lesions.py runs/lefusion/n_prime/synthetic --output runs/lefusion/samples.png``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fairdiff_lightning.callbacks.figures import class_colours, picture_grid
from fairdiff_lightning.callbacks.slices import flat
from fairdiff_lightning.data import EmidecDataModule, LIDCDataModule, VolumeDataModule, VolumeDataset
from fairdiff_lightning.data.native import Record, atomic_path
from fairdiff_lightning.data.resample import move
from fairdiff_lightning.data.scan_list import SCAN

MODULES: dict[str, type[VolumeDataModule]] = {"lidc": LIDCDataModule, "emidec": EmidecDataModule}


def main(
    folders: list[str],
    output: str,
    root: str | None = None,
    dataset: str = "lidc",
    count: int = 2,
    scans: str | None = None,
) -> None:
    """Draw ``count`` columns for each folder of generated samples."""
    data = MODULES[dataset](root=root)
    data.prepare_data()
    reader = data.dataset
    known = [*reader.index(data.folder).records, *reader.backgrounds(data.folder)]
    whole = data.scans(Path(scans)) if scans else []
    real = {record.id: record for record in known} | {scan.source or scan.id: scan for scan in whole}
    columns: list[list[Tensor]] = []
    titles: list[str] = []
    for folder in map(Path, folders):
        for record in reader.index(folder).records[:count]:
            columns.append(triple(reader, real[str(record.source)], record))
            titles.append(folder.parent.name)
    before, mask, after = zip(*columns, strict=True)
    rows = {"before": before, "mask": [class_colours(one) for one in mask], "after": after}
    with atomic_path(Path(output)) as path:
        picture_grid(rows, titles).savefig(path, dpi=160, format="png")


def triple(reader: VolumeDataset, source: Record, made: Record) -> list[Tensor]:
    """The slice through the middle of the lesion, (1, H, W) each: before, mask, after."""
    image, labels = reader.read_volumes(made)
    scan = reader.read_scan(source.files[SCAN]) if SCAN in source.files else reader.read_image(source)
    mask = torch.from_numpy(labels.array).long()[None]
    affines = (torch.from_numpy(volume.affine) for volume in (scan, image))
    before = move(torch.from_numpy(reader.window.to_unit(scan.array))[None], *affines, image.shape, "bilinear")
    after = torch.from_numpy(reader.window.to_unit(image.array))[None]
    return [flat(volume, mask) for volume in (before, mask, after)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", help="folders of generated samples")
    parser.add_argument("--output", required=True, help="picture to write, .png")
    parser.add_argument("--root", help="folder of the real data; the phantom when left out")
    parser.add_argument("--dataset", choices=sorted(MODULES), default="lidc")
    parser.add_argument("--scans", help="folder of whole scans that lesions were put into")
    parser.add_argument("--count", type=int, default=2, help="columns of each folder")
    main(**vars(parser.parse_args()))
