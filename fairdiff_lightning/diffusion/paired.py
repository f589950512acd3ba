"""Two diffusion processes of which one guides the other (PIG), along any scheduler of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fairdiff_lightning.diffusion.noise import Generators, gaussian
from fairdiff_lightning.diffusion.sampling import set_steps, step_arguments
from fairdiff_lightning.diffusion.schedulers import add_noise, clean_estimate

Guide = Literal["raw", "clamped", "binary", "soft"]
Order = Literal["x_first", "y_first"]
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
Transform = Callable[[Tensor], Tensor]
Watch = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]

_TRANSFORMS: dict[str, Transform] = {
    "raw": lambda clean: clean,
    "clamped": lambda clean: clean.clamp(-1, 1),
    "binary": lambda clean: torch.where(clean > 0, 1.0, -1.0).to(clean),
    "soft": lambda clean: torch.tanh(2 * clean),
}


def guide_transform(guide: Guide | Transform) -> Transform:
    """What becomes of the guider's estimate of its clean variable before the target sees it.

    ``raw`` is the estimate, which is hundreds of units large at the noisiest steps; ``clamped`` to [-1, 1]; ``binary``
    -1 or 1, cut at 0; ``soft`` a smooth cut, tanh(2 x). A function is taken as it is.

    Raises:
        ValueError: for another name.
    """
    if callable(guide):
        return guide
    if guide not in _TRANSFORMS:
        raise ValueError(f"guide {guide!r}; expected is {', '.join(get_args(Guide))}, or a function.")
    return _TRANSFORMS[guide]


@torch.no_grad()
def sample_pairs(
    guider: Network,
    target: Network,
    *,
    x: Tensor,
    y: Tensor,
    scheduler: Any,
    num_steps: int,
    guide: Guide | Transform = "raw",
    eta: float = 0.0,
    order: Order = "x_first",
    generator: Generators | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw pairs of two variables that belong together.

    Zhang et al., *Paired Image Generation with Diffusion-Guided Diffusion Models*, MICCAI 2025, Algorithm 2. In each
    step the guider denoises x seeing the noisy y, and the target denoises y seeing what x will be by that prediction.

    Args:
        guider: (x_t, y_t, t) -> prediction for x_t; t is a scalar tensor on their device.
        target: (y_t, guide, t) -> prediction for y_t.
        x: standard normal noise (B, ...).
        y: standard normal noise (B, ...).
        scheduler: of diffusers, with a variance-preserving schedule; each variable goes along a copy of its own, so
            that multi-step solvers (DPM-Solver++, UniPC) keep two histories.
        num_steps: of the sampler; each costs one evaluation of either network.
        guide: see :func:`guide_transform`; x itself always goes on from the raw prediction.
        eta: noise that DDIM adds on its way, 1 being as much as DDPM.
        order: ``y_first`` swaps the roles: the guider denoises y and the target x.
        generator: one for each sample, for schedulers that draw noise; the guider's variable draws first.
        watch: called in each step with (t, x_t, y_t, x0, y0), the last two as estimated; nothing of this is kept here.

    Returns:
        x0 (B, ...) and y0 (B, ...).

    Raises:
        ValueError: for ``eta`` with a scheduler that has none, a step that is no whole number, or an unknown order.
    """
    if order not in get_args(Order):
        raise ValueError(f"order {order!r}; expected is {' or '.join(get_args(Order))}.")
    swapped, transform = order == "y_first", guide_transform(guide)
    first, second = (y, x) if swapped else (x, y)
    chain, other = (_Chain(scheduler, num_steps, eta, generator, first) for _ in range(2))
    first, second = chain.start(first), other.start(second)
    for step in chain.steps:
        seen, its = chain.network_input(first, step), other.network_input(second, step)
        predicted = guider(seen, its, step)
        clean = chain.clean(predicted, seen, step)
        answer = target(its, transform(clean), step)
        if watch is not None:
            states, estimates = [seen, its], [clean, other.clean(answer, its, step)]
            watch(step, *(states[::-1] if swapped else states), *(estimates[::-1] if swapped else estimates))
        first, second = chain.step(predicted, step, first), other.step(answer, step, second)
    return (second, first) if swapped else (first, second)


@torch.no_grad()
def sample_guided(
    target: Network,
    *,
    guide: Tensor,
    y: Tensor,
    scheduler: Any,
    num_steps: int,
    eta: float = 0.0,
    generator: Generators | None = None,
) -> Tensor:
    """Draw the target's variable for a given guide (B, ...), such as an image for a mask; the guider is not needed.

    Arguments, return value and errors as in :func:`sample_pairs`.
    """
    chain = _Chain(scheduler, num_steps, eta, generator, y)
    y = chain.start(y)
    for step in chain.steps:
        y = chain.step(target(chain.network_input(y, step), guide, step), step, y)
    return y


@torch.no_grad()
def sample_guide(
    guider: Network,
    *,
    x: Tensor,
    y0: Tensor,
    scheduler: Any,
    num_steps: int,
    eta: float = 0.0,
    generator: Generators | None = None,
) -> Tensor:
    """Draw the guider's variable for a given clean partner, such as a mask for an image; the target is not needed.

    An approximation: the partner is noised afresh in each step, whatever x has become, so that x follows it less
    closely than it would in a pair. Noise on the way (``eta=1``) helps.

    Args:
        guider: as in :func:`sample_pairs`.
        x: standard normal noise (B, ...).
        y0: the clean partner (B, ...).
        scheduler: as in :func:`sample_pairs`.
        num_steps: of the sampler, each one evaluation.
        eta: as in :func:`sample_pairs`.
        generator: one for each sample; PyTorch's global one when None.

    Returns:
        x0 (B, ...).

    Raises:
        ValueError: as :func:`sample_pairs`.
    """
    chain = _Chain(scheduler, num_steps, eta, generator, x)
    x = chain.start(x)
    for step in chain.steps:
        partner = add_noise(chain.scheduler, y0, gaussian(y0, generator), step.long().expand(len(y0)))
        x = chain.step(guider(chain.network_input(x, step), partner, step), step, x)
    return x


class _Chain:
    """One variable's way along a scheduler of its own."""

    def __init__(self, scheduler: Any, num_steps: int, eta: float, generator: Generators | None, like: Tensor) -> None:
        self.scheduler = deepcopy(scheduler)
        set_steps(self.scheduler, num_steps, like.device)
        if self.steps.is_floating_point() and bool((self.steps != self.steps.round()).any()):
            raise ValueError(
                f"{type(scheduler).__name__} samples between training steps; give it timestep_spacing='leading' or "
                "'trailing'."
            )
        self.extra = step_arguments(scheduler, eta, generator)

    @property
    def steps(self) -> Tensor:
        steps: Tensor = self.scheduler.timesteps
        return steps

    def start(self, noise: Tensor) -> Tensor:
        started: Tensor = noise * self.scheduler.init_noise_sigma
        return started

    def network_input(self, state: Tensor, step: Tensor) -> Tensor:
        scaled: Tensor = self.scheduler.scale_model_input(state, step)
        return scaled

    def clean(self, predicted: Tensor, noisy: Tensor, step: Tensor) -> Tensor:
        return clean_estimate(self.scheduler, predicted, noisy, step.long().expand(len(noisy)))

    def step(self, predicted: Tensor, step: Tensor, state: Tensor) -> Tensor:
        moved: Tensor = self.scheduler.step(predicted, step, state, **self.extra, return_dict=False)[0]
        return moved
