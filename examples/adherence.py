"""How well synthetic images show their masks: a segmenter's Dice in them, beside that in real test images, by group.

``python examples/adherence.py runs/fairdiff/controlnet/synthetic --segmenter runs/fairdiff/real/.../last.ckpt``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader

from fairdiff_lightning.data import FairSegDataModule, collate
from fairdiff_lightning.data.native import Record
from fairdiff_lightning.modules.adherence import MaskJudge


def main(
    synthetic: Sequence[str], segmenter: str, root: str | None = None, attribute: str = "race", image_size: int = 64
) -> list[tuple[str, str, int, float]]:
    """Print the mean Dice over samples and classes for each kind of samples and group, and return these rows."""
    data = FairSegDataModule(root, [attribute], image_size=image_size, synthetic=list(synthetic))
    data.prepare_data()
    data.setup()
    judge = MaskJudge(segmenter, data.num_classes, data.in_channels)
    made = [record for record in data.splits["train"] if record.synthetic]
    rows = []
    for kind, records in (("real test images", data.splits["test"]), ("synthetic images", made)):
        groups = torch.tensor([record.attributes[attribute] for record in records])
        dice = scores(judge, data, records)
        for index, name in enumerate(data.attribute_groups[attribute]):
            if (groups == index).any():
                rows.append((kind, name, int((groups == index).sum()), float(dice[groups == index].nanmean())))
        rows.append((kind, "all", len(records), float(dice.nanmean())))
    for kind, name, count, score in rows:
        print(f"{kind:18}{name:10}{count:6}  {score:.3f}")
    return rows


def scores(judge: MaskJudge, data: FairSegDataModule, records: Sequence[Record]) -> torch.Tensor:
    """Dice (N,) of each sample, mean over its classes."""
    loader = DataLoader(data.make_dataset(records), batch_size=16, collate_fn=collate)
    return torch.cat([judge(batch).nanmean(1) for batch in loader])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("synthetic", nargs="+", help="folders of synthetic samples")
    parser.add_argument("--segmenter", required=True, help="checkpoint of a Segmenter that was trained on real images")
    parser.add_argument("--root", help="folder of the real data; the phantom when left out")
    parser.add_argument("--attribute", default="race")
    parser.add_argument("--image-size", type=int, default=64, help="pixels, as the segmenter saw them")
    main(**vars(parser.parse_args()))
