"""A training step and a batch of samples of ControlNetSynth, eager or compiled, float32 or bfloat16, timed in turns.

On a GPU at the full size of Stable Diffusion 1.5 with random weights (which cost as much as trained ones), on a CPU the
tiny base. `python benchmarks/controlnet.py [--batch-size 2] [--rounds 5] [--skip-compiled]`
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from timing import interleaved, print_table, ratio

from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.modules import ControlNetSynth

CLASSES, STEPS = 3, 20


def write_configurations(folder: Path) -> None:
    """Stable Diffusion 1.5 without weights and without its text encoder, which runs once for each prompt anyway."""
    with torch.device("meta"):
        UNet2DConditionModel(cross_attention_dim=768).save_config(folder / "unet")
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).save_config(folder / "vae")
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    PNDMScheduler(**noise, skip_prk_steps=True, steps_offset=1).save_config(folder / "scheduler")


def build(full_size: bool, compiled: bool, device: str) -> ControlNetSynth:
    facts: dict[str, Any] = {"num_classes": CLASSES, "condition": "colours", "num_steps": STEPS}
    if not full_size:
        small = ControlNetSynth("tiny", trained="all", in_channels=1, image_size=64, **facts)
        return _compiled(small.to(device), compiled)
    with tempfile.TemporaryDirectory() as folder:
        write_configurations(Path(folder))
        with torch.device(device):
            large = ControlNetSynth(folder, pretrained=False, trained="controlnet+decoder", image_size=512, **facts)
    return _compiled(large.to(device), compiled)


def _compiled(module: ControlNetSynth, compiled: bool) -> ControlNetSynth:
    if compiled:
        module.unet.compile()
        module.controlnet.compile()
    return module


def make_batch(module: ControlNetSynth, size: int, device: str) -> Sample:
    shape = (size, module.hparams["in_channels"], *module.image_size)
    return {
        "image": torch.rand(shape, device=device),
        "mask": torch.randint(CLASSES, (size, 1, *module.image_size), device=device),
        "attributes": {},
        "id": [str(i) for i in range(size)],
    }


def candidates(
    module: ControlNetSynth, batch: Sample, device: str, dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    optimizer = torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=1e-5, fused=True)
    requests: Sample = {**batch, "seed": torch.arange(len(batch["id"]))}

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = module.train().losses(batch)["loss"]
        loss.backward()
        optimizer.step()

    def sample() -> None:
        with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            module.eval().generate(requests)

    return {"step": step, "sampling": sample}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="8 on a CPU, 4 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-compiled", action="store_true", help="compiling takes minutes")
    args = parser.parse_args()
    full_size = args.device == "cuda"
    size = args.batch_size or (4 if full_size else 8)
    modes = [False, True]
    if args.skip_compiled or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        print("Compiled runs are left out: " + ("asked for." if args.skip_compiled else "there is no C++ compiler."))
        modes = [False]
    name = "Stable Diffusion 1.5 at 512 pixels" if full_size else "the tiny base at 64 pixels"
    print(f"{name}, batch {size} on {args.device}; sampling is {STEPS} DDIM steps with guidance\n")
    rows, first = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        for compiled in modes:
            torch.manual_seed(0)
            torch.compiler.reset()
            module = build(full_size, compiled, args.device)
            work = candidates(module, make_batch(module, size, args.device), args.device, dtype)
            seconds = interleaved(work, args.rounds, warmup=2)
            first = first or seconds
            what = f"{str(dtype).removeprefix('torch.')}, {'compiled' if compiled else 'eager'}"
            times = [f"{median(seconds[k]) / size:.3f}" for k in work]
            gains = [f"{ratio(first[k], seconds[k]):.2f}" for k in work]
            rows.append((what, *times, *gains))
            del module, work
    print_table(("mode", "step, s/image", "sampling, s/image", "step gain", "sampling gain"), rows)


if __name__ == "__main__":
    main()
