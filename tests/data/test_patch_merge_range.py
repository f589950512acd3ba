import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from fairdiff_lightning.data import PatchMerge
from fairdiff_lightning.data.busi import BUSIDataModule

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


class Watcher(LightningModule):
    """Notes the smallest and largest value of each image, by the stage that shows it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = {}

    def note(self, batch):
        low, high = batch["image"].flatten(1).aminmax(dim=1)
        stage = str(self.trainer.state.stage.value)
        self.seen.setdefault(stage, []).extend(zip(low.tolist(), high.tolist(), strict=True))
        return self.weight * batch["image"].mean()

    def training_step(self, batch, batch_idx):
        return self.note(batch)

    def validation_step(self, batch, batch_idx):
        self.note(batch)

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def ranges(merge):
    """Stage -> (smallest, largest) of every image that Lightning gives a module in it."""
    data = BUSIDataModule(image_size=(24, 32), batch_size=4, augment=False, merge=merge)
    watcher = Watcher()
    trainer = Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=2, num_sanity_val_steps=1, **QUIET)
    trainer.fit(watcher, data)
    trainer.test(watcher, data, verbose=False)
    trainer.predict(watcher, data, return_predictions=False)
    assert set(watcher.seen) == {"sanity_check", "train", "validate", "test", "predict"}
    return watcher.seen


def test_a_joint_range_is_that_of_every_stage():
    for stage, found in ranges(PatchMerge(1.0, 8, num_synthetic=0, joint_range=(-1, 1))).items():
        torch.testing.assert_close(torch.tensor(found), torch.tensor([-1.0, 1.0]).expand(len(found), 2), msg=stage)


def test_without_a_joint_range_every_stage_sees_the_images_as_they_are():
    for stage, found in ranges(PatchMerge(1.0, 8, num_synthetic=0)).items():
        assert min(low for low, _ in found) >= 0, stage
        assert all(high - low > 0.3 for low, high in found), stage


def test_what_has_no_images_is_left_as_it_is():
    request = {"mask": torch.zeros(1, 1, 8, 8).long(), "id": ["a"]}
    assert PatchMerge(joint_range=(-1, 1)).rescale(request) is request
