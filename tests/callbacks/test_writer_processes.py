"""Generated files against what processes do to them: a kill in the middle, other thread counts, many samples."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from callback_fakes import trainer
from lightning.pytorch import Callback
from test_synthetic_dataset_writer import Painter, content, rows

from fairdiff_lightning.callbacks import SyntheticDatasetWriter
from fairdiff_lightning.data import FairSegDataModule, GenerationPlan
from fairdiff_lightning.modules import ControlNetSynth, LeFusionInpaint, PairedGuidedDiffusion, PointDiffusion

BEFORE_THE_KILL = 9
"""Samples: two batches of four, and one of the third."""


def predict(folder, module, *callbacks, batch_size=4, devices=1, **plan):
    data = FairSegDataModule(image_size=(12, 16), batch_size=batch_size, generate=GenerationPlan(**plan))
    strategy = "ddp" if devices > 1 else "auto"
    run = trainer(folder, SyntheticDatasetWriter(str(folder)), *callbacks, devices=devices, strategy=strategy)
    run.predict(module, data)
    return folder


def generate(folder):
    return predict(folder, Painter(), total=15, masks="train", seed=3)


def killed_while_it_writes(folder):
    """Generate until a sample's file has been written beside its place, and not yet been moved there."""
    replace, moved = os.replace, []

    def move(source, target):
        if Path(target).suffix == ".npz":
            if len(moved) == BEFORE_THE_KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            moved.append(target)
        replace(source, target)

    os.replace = move
    generate(folder)


def test_a_run_that_is_killed_while_it_writes_is_resumed_to_the_same_folder(tmp_path):
    whole, killed = generate(tmp_path / "whole"), tmp_path / "killed"
    command = [sys.executable, __file__, "killed", str(killed)]
    run = subprocess.run(command, timeout=180, cwd=Path(__file__).parent, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr[-2000:]
    left = content(killed)
    assert len(left) == BEFORE_THE_KILL
    assert left.items() <= content(whole).items(), "no file is half-written"
    assert len(list(killed.glob(".*.npz.*.part"))) == 1
    assert not (killed / "manifest.csv").exists()
    generate(killed)
    files = [{p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} for folder in (whole, killed)]
    assert files[0] == files[1], "nothing hidden is left either"
    with (killed / "manifest.csv").open(newline="") as stream:
        ids = [row["id"] for row in csv.DictReader(stream)]
    assert len(ids) == len(set(ids)) == 15


@pytest.fixture
def threads():
    """Sets torch's number of threads, which is put back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def outlines(size):
    """A module that was not trained, but whose clouds scatter widely enough to outline something."""
    module = PointDiffusion(image_size=size, num_points=24, num_steps=5, num_groups={"race": 3})
    with torch.no_grad():
        for parameter in module.network.denoiser.layers[-1].parameters():
            parameter.mul_(0.1)
        module.network.prior_mean.weight.normal_()
        module.statistics.scale.mul_(4)
    return module


def images(size):
    small = {"block_out_channels": (8, 16), "attention_head_dim": 2, "norm_num_groups": 4}
    module = ControlNetSynth(
        base="tiny",
        base_args=small,
        trained="all",
        num_classes=3,
        in_channels=1,
        image_size=size,
        num_groups={"race": 3},
        prompt="{group}",
        guidance_scale=2.0,
        num_steps=4,
    )
    for block in (*module.controlnet.controlnet_down_blocks, module.controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)  # so that the condition has an effect before any training
    return module


def pairs(size):
    return PairedGuidedDiffusion(image_size=size, widths=(8, 16), num_steps=3)


def lesions(size):
    module = LeFusionInpaint(image_size=size, width=8, multipliers=(1, 2), num_steps=6, jump_length=2, textures=2)
    module.bank.measure(module.histograms(scans(size)))
    return module


def scans(size):
    random = torch.Generator().manual_seed(0)
    mask = torch.zeros(4, 1, *size, dtype=torch.int64)
    mask[:, :, 4:9, 2:5, 1:4] = 1
    image = (0.3 * torch.rand(mask.shape, generator=random) + 0.5 * mask).clamp(0, 1)
    return {"image": image, "mask": mask, "attributes": {}, "id": list("abcd")}


def followed(size):
    return {"mask": torch.randint(3, (4, 1, *size), generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize(
    ("build", "size", "given"),
    [
        (outlines, (40, 52), lambda size: {}),
        (images, (24, 16), followed),
        (pairs, 16, lambda size: {}),
        (lesions, (16, 8, 6), scans),
    ],
)
def test_another_number_of_threads_makes_the_same_masks_and_images(threads, build, size, given):
    """Sums are taken in another order, which images show far below a grey level; masks do not."""
    module = build(size).eval()
    requests = {"id": list("abcd"), "attributes": {"race": torch.tensor([0, 1, -1, 0])}, **given(size)}
    requests["seed"] = torch.arange(4) + 7
    made = []
    for count in (1, 2):
        threads(count)
        made.append(module.generate(requests))
    one, two = made
    assert one.keys() == two.keys()
    if "mask" in one:
        assert torch.equal(one["mask"], two["mask"])
    if "image" in one:
        assert one["image"].std() > 0.01
        levels = [m["image"].mul(255).round() for m in made]
        assert (levels[0] - levels[1]).abs().max() <= 1


def follow(folder, **arguments):
    """Generate two batches of images with convolutions and attention."""
    torch.manual_seed(0)
    return predict(folder, images((12, 16)), total=8, masks="train", **arguments)


def assert_same_but_for_a_grey_level(one, two):
    assert rows(one) == rows(two)
    assert len(rows(one)) == 8
    for row in rows(one).values():
        with np.load(one / row["file"]) as a, np.load(two / row["file"]) as b:
            assert np.array_equal(a["disc_cup_mask"], b["disc_cup_mask"])
            assert np.abs(a["slo_fundus"].astype(int) - b["slo_fundus"].astype(int)).max() <= 1


def test_files_do_not_depend_on_the_number_of_threads(tmp_path, threads):
    for count in (1, 2):
        threads(count)
        follow(tmp_path / str(count))
    assert_same_but_for_a_grey_level(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_files_do_not_depend_on_the_number_of_processes(tmp_path, threads):
    threads(1)  # another number sums in another order
    command = [sys.executable, __file__, "two", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, timeout=180, cwd=Path(__file__).parent, capture_output=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    follow(tmp_path / "one")
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.npz")} for name in ("one", "two")]
    assert len(files[0]) == 8
    assert files[0] == files[1]
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


class Forgetful(Painter):
    """Keeps no list of what it was asked for."""

    def generate(self, requests):
        made = super().generate(requests)
        self.batches.clear()
        return made


class Resident(Callback):
    """Notes the process's memory, bytes, after so many batches."""

    def __init__(self, batches):
        self.batches, self.found = batches, []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx + 1 in self.batches:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.found.append(pages * os.sysconf("SC_PAGE_SIZE"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the resident memory is read from /proc")
def test_memory_stays_flat_over_ten_thousand_samples(tmp_path):
    """Kept predictions alone would be more: 9,000 times 12 x 16 pixels of 4 bytes and as many labels of 8."""
    memory = Resident((20, 200))
    predict(tmp_path, Forgetful(), memory, batch_size=50, total=10_000)
    assert len(rows(tmp_path)) == 10_000
    early, late = memory.found
    print(f"resident after 1,000 samples {early / 2**20:.1f} MiB, after 10,000 {late / 2**20:.1f} MiB")
    assert late - early < 10 * 2**20


if __name__ == "__main__":
    part, folder = sys.argv[1], Path(sys.argv[2])
    killed_while_it_writes(folder) if part == "killed" else follow(folder, devices=2)
