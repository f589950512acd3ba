"""Clouds a second by sampler, steps and batch, against one cloud at a time in 100 ancestral steps, with their quality.

The baseline runs in float32 as the reference does, ours in float64. `python benchmarks/point_sampling.py [--rounds 3]`
trains the demo's model first (minutes), or takes it from `--checkpoint runs/demo/fairseg_points/.../best.ckpt`.
Qualities are means over draws of as many clouds as there are in the test split, with their standard errors.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import median

import torch
from timing import interleaved, print_table, ratio
from torch import Tensor

from fairdiff_lightning.cli import build_cli
from fairdiff_lightning.data.seeding import derive_seed
from fairdiff_lightning.diffusion import build_scheduler, gaussian, generators
from fairdiff_lightning.metrics.generation import generation_scores
from fairdiff_lightning.modules import PointDiffusion

CONFIG = Path(__file__).parents[1] / "configs" / "demo" / "fairseg_points.yaml"
SAMPLERS = {"DDPM": "DDPMScheduler", "DDIM": "DDIMScheduler", "DPM-Solver++": "DPMSolverMultistepScheduler"}
SETTINGS = [
    ("DDPM", 100, 64),
    ("DDIM", 20, 64),
    *(("DPM-Solver++", n, b) for n in (20, 10, 7, 5) for b in (1, 8, 64)),
]


def held_out_clouds(checkpoint: str | None, device: str) -> tuple[PointDiffusion, Tensor, Tensor]:
    """The demo's model, and its test clouds and their groups."""
    cli = build_cli(["--config", str(CONFIG)], run=False)
    data = cli.datamodule
    if checkpoint is None:
        cli.trainer.fit(cli.model, data)
        model = cli.model
    else:
        data.prepare_data()
        data.setup()
        model = PointDiffusion.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    batches = list(data.test_dataloader())
    groups = torch.cat([batch["attributes"][model.attribute] for batch in batches])
    return model.eval().to(device), torch.cat([batch["points"] for batch in batches]).to(device), groups.to(device)


@torch.no_grad()
def one_by_one(model: PointDiffusion, groups: Tensor, seed: int = 0) -> Tensor:
    """100 ancestral steps for each cloud by itself, in float32."""
    network, sampler = model.network, build_scheduler("DDPMScheduler", like=model.scheduler)
    sampler.set_timesteps(len(model.times))
    clouds = []
    for i, group in enumerate(groups):
        draws = generators(torch.tensor([derive_seed(seed, i)]))
        latent = network.draw_latent(gaussian(torch.empty(1, 256, device=group.device), draws), group[None])
        points = gaussian(latent.new_empty(1, model.num_points, 3), draws)
        for step in sampler.timesteps:
            prediction = network(points, model.times[step][None], latent, group[None])
            points = sampler.step(prediction, step, points, generator=draws).prev_sample
        clouds.append(points)
    return model.statistics.denormalize(torch.cat(clouds))


def sample(model: PointDiffusion, groups: Tensor, name: str, steps: int, batch: int, seed: int = 0) -> Tensor:
    model.sampler = SAMPLERS[name]
    return model.sample(len(groups), groups, seed=seed, num_steps=steps, batch_size=batch)


def quality(model: PointDiffusion, draws: list[Tensor], real: Tensor) -> list[str]:
    """Matching distance, coverage and 1-NNA: means and standard errors over the draws."""
    scores = [
        generation_scores(model.statistics.normalize(c), model.statistics.normalize(real), "chamfer") for c in draws
    ]
    columns = [torch.stack([s[key] for s in scores]).double() for key in ("mmd", "coverage", "1nna")]
    return [f"{float(c.mean()):.3f} ± {float(c.std() / len(c) ** 0.5):.3f}" for c in columns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="of a model trained with the demo's configuration")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timed", type=int, default=64, help="clouds in a round; the baseline makes an eighth of them")
    parser.add_argument("--draws", type=int, default=5, help="sets of clouds that qualities are means over")
    args = parser.parse_args()
    model, real, groups = held_out_clouds(args.checkpoint, args.device)
    timed, few = groups[: args.timed], groups[: max(args.timed // 8, 1)]
    candidates = {setting: partial(sample, model, timed, *setting) for setting in SETTINGS}
    seconds = interleaved({"baseline": partial(one_by_one, model, few), **candidates}, args.rounds)
    share = len(few) / len(timed)
    rows = []
    for setting in ("baseline", *SETTINGS):
        draws = [
            one_by_one(model, groups, seed) if setting == "baseline" else sample(model, groups, *setting, seed)
            for seed in range(args.draws)
        ]
        count = len(few) if setting == "baseline" else len(timed)
        name = ("DDPM, one by one", "100", "1") if setting == "baseline" else tuple(map(str, setting))
        faster = 1.0 if setting == "baseline" else ratio(seconds["baseline"], seconds[setting]) / share
        rate = f"{count / median(seconds[setting]):.1f}"
        rows.append((*name, rate, f"{faster:.1f}", *quality(model, draws, real)))
    print(f"{model.num_points} points, {len(real)} held-out clouds of the phantom\n")
    print_table(("sampler", "steps", "batch", "clouds/s", "ratio", "MMD", "coverage", "1-NNA"), rows)


if __name__ == "__main__":
    main()
