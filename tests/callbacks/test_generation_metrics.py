import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from callback_fakes import trainer
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from fairdiff_lightning.callbacks import GenerationMetrics
from fairdiff_lightning.metrics import FeatureExtractor, ssim_between

H, W = 12, 14
EXTRACTOR = {"fid", "kid", "mmd", "coverage", "1nna", "nearest_real", "nearest_real_min"}


class Corners(nn.Module):
    """Nine features: the means of the cells of a 3 x 3 grid, over the channels; counts the images it sees."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return nn.functional.adaptive_avg_pool2d(images.mean(1), 3).flatten(1) * self.weight


def images(count, seed):
    return torch.rand(count, 3, H, W, generator=torch.Generator().manual_seed(seed))


class Images(LightningDataModule):
    """Training and validation images; each validation image carries what the module will generate for it."""

    def __init__(self, training, real, generated, batch_size=4):
        super().__init__()
        self.training = [{"id": f"t{i}", "image": image} for i, image in enumerate(training)]
        pairs = zip(real, generated, strict=True)
        self.real = [{"id": f"v{i}", "image": image, "made": made} for i, (image, made) in enumerate(pairs)]
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.training, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.real, batch_size=self.batch_size)


class Generator(LightningModule):
    """Generates what the batch says, for ``budget`` samples of each batch but the last."""

    def __init__(self, budget=4):
        super().__init__()
        self.weight, self.budget = nn.Parameter(torch.zeros(1)), budget

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        count = min(self.budget, len(batch["id"]))
        return {"generated": {"image": batch["made"][:count]} if count else None}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, data, module, *callbacks, **arguments):
    fitter = trainer(folder, *callbacks, max_epochs=1, **arguments)
    fitter.fit(module, data)
    return {name: value.item() for name, value in fitter.callback_metrics.items() if name.startswith("val/")}


def test_a_generator_that_copies_is_close_covering_and_caught(tmp_path):
    """It returns the validation images, the first two of which are training images."""
    real = images(12, seed=0)
    training = torch.cat([real[:2], images(5, seed=1)])
    logged = fit(tmp_path, Images(training, real, real), Generator(), GenerationMetrics(Corners()))
    assert logged.keys() == {f"val/{name}/Corners" for name in EXTRACTOR} | {"val/ssim_between"}
    for name, value in {"fid": 0, "mmd": 0, "coverage": 1, "1nna": 0, "nearest_real_min": 0}.items():
        assert logged[f"val/{name}/Corners"] == pytest.approx(value, abs=1e-5), name
    assert logged["val/nearest_real/Corners"] > 1e-4
    assert logged["val/ssim_between"] == pytest.approx(ssim_between(real).item(), abs=0.05)


def test_values_are_those_of_the_definitions(tmp_path):
    real, made, training = images(11, 0), 0.7 * images(11, 1), images(6, 2)
    logged = fit(tmp_path, Images(training, real, made), Generator(), GenerationMetrics(Corners(), max_real=9))
    network = Corners()
    with torch.no_grad():
        real, made, training = (network(x).double() for x in (real[:9], made, training))

    def apart(a, b):
        return (1 - nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)) / 2

    assert logged["val/mmd/Corners"] == pytest.approx(apart(made, real).min(0).values.mean().item(), rel=1e-4)
    nearest = apart(made, training).min(1).values
    assert logged["val/nearest_real/Corners"] == pytest.approx(nearest.mean().item(), rel=1e-4)
    assert logged["val/nearest_real_min/Corners"] == pytest.approx(nearest.min().item(), rel=1e-4)
    covered = len(set(apart(made, real).argmin(1).tolist())) / 9
    assert logged["val/coverage/Corners"] == pytest.approx(covered)


def test_a_budget_limits_what_is_compared_but_not_the_real_images(tmp_path):
    seen = {}

    class Spy(GenerationMetrics):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen.update(generated=set(self._generated), real=len(self._real))
            super().on_validation_epoch_end(trainer, pl_module)

    data = Images(images(3, 0), images(7, 1), images(7, 2))
    fit(tmp_path, data, Generator(budget=2), Spy(Corners()), num_sanity_val_steps=0)
    assert seen == {"generated": {"v0", "v1", "v4", "v5"}, "real": 7}


def test_each_real_image_passes_the_extractor_once(tmp_path):
    network = Corners()
    data = Images(images(5, 0), images(7, 1), images(7, 2))
    fitter = trainer(tmp_path, GenerationMetrics(network), max_epochs=3)
    fitter.fit(Generator(budget=2), data)
    assert network.seen == 5 + 7 + 3 * 4  # training, validation, and what each of three validations generated


def test_the_extractor_is_no_part_of_the_module(tmp_path):
    module, network = Generator(), Corners()
    average = EMAWeightAveraging()
    fitter = trainer(tmp_path, GenerationMetrics(network), average, max_epochs=1)
    fitter.fit(module, Images(images(5, 0), images(6, 1), images(6, 2)))
    fitter.save_checkpoint(tmp_path / "last.ckpt")
    assert [name for name, _ in module.named_parameters()] == list(module.state_dict()) == ["weight"]
    assert [p is module.weight for group in fitter.optimizers[0].param_groups for p in group["params"]] == [True]
    assert set(dict(average._average_model.module.named_parameters())) == {"weight"}
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == ["weight"]
    assert not any("GenerationMetrics" in name for name in checkpoint["callbacks"])
    assert not network.training


def test_a_validation_without_training_or_samples_logs_what_it_can(tmp_path):
    data = Images(images(3, 0), images(5, 1), images(5, 2))
    validator = trainer(tmp_path, GenerationMetrics(FeatureExtractor(Corners(), name="grid")))
    (logged,) = validator.validate(Generator(), data, verbose=False)
    assert {f"val/{name}/grid" for name in EXTRACTOR - {"nearest_real", "nearest_real_min"}} < logged.keys()
    with pytest.warns(UserWarning, match="generated no sample"):
        (logged,) = validator.validate(Generator(budget=0), data, verbose=False)
    assert not logged


def test_what_is_missing_or_out_of_range_is_named(tmp_path):
    data = Images(images(3, 0), images(5, 1), images(5, 2))
    validator = trainer(tmp_path, GenerationMetrics(Corners()))
    module = Generator()
    module.validation_step = lambda batch, batch_idx: {"prediction": None}
    with pytest.raises(ValueError, match=r"validation_step gave a dict with .*'prediction'.* Missing: 'generated'"):
        validator.validate(module, data)
    module.validation_step = lambda batch, batch_idx: {"generated": {"mask": None}}
    with pytest.raises(ValueError, match=r"'generated' of Generator\.validation_step .* Missing: 'image'"):
        validator.validate(module, data)
    signed = Images(images(3, 0), images(5, 1), 2 * images(5, 2) - 1)
    with pytest.raises(ValueError, match=r"generated by Generator.* in \[-.* expected floating point in \[0, 1\]"):
        validator.validate(Generator(), signed)
    signed = Images(images(3, 0), 2 * images(5, 1) - 1, images(5, 2))
    with pytest.raises(ValueError, match=r"the validation batch: images .* expected floating point in \[0, 1\]"):
        validator.validate(Generator(), signed)


def test_an_extractor_without_weights_stops_the_run_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no Inception weights"):
        trainer(tmp_path, GenerationMetrics()).validate(Generator(), Images(images(1, 0), images(1, 1), images(1, 2)))


def run(folder, **arguments):
    """Odd numbers of images: the sampler repeats one of them for the second process."""
    data = Images(images(5, 0), images(7, 1), 0.8 * images(7, 2), batch_size=2)
    return fit(folder, data, Generator(), GenerationMetrics(Corners(), num_pairs=2), **arguments)


def test_two_processes_log_what_one_does(tmp_path):
    one = run(tmp_path)
    command = [sys.executable, __file__, str(tmp_path / "two.json")]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parent, capture_output=True)
    two = json.loads((tmp_path / "two.json").read_text())
    assert len(one) == len(EXTRACTOR) + 1
    assert two == pytest.approx(one, rel=1e-5, abs=1e-7)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    logged = run(target.parent, strategy="ddp", devices=2)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        target.write_text(json.dumps(logged))
