"""A module of ours on a plain torchvision-style data set: all it takes are samples of the contract."""

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset

from fairdiff_lightning import DMoESegmenter
from fairdiff_lightning.data import Sample, collate


class Squares(Dataset[Sample]):
    """Bright squares in one clinic's images, dark ones in the other's."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        clinic = index % 2
        mask = torch.zeros(1, 32, 32, dtype=torch.int64)
        top, left = (index * 7) % 20, (index * 5) % 20
        mask[:, top : top + 12, left : left + 12] = 1
        contrast = 0.4 if clinic == 0 else -0.4
        return {
            "image": 0.5 + contrast * mask.float(),
            "mask": mask,
            "attributes": {"clinic": torch.tensor(clinic)},
            "id": f"square-{index}",
        }


def main(max_epochs: int = 5) -> Trainer:
    """Train and validate; the trainer holds the metrics."""
    loaders = [DataLoader(Squares(count), batch_size=8, collate_fn=collate) for count in (64, 16)]
    model = DMoESegmenter(
        network="tiny", num_classes=2, in_channels=1, image_size=32, num_groups={"clinic": 2}, num_experts=4
    )
    trainer = Trainer(max_epochs=max_epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, *loaders)
    return trainer


if __name__ == "__main__":
    print({name: round(float(value), 3) for name, value in main().callback_metrics.items()})
