"""Guided samples under edges: both branches in one pass against two, and DDIM's 20 steps against solvers of few steps.

``python benchmarks/guidance.py [--batch-size 4] [--rounds 5] [--train-steps 1000]``. The passes are timed at the full
size of Stable Diffusion 1.5 on a GPU (random weights cost as much as trained ones) and with the tiny base on a CPU. The
solvers draw from the tiny base, which is first trained on slices of drawn pelvises; adherence is the correlation of the
edges that were asked for with those of the samples, and each sampler has the same requests and seeds.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from controlnet import STEPS, build, make_batch
from timing import interleaved, print_table, ratio
from torch import Tensor

from fairdiff_lightning.data.edges import ScharrEdges, edges_of
from fairdiff_lightning.data.phantoms_pelvis import grid_affine, mr, pelvis
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.diffusion import denoise, gaussian, generators
from fairdiff_lightning.diffusion.guidance import guide
from fairdiff_lightning.modules import ControlNetSynth

SIZE, SLICES = 48, 16
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM (the paper's)": ("DDIMScheduler", {}),
    "DPM-Solver++ 2": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "UniPC 2": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    "DEIS 2": ("DEISMultistepScheduler", {"timestep_spacing": "trailing"}),
}
COUNTS = (4, 6, 8, 10, 20)
EXACT = 100
TOLERANCE = 0.005
"""Adherence that may be lost."""


def sample(module: ControlNetSynth, inputs: tuple[Tensor, Tensor, Tensor], passes: int) -> Tensor:
    """Images of condition, prompts and seeds, the two branches of guidance in one pass or in two."""
    condition, prompts, seeds = inputs
    if passes == 1:
        return module.sample(condition, prompts, seeds)
    negative = module.prompts.negative(module.device).expand_as(prompts)

    def predict(noisy: Tensor, step: Tensor) -> Tensor:
        steps = step.expand(len(noisy))
        branches = [module(noisy, steps, texts, condition).float() for texts in (negative, prompts)]
        return guide(torch.cat(branches), module.hparams["guidance_scale"])

    random, (height, width) = generators(seeds), (side // module.factor for side in module.image_size)
    shape = (len(seeds), module.unet.config.in_channels, height, width)
    start = gaussian(torch.empty(shape, device=module.device), random)
    return module.decode(denoise(module.make_sampler(), predict, start, STEPS, random))


def time_passes(args: argparse.Namespace) -> None:
    """The same samples by one pass of twice the batch, and by two."""
    full_size = args.device == "cuda"
    module = build(full_size, False, args.device).eval()
    rows = []
    for size in args.batch_size:
        batch = make_batch(module, size, args.device)
        inputs = (module.condition(batch), module._prompts_of(batch).detach(), torch.arange(size))
        with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=full_size):
            work = {f"{n}": partial(sample, module, inputs, n) for n in (2, 1)}
            difference = (work["1"]() - work["2"]()).abs().max()
            seconds = interleaved(work, args.rounds)
        times = [f"{median(seconds[n]) / size:.3f}" for n in ("2", "1")]
        rows.append((str(size), *times, f"{ratio(seconds['2'], seconds['1']):.2f}", f"{difference:.1e}"))
    name = "Stable Diffusion 1.5 at 512 pixels, bfloat16" if full_size else "the tiny base at 64 pixels"
    print(f"{name}, {STEPS} DDIM steps on {args.device}\n")
    print_table(("batch", "two passes, s/image", "one pass, s/image", "times as fast", "largest difference"), rows)


def make_slices(count: int, seed: int) -> Sample:
    """Slices through drawn prostates with their edges."""
    rng, images, masks = np.random.default_rng(seed), [], []
    affine = grid_affine((SIZE, SIZE, 9), (4.0, 4.0, 4.0))
    for _ in range(count):
        drawn = pelvis(rng, (SIZE, SIZE, 9), affine)
        images.append(mr(rng, drawn.tissue)[:, :, 4, 0] / 1300)
        masks.append(drawn.targets[0, :, :, 4])
    image = torch.from_numpy(np.stack(images)).float()[:, None].clamp(0, 1)
    mask = torch.from_numpy(np.stack(masks)).long()[:, None]
    edge = edges_of(image, mask, ScharrEdges())
    names = [f"{seed}-{k}" for k in range(count)]
    return {"image": image, "mask": mask, "edge": edge, "attributes": {}, "id": names, "seed": torch.arange(count)}


def train(steps: int, device: str) -> ControlNetSynth:
    torch.manual_seed(0)
    small = {"patch_size": 2, "block_out_channels": (32, 64, 96), "scaling_factor": 1.0}
    facts: dict[str, Any] = {"trained": "all", "in_channels": 1, "image_size": SIZE, "guidance_scale": 2.0}
    module = ControlNetSynth("tiny", small, condition="edge", **facts).to(device).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1)
    data = _on(make_slices(256, seed=1), device)
    for _ in range(steps):
        rows = torch.randint(256, (16,)).tolist()
        picked = {key: data[key][rows] for key in ("image", "mask", "edge")}  # type: ignore[literal-required]
        loss = module.losses({**picked, "attributes": {}, "id": [data["id"][k] for k in rows]})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module.eval()


def adherence(images: Tensor, edges: Tensor) -> float:
    """Mean correlation of the images' edges with those that were asked for."""
    pair = torch.stack([ScharrEdges()(images).flatten(1), edges.flatten(1)])
    pair = pair - pair.mean(-1, keepdim=True)
    return float(torch.cosine_similarity(*pair, dim=-1).mean())


def compare_solvers(args: argparse.Namespace) -> None:
    module, requests = train(args.train_steps, args.device), _on(make_slices(SLICES, seed=2), args.device)
    inputs = (module.condition(requests), module._prompts_of(requests).detach(), requests["seed"])

    def draw(name: str, steps: int) -> Tensor:
        module.hparams["sampler"], module.hparams["sampler_args"] = SOLVERS[name]
        return module.sample(*inputs, num_steps=steps)

    exact = draw("DDIM (the paper's)", EXACT)
    found = {(name, n): draw(name, n) for name in SOLVERS for n in COUNTS}
    scores = {key: adherence(images, requests["edge"]) for key, images in found.items()}
    wanted = scores["DDIM (the paper's)", STEPS]
    print(
        f"\n{SLICES} samples of the tiny base after {args.train_steps} training steps: correlation of their edges with"
    )
    print(f"the ones asked for, and root mean square difference from {EXACT} DDIM steps\n")
    rows = []
    for name in SOLVERS:
        cells = [f"{scores[name, n]:.3f}, {(found[name, n] - exact).square().mean().sqrt():.3f}" for n in COUNTS]
        enough = [n for n in COUNTS if scores[name, n] >= wanted - TOLERANCE]
        rows.append((name, *cells, f"{STEPS / enough[0]:.1f}" if enough else "none"))
    fewer = f"times fewer than {STEPS} of DDIM"
    print_table(("solver", *(f"{n} evaluations" for n in COUNTS), fewer), rows)
    print(f"fewer: at an adherence of {wanted:.3f} - {TOLERANCE}; that of real images is ", end="")
    print(f"{adherence(requests['image'], requests['edge']):.3f}")


def _on(batch: Sample, device: str) -> Any:
    return {k: v.to(device) if isinstance(v, Tensor) and k != "seed" else v for k, v in batch.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-steps", type=int, default=1000)
    chosen = parser.parse_args()
    time_passes(chosen)
    compare_solvers(chosen)
