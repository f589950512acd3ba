"""Our data module feeding a LightningModule that is not ours, with our metric inside and our report at the end."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from fairdiff_lightning import HAM10000DataModule
from fairdiff_lightning.callbacks import FairnessReport
from fairdiff_lightning.data import Sample
from fairdiff_lightning.metrics import EquityScaled
from fairdiff_lightning.metrics.functional import dice_score


class Pixelwise(LightningModule):
    """Logistic regression on colours."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 2, 1))
        self.es_dice = EquityScaled(num_groups=2)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Cross-entropy of the pixels."""
        return nn.functional.cross_entropy(self.layers(batch["image"]), batch["mask"][:, 0])

    def test_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        """What the fairness report asks for."""
        prediction = self.layers(batch["image"]).argmax(1, keepdim=True)
        dice = dice_score(prediction, batch["mask"], num_classes=2)
        self.es_dice.update(dice, batch["attributes"]["sex"])
        self.log("test/es_dice", self.es_dice)
        return {"prediction": prediction, "dice": dice, "iou": dice / (2 - dice)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main(max_epochs: int = 3, output_dir: str = "runs/own_module") -> Trainer:
    """Train, test and report; the trainer holds the metrics."""
    data = HAM10000DataModule(attributes=["sex", "age"], image_size=64, batch_size=16)
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[FairnessReport(output_dir)],
    )
    model = Pixelwise()
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    return trainer


if __name__ == "__main__":
    main()
