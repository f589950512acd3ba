"""Lesions painted into scans: a diffusion that generates inside of a mask and is given what is outside (RePaint)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fairdiff_lightning.diffusion.lesion_box import Box, group_by_shape, lesion_boxes, per_axis
from fairdiff_lightning.diffusion.levels import Noise, NoiseLevels, noise_levels
from fairdiff_lightning.diffusion.noise import gaussian, generators
from fairdiff_lightning.diffusion.visits import check_jumps, check_visits, visit_list

Compose = Literal["before", "after"]
Region = Literal["volume", "lesion"]
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]

MAX_VISITS = 20_000
"""Longest chain that is run without being asked for: four times RePaint's (10, 10) on 300 steps."""

_visit_list = visit_list


@torch.no_grad()
def inpaint(
    network: Network,
    *,
    background: Tensor,
    mask: Tensor,
    scheduler: Any,
    visit_list: Sequence[int] | None = None,
    num_steps: int | None = None,
    jump_length: int = 1,
    jump_n_sample: int = 1,
    condition: Tensor | None = None,
    seeds: Tensor | None = None,
    compose: Compose = "before",
    final_composite: bool = True,
    eta: float = 0.0,
    clip: float | None = 1.0,
    roi: Region = "volume",
    context: int | Sequence[int] = 8,
    stride: int | Sequence[int] = 8,
    max_visits: int = MAX_VISITS,
    noise: Noise | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Generate inside of a mask what fits to the scan around it.

    Lugmayr et al., *RePaint*, CVPR 2022, arXiv:2201.09865, as LeFusion (arXiv:2403.14066) uses it. The volume outside
    of the mask is the background, noised afresh to the level at hand; inside, the network's. Where ``visit_list`` or
    the jumps ask for it, the chain goes back up and down again, so that the two come to agree.

    Args:
        network: (noisy (B, C, *S), step, condition) -> prediction (B, C, *S); step is a scalar tensor on their device.
        background: (B, C, *S) in [-1, 1], any number of channels and spatial axes.
        mask: (B, 1, *S) or (B, C, *S); other than 0 where something is to be generated.
        scheduler: of diffusers, as it was trained: DDPM for ancestral steps, DDIM, or a multi-step solver such as
            DPM-Solver++, which forgets its earlier estimates whenever the chain goes up.
        visit_list: levels in the order of their visits, as :func:`~fairdiff_lightning.diffusion.visits.visit_list`
            makes them, of levels that the scheduler spaces evenly; instead of the next three.
        num_steps: number of levels; that of training steps for the reference's chain.
        jump_length: see :func:`~fairdiff_lightning.diffusion.visits.visit_list`.
        jump_n_sample: likewise.
        condition: (B, ...), handed to the network.
        seeds: (B,) int64, of all noise of each sample; PyTorch's global generator when None.
        compose: when the background is put around the lesion: ``before`` each evaluation at its level, as LeFusion's
            code, or ``after`` each step at the level reached, as its paper.
        final_composite: return the background itself outside of the mask, bit for bit. Without it, ``before`` leaves
            the noise of the least noisy level there, 8.8 HU in LeFusion's code.
        eta: noise that DDIM adds on its way, 1 being as much as DDPM.
        clip: estimates of the clean volume are cut to [-clip, clip]; None for no cut.
        roi: ``lesion`` shows the network each lesion's bounding box with context, not the volume. It costs less; what
            is outside of the box is the background in any case.
        context: voxels around the lesion, for all axes or each, where ``roi="lesion"``; where they reach the borders
            of the volume, the result is that of ``roi="volume"``.
        stride: what the sides of these boxes are multiples of, for all axes or each: how far the network halves them.
        max_visits: longest list of visits that is accepted.
        noise: source of noise, called with a tensor like what it returns, instead of ``seeds``. The order of its calls:
            the start unless given; for each evaluation the background's noise, then the step's; one for each step up.
        start: (B, C, *S) noise to start from; drawn when None.

    Returns:
        (B, C, *S) in the type of ``background``.

    Raises:
        ValueError: for an empty mask, shapes that do not fit, jumps without effect, too many visits, a scheduler that
            cannot, a context below 0, or an unknown option.
    """
    for name, value, known in (("compose", compose, Compose), ("roi", roi, Region)):
        if value not in get_args(known):
            raise ValueError(f"{name}={value!r}; expected is {' or '.join(get_args(known))}.")
    if seeds is not None and noise is not None:
        raise ValueError("seeds and noise are both given; expected is one source of noise.")
    visits = _visits(visit_list, num_steps, jump_length, jump_n_sample, max_visits)
    lesion = _lesion(background, mask)
    per_axis(context, background.dim() - 2, "context")
    _check_lengths(background, condition, seeds, start)

    def run(samples: list[int], boxes: Sequence[Box]) -> Tensor:
        return _chain(
            network,
            _crop(background, samples, boxes),
            _crop(lesion, samples, boxes),
            None if condition is None else condition[samples],
            None if seeds is None else seeds[samples],
            None if start is None else _crop(start, samples, boxes),
            scheduler=scheduler,
            visits=visits,
            compose=compose,
            final_composite=final_composite,
            eta=eta,
            clip=clip,
            noise=noise,
        )

    if roi == "volume":
        whole = tuple(slice(0, size) for size in background.shape[2:])
        return run(list(range(len(background))), [whole] * len(background))
    painted = background.clone()
    boxes = lesion_boxes(lesion.any(1), context, stride)
    for samples in group_by_shape(boxes):
        for sample, crop in zip(samples, run(samples, boxes), strict=True):
            painted[sample][(slice(None), *boxes[sample])] = crop
    return painted


def check_chain(scheduler: Any, num_steps: int, eta: float, jump_length: int = 1, jump_n_sample: int = 1) -> None:
    """Refuse before any training what :func:`inpaint` would refuse after it.

    Raises:
        ValueError: for jumps without effect, too many visits, or a scheduler that cannot.
    """
    check_jumps(num_steps, jump_length, jump_n_sample, MAX_VISITS)
    noise_levels(scheduler, num_steps, eta, torch.device("cpu"))


def _chain(
    network: Network,
    background: Tensor,
    lesion: Tensor,
    condition: Tensor | None,
    seeds: Tensor | None,
    start: Tensor | None,
    *,
    scheduler: Any,
    visits: Sequence[int],
    compose: Compose,
    final_composite: bool,
    eta: float,
    clip: float | None,
    noise: Noise | None,
) -> Tensor:
    """Follow the visits from noise to a volume; arguments as in :func:`inpaint`."""
    own = None if seeds is None else generators(seeds)
    draw = noise or partial(gaussian, generator=own)
    levels = noise_levels(scheduler, visits[0] + 1, eta, background.device, own)
    given = background.float()
    state = draw(given) if start is None else start.to(given)
    for level, then in pairwise(visits):
        if then > level:
            state = levels.up(state, level, draw(state))
            continue
        if compose == "before":
            state = _composed(state, given, lesion, levels, level, draw)
        predicted = network(state, levels.steps[level], condition).to(state)
        clean = levels.clean(predicted, state, level)
        state = levels.down(clean if clip is None else clean.clamp(-clip, clip), state, level, draw)
        if compose == "after":
            state = _composed(state, given, lesion, levels, then, draw)
    painted = state.to(background)
    return torch.where(lesion, painted, background) if final_composite else painted


def _composed(state: Tensor, given: Tensor, lesion: Tensor, levels: NoiseLevels, level: int, draw: Noise) -> Tensor:
    """The state inside of the lesion, and around it what is given, at the noise of a level."""
    around = given if level < 0 else levels.diffuse(given, level, draw(given))
    return torch.where(lesion, state, around)


def _visits(
    listed: Sequence[int] | None, num_steps: int | None, jump_length: int, jump_n_sample: int, most: int
) -> Sequence[int]:
    if listed is not None:
        if num_steps is not None or (jump_length, jump_n_sample) != (1, 1):
            raise ValueError("visit_list is given beside num_steps or jumps; expected is one or the other.")
        check_visits(listed, max(listed, default=-1) + 1, most)
        return listed
    if num_steps is None:
        raise ValueError("neither visit_list nor num_steps is given; num_steps=300 is LeFusion's number of levels.")
    check_jumps(num_steps, jump_length, jump_n_sample, most)
    return _visit_list(num_steps, jump_length, jump_n_sample)


def _lesion(background: Tensor, mask: Tensor) -> Tensor:
    """Where to generate, (B, C, *S) bool."""
    if not background.is_floating_point() or background.dim() < 3:
        raise ValueError(
            f"background is {background.dtype} of shape {tuple(background.shape)}; expected is a floating type and "
            "(B, C, ...) with one spatial axis or more, in [-1, 1]."
        )
    fits = mask.dim() == background.dim() and mask.shape[1] in (1, background.shape[1])
    if not fits or mask.shape[0] != background.shape[0] or mask.shape[2:] != background.shape[2:]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and background {tuple(background.shape)}; expected are the same, or "
            "one channel in the mask."
        )
    lesion = mask != 0
    empty = [sample for sample, found in enumerate(lesion.flatten(1).any(1).tolist()) if not found]
    if empty:
        raise ValueError(
            f"the mask of sample {', '.join(map(str, empty))} is empty, so that nothing is to be generated; leave the "
            "sample out, or check that the mask lies inside of the volume."
        )
    return lesion.expand_as(background)


def _check_lengths(background: Tensor, condition: Tensor | None, seeds: Tensor | None, start: Tensor | None) -> None:
    for name, part in (("condition", condition), ("seeds", seeds)):
        if part is not None and len(part) != len(background):
            raise ValueError(f"{name} is for {len(part)} samples and background has {len(background)}; give one each.")
    if start is not None and start.shape != background.shape:
        raise ValueError(
            f"start has shape {tuple(start.shape)}; expected is that of background, {tuple(background.shape)}."
        )


def _crop(volumes: Tensor, samples: Sequence[int], boxes: Sequence[Box]) -> Tensor:
    return torch.stack([volumes[sample][(slice(None), *boxes[sample])] for sample in samples])
