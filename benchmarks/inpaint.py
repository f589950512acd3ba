"""How many evaluations does a painted lesion need? LeFusion's sampler and shorter ones, on the lung phantom.

``python benchmarks/inpaint.py [--train-seconds 240] [--lesions 9] [--checkpoint best.ckpt]`` trains a small model, or
takes any trained ``LeFusionInpaint``. Lesions that it has not seen are painted anew, each with its own mask, histogram
and surroundings. Means over lesions, with standard errors:

- histogram distance: half the sum of differences between the histogram asked for and the one obtained, 0 to 1, and how
  much larger it is than that of the first sampler (the authors') for the same lesion.
- boundary: mean absolute difference between neighbouring voxels of which one is in the lesion and one is not, as a
  multiple of that of the real volume: 1 is as real, above it a seam shows, below it the border is blurred.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from timing import interleaved, print_table
from torch import Tensor

from fairdiff_lightning.data.phantoms_3d import TEXTURES, lung_roi
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.modules import LeFusionInpaint
from fairdiff_lightning.networks.lesion_unet import LesionUNet

DDPM = {"sampler": "DDPMScheduler", "eta": 0.0, "sampler_args": None}
DDIM = {"sampler": "DDIMScheduler", "eta": 1.0, "sampler_args": None}
SOLVER = {"sampler": "DPMSolverMultistepScheduler", "eta": 0.0, "sampler_args": None}
EVEN = SOLVER | {"sampler_args": {"use_lu_lambdas": True}}
SAMPLERS: dict[str, dict[str, Any]] = {
    "the authors': 300 levels, (5, 5)": DDPM | {"num_steps": 300, "jump_length": 5, "jump_n_sample": 5},
    "300 levels": DDPM | {"num_steps": 300},
    "DDIM, 50 levels, (5, 2)": DDIM | {"num_steps": 50, "jump_length": 5, "jump_n_sample": 2},
    "DDIM, 50 levels": DDIM | {"num_steps": 50},
    "DDIM, 25 levels": DDIM | {"num_steps": 25},
    "DDIM, 25 levels, no noise": DDIM | {"num_steps": 25, "eta": 0.0},
    "DPM-Solver++, 20 levels": SOLVER | {"num_steps": 20},
    "DPM-Solver++, 20 levels even in log SNR": EVEN | {"num_steps": 20},
    "DPM-Solver++, 10 levels": SOLVER | {"num_steps": 10},
}
NO_JUMPS = {"jump_length": 1, "jump_n_sample": 1}


def draw_lesions(count: int, seed: int, size: tuple[int, int, int]) -> Sample:
    """Blocks of lung with a nodule each, of the three textures in turn; HU -1000 to 400 become 0 to 1."""
    rng = np.random.default_rng(seed)
    drawn = [lung_roi(rng, size, k % len(TEXTURES)) for k in range(count)]
    image, mask = (torch.from_numpy(np.stack(arrays))[:, None] for arrays in zip(*drawn, strict=True))
    scaled = ((image + 1000) / 1400).clamp(0, 1)
    return {"image": scaled, "mask": mask.long(), "attributes": {}, "id": [str(k) for k in range(count)]}


def train(args: argparse.Namespace) -> LeFusionInpaint:
    """A model with narrow attention, trained for a time; the rate falls to zero within it."""
    torch.manual_seed(0)
    shape = {"width": args.width, "multipliers": (1, 2, 4)}
    module = LeFusionInpaint(args.size, **shape, condition_dropout=0.0)
    module.network = LesionUNet(**shape, heads=2, head_dim=16)
    module = module.to(args.device).train()
    data = draw_lesions(args.training_lesions, 1, module.image_size)
    images, masks = data["image"].to(args.device), data["mask"].to(args.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=args.lr)
    start, steps, spent, total = time.perf_counter(), 0, 0.0, 0.0
    while spent < args.train_seconds:
        optimizer.param_groups[0]["lr"] = args.lr * (1 - spent / args.train_seconds)
        chosen = torch.randint(len(images), (args.batch_size,), device=args.device)
        batch: Any = {"image": images[chosen], "mask": masks[chosen]}
        loss = module.losses(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        total, steps, spent = total + loss.item(), steps + 1, time.perf_counter() - start
    print(f"trained for {steps} steps of {args.batch_size} lesions, mean loss {total / steps:.3f}")
    return module


class Painting:
    """What a sampler makes of held-out lesions, and how often it asks the network."""

    def __init__(self, module: LeFusionInpaint, settings: dict[str, Any], lesions: Sample) -> None:
        self.module, self.lesions = module, lesions
        self.settings = NO_JUMPS | settings
        self.evaluations, self.image = 0, lesions["image"]

    def paint(self) -> None:
        """Paint all lesions in one batch, each from a seed of its own."""
        self.module.settings |= self.settings | {"final_composite": True, "guidance_scale": 1.0, "roi": "volume"}
        counted = self.module.network.register_forward_hook(self._count)
        seeds = torch.arange(len(self.lesions["id"]))
        asked = self.module.histograms(self.lesions) if self.module.hparams["conditioning"] else None
        self.image = self.module.paint(self.lesions["image"], self.lesions["mask"], asked, seeds)
        counted.remove()

    def pair(self) -> tuple[Tensor, Tensor]:
        """Painted and real volumes."""
        return self.image, self.lesions["image"]

    def distances(self) -> Tensor:
        """Histogram distance of each lesion."""
        found, asked = (self.module.histograms({**self.lesions, "image": i}) for i in self.pair())
        return (found - asked).abs().sum(1) / 2

    def boundaries(self) -> Tensor:
        """Difference across each lesion's border, as a multiple of the real one."""
        painted, real = (border_difference(image, self.lesions["mask"] > 0) for image in self.pair())
        return painted / real

    def _count(self, *_: object) -> None:
        self.evaluations += 1


def border_difference(image: Tensor, lesion: Tensor) -> Tensor:
    """Mean absolute difference (B,) of neighbours along the three axes of which one is in the lesion."""
    total, pairs = image.new_zeros(len(image)), image.new_zeros(len(image))
    for axis in (2, 3, 4):
        crosses = lesion.diff(dim=axis)
        total += (image.diff(dim=axis).abs() * crosses).flatten(1).sum(1)
        pairs += crosses.flatten(1).sum(1)
    return total / pairs


def mean_and_error(values: Tensor) -> str:
    error = f" ± {values.std() / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}"


def scale(module: LeFusionInpaint, lesions: Sample) -> str:
    """Histogram distance to other lesions of the same textures, as if a sampler had seen no more than the texture."""
    others = module.histograms(draw_lesions(len(lesions["id"]), 3, module.image_size)).to(module.device)
    return mean_and_error((module.histograms(lesions) - others).abs().sum(1) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="of a LeFusionInpaint that was trained on lung blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs=3, default=(24, 24, 16), help="height, width, depth")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--train-seconds", type=float, default=240)
    parser.add_argument("--training-lesions", type=int, default=240)
    parser.add_argument("--lesions", type=int, default=9, help="held-out ones")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=tuple(SAMPLERS), metavar="NAME")
    args = parser.parse_args()
    if args.checkpoint:
        module = LeFusionInpaint.load_from_checkpoint(args.checkpoint, map_location="cpu", weights_only=True)
    else:
        module = train(args)
    module = module.to(args.device).eval()
    lesions = draw_lesions(args.lesions, 2, module.image_size)
    lesions = {**lesions, "image": lesions["image"].to(args.device), "mask": lesions["mask"].to(args.device)}
    made = {name: Painting(module, SAMPLERS[name], lesions) for name in args.samplers}
    seconds = interleaved({name: painting.paint for name, painting in made.items()}, rounds=1, warmup=0)
    rows, first = [], made[args.samplers[0]]
    for name, painting in made.items():
        fewer, more = first.evaluations / painting.evaluations, painting.distances() - first.distances()
        each = f"{seconds[name][0] / args.lesions:.2f}"
        quality = [mean_and_error(values) for values in (painting.distances(), more, painting.boundaries())]
        rows.append((name, str(painting.evaluations), f"{fewer:.1f}", each, *quality))
    size = " x ".join(map(str, module.image_size))
    print(f"{args.lesions} held-out lesions in blocks of {size} voxels")
    print(f"histogram distance to other lesions of the same textures: {scale(module, lesions)}\n")
    columns = ("histogram distance", "more than the first", "boundary")
    print_table(("sampler", "evaluations", "times fewer", "s/volume", *columns), rows)


if __name__ == "__main__":
    main()
