"""From seeds to clouds of outline points and their masks, drawn again where a cloud outlines none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from fairdiff_lightning.data.seeding import derive_seed
from fairdiff_lightning.diffusion import denoise, gaussian, generators
from fairdiff_lightning.networks.point_vae import LATENT_DIM, PointVAE

MAX_DRAWS = 8
"""Clouds that are drawn for a request before it is given up."""

Decoded = tuple[Tensor, dict[int, ValueError]]
"""Masks (B, 1, H, W), and what is wrong with those clouds that have none."""


class UndecodableCloudError(ValueError):
    """Generated clouds that outline no mask.

    Args:
        message: which, and why.
        points: all clouds (B, N, 3) of the batch, in pixels.
    """

    def __init__(self, message: str, points: Tensor) -> None:
        super().__init__(message)
        self.points = points


def float64_device(device: torch.device) -> torch.device:
    """The device, or the CPU for one that has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@torch.no_grad()
def draw_clouds(
    network: PointVAE,
    times: Tensor,
    sampler: Any,
    num_steps: int,
    num_points: int,
    seeds: Tensor,
    group: Tensor | None,
) -> Tensor:
    """Normalised clouds (B, N, 3), float64, each from its own seed.

    The network runs in float64: what rounding does to a sum of float32 depends on the size of the batch, and could move
    a pixel across an outline.

    Args:
        network: with weights in any precision; a copy of it is used.
        times: what it is told about each training step (T,).
        sampler: a new scheduler of diffusers.
        num_steps: of the sampler.
        num_points: N.
        seeds: (B,).
        group: (B,), None without groups.
    """
    device, count, draws = float64_device(times.device), len(seeds), generators(seeds)
    network, times = deepcopy(network).to(device).double(), times.to(device)
    group = None if group is None else group.to(device)
    with torch.autocast(device.type, enabled=False):
        code = torch.empty(count, LATENT_DIM, dtype=torch.float64, device=device)
        latent = network.draw_latent(gaussian(code, draws), group)

        def predict(noisy: Tensor, step: Tensor) -> Tensor:
            predicted: Tensor = network(noisy, times[step.long()].expand(count), latent, group)
            return predicted

        start = gaussian(code.new_empty(count, num_points, 3), draws)
        return denoise(sampler, predict, start, num_steps, draws)


def decode_each(points: Tensor, decode: Callable[[Tensor], Tensor], size: tuple[int, int]) -> Decoded:
    """Decode a batch of clouds, and one by one when there is one at fault; on a device that has float64.

    Args:
        points: (B, N, 3).
        decode: gives masks (B, 1, H, W), or raises ValueError.
        size: height and width of the masks.
    """
    capable = points.to(float64_device(points.device))
    try:
        return decode(capable).to(points.device), {}
    except ValueError:
        masks = torch.zeros(len(points), 1, *size, dtype=torch.int64, device=points.device)
    errors = {}
    for i, cloud in enumerate(capable):
        try:
            masks[i] = decode(cloud[None])[0]
        except ValueError as error:
            errors[i] = error
    return masks, errors


def draw_masks(
    draw: Callable[[Tensor, Tensor | None], Tensor],
    decode: Callable[[Tensor], Decoded],
    seeds: Tensor,
    group: Tensor | None,
    names: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Clouds (B, N, 3) and their masks (B, 1, H, W); one that outlines none is drawn again from the next seed.

    Args:
        draw: gives clouds for seeds (B,) and groups (B,).
        decode: see :func:`decode_each`.
        seeds: of the requests; the further ones are derived from them.
        group: of the requests, None without groups.
        names: of the requests, for the message.

    Raises:
        UndecodableCloudError: when a request has had eight such clouds.
    """
    points = draw(seeds, group)
    masks, errors = decode(points)
    for attempt in range(1, MAX_DRAWS):
        if not errors:
            return points, masks
        failed = torch.tensor(list(errors), device=points.device)
        again = torch.tensor([derive_seed(int(seeds[i]), attempt) for i in errors])
        points[failed] = draw(again, None if group is None else group[failed.to(group.device)])
        masks[failed], remaining = decode(points[failed])
        errors = {int(failed[i]): error for i, error in remaining.items()}
    if errors:
        wanted = ", ".join(repr(names[i]) for i in errors)
        raise UndecodableCloudError(
            f"no mask for {len(errors)} of {len(points)} requests ({wanted}): {MAX_DRAWS} clouds of each outline "
            f"none, the last because: {next(iter(errors.values()))} Train longer, or raise num_steps.",
            points,
        )
    return points, masks
