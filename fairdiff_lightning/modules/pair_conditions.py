"""What pairs are asked for: groups, some of them hidden in training, and masks to follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.data.seeding import derive_seed

Groups = dict[str, Tensor]


def hide_groups(groups: Groups, share: float) -> Groups:
    """Groups (B,) of each attribute for training: a share of the samples is told none.

    Of several attributes each is hidden in as many samples alone.
    """
    if not groups:
        return groups
    first = next(iter(groups.values()))
    hidden = (torch.rand(len(first), device=first.device) < share).expand(len(groups), -1)
    if len(groups) > 1:
        hidden = hidden | (torch.rand(hidden.shape, device=first.device) < share)
    return {n: g.masked_fill(lost, -1) for (n, g), lost in zip(groups.items(), hidden.unbind(), strict=True)}


def requests_for(
    num: int, groups: Mapping[str, int], known: Mapping[str, int], seed: int, device: torch.device
) -> Sample:
    """Requests for pairs of the same groups, each with a seed of its own.

    Args:
        num: of pairs.
        groups: attribute -> index of the group, -1 or left out for any.
        known: attribute -> number of groups, of the networks.
        seed: that the pairs' own are derived from.
        device: of the networks.

    Raises:
        ValueError: for less than one pair, or a group that the networks do not know.
    """
    if num < 1:
        raise ValueError(f"num={num}; expected is at least 1 pair.")
    for name, group in groups.items():
        if name not in known or not -1 <= group < known[name]:
            raise ValueError(f"groups: {name}={group}; the networks know {dict(known) or 'none'}, and -1 for any.")
    attributes = {name: torch.full((num,), groups.get(name, -1), device=device) for name in known}
    seeds = torch.tensor([derive_seed(seed, k) for k in range(num)])
    return cast(Sample, {"id": [str(k) for k in range(num)], "seed": seeds, "attributes": attributes})


def check_mask(requests: Sample, image_size: tuple[int, int], num_classes: int) -> None:
    """Check the masks that images are asked for.

    Args:
        requests: with ``mask``, which should be (B, 1, H, W) class indices.
        image_size: height and width that the networks were built for, pixels.
        num_classes: the background included.

    Raises:
        ValueError: naming the request, the size or the values found, and those expected.
    """
    mask, names = requests["mask"], requests["id"]
    expected = (len(requests["seed"]), 1, *image_size)
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"request '{names[0]}': the masks of its batch are {tuple(mask.shape)}; expected are {expected}, the size "
            "that the networks were built for. Resize them, or build the module with their image_size."
        )
    strange = (mask != torch.arange(num_classes, device=mask.device).view(-1, 1, 1)).all(1)
    for number in strange.flatten(1).any(1).nonzero()[:1].flatten().tolist():
        found = mask[number, 0][strange[number]].unique().tolist()  # type: ignore[no-untyped-call]
        raise ValueError(
            f"request '{names[number]}': its mask holds {found}; expected are the classes 0 to {num_classes - 1}."
        )
