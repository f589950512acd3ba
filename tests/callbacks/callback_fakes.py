"""Modules and data with known outputs, that share nothing with the package's own."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

NAN = float("nan")
H, W = 5, 7


def square(top, left, side):
    mask = torch.zeros(1, H, W, dtype=torch.int64)
    mask[:, top : top + side, left : left + side] = 1
    return mask


def sample(name, race, dice, iou=None, **more):
    """A sample that carries what the module will return for it."""
    base = {
        "id": name,
        "image": torch.rand(3, H, W),
        "mask": square(1, 1, 3),
        "prediction": square(1, 2, 3),
        "attributes": {"race": torch.tensor(race)},
        "dice": torch.tensor(dice),
        "iou": torch.tensor(dice if iou is None else iou),
    }
    return base | more


class Data(LightningDataModule):
    """Named groups and classes; White has no sample."""

    classes = ("background", "rim", "cup")
    attribute_groups = {"race": ["Asian", "Black", "White"]}

    def __init__(self, samples, batch_size=2):
        super().__init__()
        self.samples, self.batch_size = samples, batch_size

    def counts(self):
        return {"train": {"race": {"Asian": 11, "Black": 22, "White": 0}}, "test": {"race": {"Asian": 2, "Black": 2}}}

    def _loader(self):
        return DataLoader(self.samples, batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


class Foreign(LightningModule):
    """Returns what the batch says that it predicts."""

    def __init__(self, rate=0.5):
        super().__init__()
        self.save_hyperparameters()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        return {name: batch[name] for name in ("prediction", "dice", "iou")}

    def test_step(self, batch, batch_idx):
        self.log("test/dice", batch["dice"].nanmean(), batch_size=len(batch["id"]))
        self.log("other", 1.0, batch_size=len(batch["id"]))
        return {name: batch[name] for name in ("prediction", "dice", "iou")}

    def predict_step(self, batch, batch_idx):
        return {"mask": batch["prediction"], "id": batch["id"]}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder, *callbacks, **arguments):
    defaults = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    defaults |= {"enable_progress_bar": False, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return Trainer(**(defaults | arguments), callbacks=list(callbacks))
