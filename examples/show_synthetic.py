"""Draws real and synthetic samples and the synthetic ones' masks, two of each group, into a picture.

A group without synthetic samples shows its real ones with their own masks.

``python examples/show_synthetic.py runs/fairdiff/controlnet/synthetic --output runs/fairdiff/samples.png``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fairdiff_lightning.callbacks.figures import class_colours, picture_grid
from fairdiff_lightning.data import DBTDataModule, FairSegDataModule, PictureFrame, SegmentationDataset
from fairdiff_lightning.data.native import Record, atomic_path

MODULES = {"fairseg": FairSegDataModule, "dbt": DBTDataModule}


def main(
    synthetic: str,
    output: str,
    root: str | None = None,
    attribute: str = "race",
    dataset: str = "fairseg",
    per_group: int = 2,
) -> None:
    """Draw ``per_group`` columns for each group, beside real samples of others where it has none."""
    data = MODULES[dataset](root, [attribute], synthetic=[synthetic])
    data.prepare_data()
    data.setup()

    def pick(made: bool) -> dict[int, list[Record]]:
        records = [r for r in data.splits["train"] if r.synthetic == made]
        return {g: [r for r in records if r.attributes[attribute] == g][:per_group] for g in range(len(names))}

    names = data.attribute_groups[attribute]
    real, made = pick(made=False), pick(made=True)
    anyone = [r for r in data.splits["train"] if not r.synthetic][:per_group]
    pairs = [pair for g in made for pair in zip(real[g] or anyone, made[g] or real[g], strict=False)]
    size = data.dataset.read_mask(next(b for _, b in pairs if b.synthetic)).shape
    frame = PictureFrame((size[0], size[1]), data.frame.crop)
    left, right = (SegmentationDataset(data.dataset, side, [attribute], frame) for side in zip(*pairs, strict=True))
    rows = {
        "real": [sample["image"] for sample in left],
        "mask": [class_colours(sample["mask"]) for sample in right],
        "synthetic": [s["image"] if s["synthetic"] else torch.ones_like(s["image"]) for s in right],
    }
    titles = [names[int(s["attributes"][attribute])] + ("" if s["synthetic"] else ", none made") for s in right]
    with atomic_path(Path(output)) as path:
        picture_grid(rows, titles).savefig(path, dpi=160, format="png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("synthetic", help="folder of synthetic samples")
    parser.add_argument("--output", required=True, help="picture to write, .png")
    parser.add_argument("--root", help="folder of the real data; the phantom when left out")
    parser.add_argument("--attribute", default="race")
    parser.add_argument("--dataset", choices=sorted(MODULES), default="fairseg")
    main(**vars(parser.parse_args()))
