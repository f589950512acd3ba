import numpy as np
import pytest
import torch
from callback_fakes import Data, Foreign, sample, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.colors import to_rgb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fairdiff_lightning.callbacks import GeneratedGrid
from fairdiff_lightning.callbacks.figures import PALETTE, class_colours, picture_grid
from fairdiff_lightning.data import FairSegDataModule
from fairdiff_lightning.modules import ControlNetSynth, PointDiffusion

SAMPLES = [sample(f"s{i}", race, (0.5, 0.5)) for i, race in enumerate((0, 1, -1, 2, 0))]


class Generator(Foreign):
    attribute = "race"

    def __init__(self, *keys, count=3):
        super().__init__()
        self.keys, self.count = keys, count

    def validation_step(self, batch, batch_idx):
        if batch_idx:
            return {"generated": None}
        made = {"image": batch["image"] * 0.5, "mask": batch["mask"], "other mask": 1 - batch["mask"].clamp(max=1)}
        return {
            "generated": {"id": batch["id"][: self.count]}
            | {k.removeprefix("other "): made[k][: self.count] for k in self.keys}
        }


def logged(folder, module):
    run = trainer(folder, GeneratedGrid(num_samples=4), logger=TensorBoardLogger(folder))
    run.validate(module, Data(SAMPLES, batch_size=4), verbose=False)
    events = EventAccumulator(run.log_dir).Reload()
    return events.Images("val/generated") if "val/generated" in events.Tags()["images"] else []


@pytest.mark.parametrize(
    ("keys", "rows"), [(("image", "mask"), 3), (("image", "other mask"), 4), (("image",), 2), (("other mask",), 2)]
)
def test_one_picture_of_the_first_batch(tmp_path, keys, rows, monkeypatch):
    from fairdiff_lightning.callbacks import generated_grid

    drawn = []
    monkeypatch.setattr(generated_grid, "picture_grid", lambda *a: drawn.append(a) or picture_grid(*a))
    (picture,) = logged(tmp_path, Generator(*keys))
    assert (picture.width, picture.height) > (100, 50)
    ((lines, titles),) = drawn
    assert titles == ["Asian", "Black", "unknown"]
    assert len(lines) == rows
    assert all(len(pictures) == 3 for pictures in lines.values())
    if "image" in keys:
        torch.testing.assert_close(lines["generated"][1], SAMPLES[1]["image"] * 0.5)


def test_nothing_generated_nothing_drawn(tmp_path):
    class Silent(Foreign):
        def validation_step(self, batch, batch_idx):
            return {"generated": None}

    assert logged(tmp_path, Silent()) == []


def test_a_module_that_generates_nothing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Foreign.validation_step gave .*Missing: 'generated'"):
        logged(tmp_path, Foreign())


def test_classes_have_colours_and_the_background_is_white():
    painted = class_colours(torch.tensor([[[0, 1], [2, len(PALETTE) + 1]]]))
    assert painted.shape == (3, 2, 2)
    expected = [[to_rgb("white"), to_rgb(PALETTE[0])], [to_rgb(PALETTE[1]), to_rgb(PALETTE[0])]]
    assert np.allclose(painted.transpose(1, 2, 0), expected)


def outlines():
    points = {"image_size": 32, "num_points": 32, "num_steps": 4, "decoder": "closing"}
    return PointDiffusion(**points, num_groups={"race": 3}, num_validation_samples=3), {"num_points": 32}


def images():
    small = {"block_out_channels": (8, 16), "attention_head_dim": 2, "norm_num_groups": 4}
    network = {"base": "tiny", "base_args": small, "trained": "all", "prompt": "{group}", "num_groups": {"race": 3}}
    shapes = {"num_classes": 3, "in_channels": 1, "image_size": 32}
    return ControlNetSynth(**network, **shapes, num_steps=2, num_validation_samples=3), {}


@pytest.mark.parametrize(
    ("build", "rows"),
    [(outlines, {"real mask", "generated mask"}), (images, {"real", "real mask", "generated"})],
)
def test_what_generators_make_while_validating_is_drawn(tmp_path, build, rows, monkeypatch):
    from fairdiff_lightning.callbacks import generated_grid

    drawn = []
    monkeypatch.setattr(generated_grid, "picture_grid", lambda *a: drawn.append(a) or picture_grid(*a))
    module, more = build()
    data = FairSegDataModule(image_size=32, batch_size=4, on_error="skip", **more)
    logger = TensorBoardLogger(tmp_path)
    run = trainer(tmp_path, GeneratedGrid(num_samples=8), logger=logger, limit_val_batches=2)
    run.validate(module, data, verbose=False)
    (picture,) = EventAccumulator(logger.log_dir).Reload().Images("val/generated")
    assert (picture.width, picture.height) > (100, 50)
    ((lines, titles),) = drawn
    assert lines.keys() == rows
    assert all(len(pictures) == len(titles) == 3 for pictures in lines.values())
    assert set(titles) <= {"Asian", "Black", "White", "unknown"}
    batch = next(iter(data.val_dataloader()))
    for name in rows - {"real mask"}:
        assert all(picture.shape[-2:] == (32, 32) for picture in lines[name])
    for picture, mask in zip(lines["real mask"], batch["mask"][:3], strict=True):
        assert np.array_equal(picture, class_colours(mask))
