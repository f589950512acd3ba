"""A sampler's noise levels and the moves between them, down as it steps and up again as resampling asks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from fairdiff_lightning.diffusion.noise import Generators
from fairdiff_lightning.diffusion.schedulers import PREDICTIONS, exact_betas

Noise = Callable[[Tensor], Tensor]
"""Standard normal noise of the shape, type and device of its argument."""

_DIRECT = ("DDPMScheduler", "DDIMScheduler")


class NoiseLevels:
    """The levels 0 (least noise) ... num_steps - 1 of DDPM or DDIM, and -1 for none at all.

    A step is DDIM's with any spread; with ``eta`` 1 it is DDPM's posterior, also between levels that are far apart.
    Factors are computed in float64: float32 loses 1 - a at the least noisy levels.

    Args:
        scheduler: whose levels and prediction type these are.
        num_steps: number of levels.
        eta: noise that a step adds, 1 being as much as DDPM.
        device: of ``steps``.

    Attributes:
        steps: training step of each level (num_steps,), level 0 first.
    """

    def __init__(self, scheduler: Any, num_steps: int, eta: float, device: torch.device) -> None:
        self.eta, self.kind = eta, scheduler.config.prediction_type
        if self.kind not in PREDICTIONS:
            raise ValueError(f"prediction_type {self.kind!r}; expected is epsilon, v_prediction or sample.")
        self.scheduler = deepcopy(scheduler)
        self.scheduler.set_timesteps(num_steps)
        steps = self.scheduler.timesteps.flip(0)
        self.steps = steps.to(device)
        self._kept = [1.0, *self._signal_power(steps)]
        if len(steps) != num_steps or any(lower <= kept for lower, kept in pairwise(self._kept)):
            raise ValueError(
                f"{type(scheduler).__name__} makes {len(steps)} levels of num_steps={num_steps}, or some that are no "
                "noisier than the one before; inpainting needs a level for each step, as DDPM, DDIM, DPM-Solver++ and "
                "UniPC make them."
            )

    def kept(self, level: int) -> float:
        """Share of the signal's power that is left at a level."""
        return self._kept[level + 1]

    def diffuse(self, clean: Tensor, level: int, noise: Tensor) -> Tensor:
        """Noisy samples at a level, of clean ones; at -1 the clean ones."""
        if level < 0:
            return clean
        kept = self.kept(level)
        return clean * sqrt(kept) + noise * sqrt(1 - kept)

    def clean(self, predicted: Tensor, noisy: Tensor, level: int) -> Tensor:
        """The clean samples that a prediction at a level speaks of, not clipped."""
        signal, spread = sqrt(self.kept(level)), sqrt(1 - self.kept(level))
        if self.kind == "epsilon":
            return noisy / signal - predicted * (spread / signal)
        return noisy * signal - predicted * spread if self.kind == "v_prediction" else predicted

    def down(self, clean: Tensor, noisy: Tensor, level: int, noise: Noise) -> Tensor:
        """One reverse step, from a level to the one below.

        Args:
            clean: estimate of the clean samples.
            noisy: samples at ``level``.
            level: 0 or more.
            noise: asked once, also at the last step that adds none, unless ``eta`` is 0.
        """
        kept, lower = self.kept(level), self.kept(level - 1)
        variance = self.eta**2 * (1 - lower) / (1 - kept) * (1 - kept / lower)
        share = sqrt(max(1 - lower - variance, 0.0) / (1 - kept))
        moved = clean * (sqrt(lower) - share * sqrt(kept)) + noisy * share
        return moved + noise(noisy) * sqrt(variance) if self.eta else moved

    def up(self, noisy: Tensor, level: int, noise: Tensor) -> Tensor:
        """One forward step, from a level to the one above."""
        ratio = self.kept(level + 1) / self.kept(level)
        return noisy * sqrt(ratio) + noise * sqrt(1 - ratio)

    def _signal_power(self, steps: Tensor) -> list[float]:
        kept: list[float] = (1 - exact_betas(self.scheduler)).cumprod(0)[steps].tolist()
        return kept


class SolverLevels(NoiseLevels):
    """Levels of a multi-step solver, which remembers earlier estimates; a step up makes it forget them.

    Args:
        scheduler: as above, but with steps of its own.
        num_steps: as above.
        eta: must be 0; what a solver adds is its own setting.
        device: as above.
        generator: one for each sample, for solvers that draw noise and cannot be handed it.
    """

    def __init__(
        self, scheduler: Any, num_steps: int, eta: float, device: torch.device, generator: Generators | None
    ) -> None:
        super().__init__(scheduler, num_steps, eta, device)
        self.scheduler.register_to_config(prediction_type="sample")  # it is given clipped clean estimates
        parameters = inspect.signature(self.scheduler.step).parameters
        self._takes_noise = "variance_noise" in parameters and "sde" in str(self.scheduler.config.get("algorithm_type"))
        draws = "generator" in parameters and "variance_noise" not in parameters
        self._extra = {"generator": list(generator)} if draws and generator is not None else {}
        self._solver: Any = None

    def down(self, clean: Tensor, noisy: Tensor, level: int, noise: Noise) -> Tensor:
        """One step of the solver; arguments as in :meth:`NoiseLevels.down`."""
        if self._solver is None:
            self._solver = deepcopy(self.scheduler)
            self._solver.set_begin_index(len(self.steps) - 1 - level)
        extra = self._extra | ({"variance_noise": noise(noisy)} if self._takes_noise else {})
        moved: Tensor = self._solver.step(clean, self.steps[level], noisy, **extra, return_dict=False)[0]
        return moved

    def up(self, noisy: Tensor, level: int, noise: Tensor) -> Tensor:
        """One forward step; the solver starts anew afterwards."""
        self._solver = None
        return super().up(noisy, level, noise)

    def _signal_power(self, steps: Tensor) -> list[float]:
        sigmas = self.scheduler.sigmas[: len(steps)].double().flip(0)  # of the solver itself, however it spaces them
        kept: list[float] = (1 / (1 + sigmas**2)).tolist()
        return kept


def noise_levels(
    scheduler: Any, num_steps: int, eta: float, device: torch.device, generator: Generators | None = None
) -> NoiseLevels:
    """The levels of a scheduler of diffusers.

    Args:
        scheduler: DDPM, DDIM, or a multi-step solver with variance-preserving noise (DPM-Solver++, UniPC, DEIS).
        num_steps: number of levels.
        eta: noise that DDIM adds on its way; DDPM adds as much as ``eta=1``.
        device: of the chain.
        generator: one for each sample; see :class:`SolverLevels`.

    Raises:
        ValueError: for a scheduler of another kind, or ``eta`` with one that is not DDIM.
    """
    name = type(scheduler).__name__
    if eta and name != "DDIMScheduler":
        raise ValueError(f"eta={eta}: {name} has none; take DDIMScheduler, or eta=0.")
    betas = getattr(scheduler, "betas", None)
    trained = scheduler.config.get("num_train_timesteps")
    if betas is not None and len(betas) != trained:
        raise ValueError(
            f"{name} has num_train_timesteps={trained} but {len(betas)} trained_betas; set num_train_timesteps="
            f"{len(betas)}."
        )
    if name in _DIRECT:
        kind = scheduler.config.get("variance_type", "fixed_small")
        if not kind.startswith("fixed_small"):
            raise ValueError(f"{name} with variance_type={kind!r}; inpainting has the posterior's, 'fixed_small'.")
        return NoiseLevels(scheduler, num_steps, 1.0 if name == "DDPMScheduler" else eta, device)
    preserving = getattr(scheduler, "init_noise_sigma", None) == 1 and not scheduler.config.get("use_flow_sigmas")
    if betas is None or not preserving or not hasattr(scheduler, "set_begin_index"):
        raise ValueError(
            f"{name} cannot inpaint: expected is DDPMScheduler, DDIMScheduler or a multi-step solver with "
            "variance-preserving noise, such as DPMSolverMultistepScheduler or UniPCMultistepScheduler."
        )
    return SolverLevels(scheduler, num_steps, eta, device, generator)
