"""Lesions of several classes painted into scans: by one network at once, or by one network after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fairdiff_lightning.diffusion.inpaint import Network, inpaint
from fairdiff_lightning.diffusion.lesion_channels import merge_classes


def paint_classes(
    networks: Sequence[Network],
    scan: Tensor,
    masks: Tensor,
    condition: Tensor | None,
    seeds: Sequence[Tensor],
    *,
    final_composite: bool = True,
    **chain: Any,
) -> Tensor:
    """Paint each lesion class by its own network or channel.

    A later network has the scan with what the earlier ones painted as its background: where classes touch, it goes on
    from what is there. Each voxel of a lesion is painted by the network of its class and no other.

    Args:
        networks: as of :func:`~fairdiff_lightning.diffusion.inpaint.inpaint`, each for an equal share of the classes,
            in their order: one with a channel for each class, or one for each class.
        scan: (B, 1, *S) in [-1, 1].
        masks: (B, K, *S) bool, as :func:`~fairdiff_lightning.diffusion.lesion_channels.class_masks` makes them.
        condition: (B, K * bins), of which each network gets what is of its classes, or None.
        seeds: (B,) int64 for each network.
        final_composite: leave the voxels outside of all lesions bit for bit as they were.
        **chain: further arguments of :func:`~fairdiff_lightning.diffusion.inpaint.inpaint`.

    Returns:
        (B, 1, *S); a scan without a lesion stays as it is.
    """
    count = len(networks)
    conditions: Sequence[Tensor | None] = [None] * count if condition is None else condition.chunk(count, 1)
    for network, share, own, seed in zip(networks, masks.chunk(count, 1), conditions, seeds, strict=True):
        some = share.flatten(1).any(1).nonzero().flatten()
        if not len(some):
            continue
        before, inside = scan[some], share[some]
        volumes = inpaint(
            network,
            background=before.expand(inside.shape),
            mask=inside.any(1, keepdim=True),
            condition=None if own is None else own[some],
            seeds=seed[some.to(seed.device)],
            final_composite=final_composite,
            **chain,
        )
        painted = merge_classes(volumes, inside, before if final_composite else volumes[:, :1])
        scan = scan.index_copy(0, some, painted.to(scan))
    return scan
