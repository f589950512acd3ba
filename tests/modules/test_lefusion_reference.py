import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from fairdiff_lightning.callbacks import TrainableEMA
from fairdiff_lightning.diffusion import class_masks, generators, lesion_histogram
from fairdiff_lightning.networks.texture_bank import TextureBank

UPDATES = (1, 10, 100, 200)


class Jump(LightningModule):
    """One weight that is 0 in the first step, which the average copies, and 1 from then on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def on_train_batch_start(self, batch, batch_idx):
        self.weight.data.fill_(float(batch_idx > 0))

    def training_step(self, batch, batch_idx):
        return 0 * self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Keep(Callback):
    """A checkpoint after each of the reference's numbers of updates."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx in UPDATES:
            trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")


def test_averages_are_those_of_the_authors_code(reference, tmp_path):
    expected = reference("lefusion")["ema_0.995_from0_to1_after_updates_1_10_100_200"]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TrainableEMA(0.995, warmup=False), Keep(tmp_path)],
        default_root_dir=tmp_path,
    )
    trainer.fit(Jump(), DataLoader(torch.zeros(1 + max(UPDATES)), batch_size=1))
    found = [torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["state_dict"]["weight"].item() for n in UPDATES]
    assert found == pytest.approx(expected, rel=1e-5)


def test_exemplars_are_the_histograms_of_the_published_nodules_from_dark_to_bright(reference):
    """Nodules of the published numbers of voxels, the brightest first, each beside others that nearly look alike."""
    counts = torch.tensor(reference("lefusion")["cluster_exemplar_counts"]["lidc"])
    values = (torch.arange(16) + 0.5) / 8 - 1
    found = []
    for row in counts.flip(0):
        image = values.repeat_interleave(row).view(1, 1, 1, -1, 1)
        found.append(lesion_histogram(image, torch.ones_like(image)).flatten(1))
    expected = counts / counts.sum(1, keepdim=True)
    torch.testing.assert_close(torch.cat(found).flip(0), expected, rtol=1e-5, atol=0)
    moved = 0.01 * (torch.eye(16)[[10]] - torch.eye(16)[[12]])
    beside = [row + sign * moved for row in found for sign in (1, -1)]
    assert all((row >= 0).all() for row in beside)
    bank = TextureBank(3, classes=1, bins=16)
    bank.measure(torch.cat([*beside, *found]))
    torch.testing.assert_close(bank.exemplars, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(bank.centroids, expected, rtol=1e-5, atol=1e-7)


def test_an_exemplar_is_the_histogram_of_the_published_hearts_lesion(reference):
    """Its voxels give the shipped row, each class divided by its own number of voxels: an infarct and its no-reflow."""
    counts = torch.tensor(reference("lefusion")["cluster_exemplar_counts"]["emidec"])
    values = (torch.arange(16) + 0.5) / 8 - 1
    image = torch.cat([values.repeat_interleave(row) for row in counts]).view(1, 1, 1, -1, 1)
    mask = torch.cat([torch.full((int(row.sum()),), 3 + k) for k, row in enumerate(counts)]).view_as(image)
    found = lesion_histogram(image, class_masks(mask, (3, 4))).flatten(1)
    others = torch.eye(32)[[2, 3]] / 2 + torch.eye(32)[[18, 19]] / 2
    bank = TextureBank(2, classes=2, bins=16)
    bank.measure(torch.cat([others, found]))
    expected = (counts / counts.sum(1, keepdim=True)).flatten()
    torch.testing.assert_close(bank.exemplars[1], expected, rtol=1e-6, atol=0)
    drawn = bank.draw("exemplar:1", generators(torch.arange(2)), amount=0.0)
    torch.testing.assert_close(drawn, expected.expand(2, -1), rtol=1e-6, atol=0)
