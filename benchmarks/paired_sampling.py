"""How many network evaluations does a pair need? Error of the covariance of sampled Gaussian pairs, by scheduler.

``python benchmarks/paired_sampling.py``: for a jointly Gaussian pair (correlation 0.8) the best predictors are linear
and known, and so is what a sampler makes of them: nothing is drawn and nothing is trained, the errors are exact.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from timing import print_table
from torch import Tensor

from fairdiff_lightning.diffusion import sample_pairs

NOISE = {"num_train_timesteps": 1024, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
COVARIANCE = torch.tensor([[0.25, 0.2], [0.2, 0.25]], dtype=torch.float64)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM (the paper's)": ("DDIMScheduler", {"clip_sample": False}),
    "DPM-Solver++ 2": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "DPM-Solver++ 2, even in log SNR": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "DPM-Solver++ 3, even in log SNR": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "solver_order": 3}),
    "UniPC 2": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    "DEIS 2": ("DEISMultistepScheduler", {"timestep_spacing": "trailing"}),
}
STEPS = (8, 16, 32, 64, 256)


def networks(kept: Tensor) -> tuple[Any, Any]:
    """The best predictors of both noises; the target sees the guider's estimate instead of x_t."""

    def weights(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = kept[t.long()].double()
        return a.sqrt(), (1 - a).sqrt(), torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(2, dtype=torch.float64))

    def guider(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        _, spread, precision = weights(t)
        return spread * (precision[0, 0] * x + precision[0, 1] * y)

    def target(y: Tensor, guide: Tensor, t: Tensor) -> Tensor:
        signal, spread, precision = weights(t)
        own, other = (1 - spread**2 * precision[0, 0]) / signal, -(spread**2) * precision[0, 1] / signal
        return spread * (precision[1, 0] * (guide - other * y) / own + precision[1, 1] * y)

    return guider, target


def covariance_error(name: str, arguments: dict[str, Any], steps: int) -> float:
    """Relative error, exact: two unit vectors of noise tell the whole linear way from noise to pairs."""
    scheduler = getattr(diffusers, name)(**NOISE, **arguments)
    unit = torch.eye(2, dtype=torch.float64)
    guider, target = networks(scheduler.alphas_cumprod)
    x0, y0 = sample_pairs(guider, target, x=unit[:, :1], y=unit[:, 1:], scheduler=scheduler, num_steps=steps)
    way = torch.cat([x0, y0], 1).T
    return float((way @ way.T - COVARIANCE).norm() / COVARIANCE.norm())


if __name__ == "__main__":
    errors = {name: [covariance_error(*chosen, steps) for steps in STEPS] for name, chosen in SCHEDULERS.items()}
    rows = [(name, *(f"{error:.4f}" for error in found)) for name, found in errors.items()]
    print_table(("scheduler", *(f"{steps} steps" for steps in STEPS)), rows)
    bar = errors["DDIM (the paper's)"][-1]
    enough = [
        (steps, name)
        for name, found in errors.items()
        for steps, error in zip(STEPS, found, strict=True)
        if error <= bar
    ]
    fewest, name = min(enough)
    print(f"\n{name}: {fewest} steps are as good as {STEPS[-1]} of DDIM, {STEPS[-1] / fewest:.0f} x fewer.")
