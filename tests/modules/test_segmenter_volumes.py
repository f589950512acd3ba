"""Segmenters of volumes: surfaces in mm, every network's gradients, and what prostates are stopped and kept by."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from test_segmenter import SMALL, sample, trainer
from torch.utils.data import DataLoader

from fairdiff_lightning import Segmenter
from fairdiff_lightning.data import collate

sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))
from test_build import SMALLEST

PROSTATE = Path(__file__).parents[2] / "configs" / "prostate"


def plate(affine, native_affine, start, **facts):
    """A volume whose image is its mask, one voxel thick, moved by two voxels along the last axis of the file."""
    native = torch.zeros(1, 8, 7, 9, dtype=torch.int64)
    native[:, 3:6, 2:6, 3] = 1
    block = (slice(None), *(slice(s, s + 6) for s in start))
    place = {"affine": affine, "native_affine": native_affine, "native_size": torch.tensor([8, 7, 9])}
    masks = {"image": native.roll(2, -1)[block].float(), "mask": native[block], "native_mask": native}
    return {**masks, **place, **facts}


def test_surface_distances_of_volumes_are_in_mm_of_each_file(monkeypatch, tmp_path):
    """Plates two slices of 5 and of 2.5 mm apart; the slices go along the patient's second axis."""
    start, samples = torch.tensor([2, 1, 1]), []
    for i, thickness in enumerate((5.0, 2.5)):
        native = torch.tensor([[0, 1.5, 0, -30], [0, 0, -thickness, 40], [0.8, 0, 0, 7], [0, 0, 0, 1]]).double()
        affine = native.clone()
        affine[:3, 3] += native[:3, :3] @ start.double()
        samples.append(plate(affine, native, start, id=f"v{i}", attributes={"race": torch.tensor(i)}))
    module = Segmenter(
        "unet", {"channels": (4, 8), "strides": (2,)}, 2, 1, (6, 6, 6), {"race": 2}, surface_metrics=True
    )
    monkeypatch.setattr(module, "infer", lambda batch, stage: torch.cat([1 - batch["image"], batch["image"]], 1))
    run = trainer(tmp_path)
    run.test(module, DataLoader(samples, batch_size=2, collate_fn=collate), verbose=False)
    names = [f"test/{metric}/race/{group}" for metric in ("hd95", "assd", "nsd") for group in (0, 1)]
    found = [float(run.callback_metrics[name]) for name in names]
    assert found == pytest.approx([10, 5, 10, 5, 0, 1], abs=1e-5), "the tolerance is 5 mm"


@pytest.mark.parametrize(("name", "size", "arguments"), [case for case in SMALLEST if len(case[1]) == 3])
def test_networks_for_volumes_learn_from_the_loss(name, size, arguments):
    torch.manual_seed(0)
    module = Segmenter(name, arguments, 3, 2, size).train()
    image = torch.rand(2, 2, *size)
    loss = module.losses({"image": image, "mask": (image[:, :1] * 2.999).long(), "attributes": {}})["loss"]
    assert loss.isfinite()
    loss.backward()
    gradients = {key: p.grad for key, p in module.named_parameters() if p.requires_grad}
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    assert any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("config", ["dmoe", "resunet3d"])
def test_stopping_early_and_the_best_checkpoint_of_prostates_need_no_stage(tmp_path, config):
    settings = yaml.safe_load((PROSTATE / f"{config}.yaml").read_text())
    stop = EarlyStopping(**settings["trainer"]["callbacks"][0]["init_args"])
    module = Segmenter(**SMALL, num_groups={"t_stage": 4}, monitor=settings["model"]["init_args"]["monitor"])
    best = ModelCheckpoint(tmp_path, monitor=module.monitor, mode=module.monitor_mode)
    unknown = [sample(i) | {"attributes": {"t_stage": torch.tensor(-1)}} for i in range(3)]
    run = trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[stop, best])
    loader = DataLoader(unknown, batch_size=3, collate_fn=collate)
    run.fit(module, loader, loader)
    assert run.current_epoch == 3, "nothing was undefined"
    assert best.best_model_score == stop.best_score > 0
    assert Segmenter(**SMALL, num_groups={"t_stage": 4}).monitor == "val/es_dice/t_stage"
    assert Segmenter(**SMALL, monitor="val/loss").monitor_mode == "min"
