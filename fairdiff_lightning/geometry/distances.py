"""Distances between point sets and farthest-point sampling, with pytorch3d's signatures and semantics.

pytorch3d's kernels (extra ``pytorch3d``) run them where it is installed and works, torch elsewhere.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Backend = Literal["auto", "torch", "pytorch3d"]
PointReduction = Literal["mean", "sum", "max"]
BatchReduction = Literal["mean", "sum"]
Loss = Tensor | tuple[Tensor, Tensor]

PAIRS_AT_ONCE = 2**24
"""Pairwise distances held in memory at once."""


class KNN(NamedTuple):
    """Nearest neighbours: distances (N, P1, K), indices (N, P1, K), and points (N, P1, K, D) or None."""

    dists: Tensor
    idx: Tensor
    knn: Tensor | None


def knn_points(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    norm: int = 2,
    K: int = 1,  # noqa: N803
    version: int = -1,
    return_nn: bool = False,
    return_sorted: bool = True,
    backend: Backend = "auto",
) -> KNN:
    """K nearest neighbours in ``p2`` of each point of ``p1``; differentiable in the points.

    Args:
        p1: (N, P1, D).
        p2: (N, P2, D).
        lengths1: points of each cloud of ``p1``, (N,); P1 by default.
        lengths2: points of each cloud of ``p2``, (N,); P2 by default.
        norm: 2 for squared Euclidean distances, 1 for sums of absolute differences.
        K: neighbours.
        version: which of pytorch3d's kernels; the torch implementation has one.
        return_nn: return the neighbours themselves too.
        return_sorted: nearest first.
        backend: ``pytorch3d`` or ``torch``; ``auto`` is pytorch3d for float32 where it is installed, torch otherwise.

    Returns:
        Distances, indices and points, zero for neighbours that ``p2`` does not have; distances and indices are zero
        beyond ``lengths1`` too.

    Raises:
        ValueError: for shapes that do not agree, or another norm.
    """
    if p1.ndim != 3 or p2.ndim != 3 or p1.shape[0] != p2.shape[0] or p1.shape[2] != p2.shape[2]:
        raise ValueError(f"p1 and p2 must be (N, P1, D) and (N, P2, D), but are {tuple(p1.shape)}, {tuple(p2.shape)}.")
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, but is {norm}.")
    lengths1, lengths2 = _lengths(p1, lengths1), _lengths(p2, lengths2)
    if ops := _pytorch3d_ops(backend, p1, p2):
        return KNN(*ops.knn_points(p1, p2, lengths1, lengths2, norm, K, version, return_nn, return_sorted))
    missing = torch.arange(K, device=p2.device) >= lengths2[:, None, None]  # (N, 1, K)
    beyond = torch.arange(p1.shape[1], device=p1.device) >= lengths1[:, None]  # (N, P1)
    absent = missing | beyond[..., None]
    idx = _nearest(p1.detach(), p2.detach(), lengths2, norm, K, return_sorted).masked_fill(absent, 0)
    if p2.shape[1] == 0:
        empty = p1.new_zeros(*idx.shape, p1.shape[2])
        return KNN(empty.sum(-1), idx, empty if return_nn else None)
    neighbours = _gather(p2, idx)
    offset = p1[:, :, None] - neighbours
    dists = (offset.abs() if norm == 1 else offset.square()).sum(-1).masked_fill(absent, 0)
    return KNN(dists, idx, neighbours.masked_fill(missing[..., None], 0) if return_nn else None)


def chamfer_distance(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    x_normals: Tensor | None = None,
    y_normals: Tensor | None = None,
    weights: Tensor | None = None,
    batch_reduction: BatchReduction | None = "mean",
    point_reduction: PointReduction | None = "mean",
    norm: int = 2,
    single_directional: bool = False,
    abs_cosine: bool = True,
    backend: Backend = "auto",
) -> tuple[Loss, Loss | None]:
    """Chamfer distance: from points of ``x`` to the nearest of ``y``, and from points of ``y`` to the nearest of ``x``.

    Args:
        x: (N, P1, D).
        y: (N, P2, D).
        x_lengths: points of each cloud of ``x``, (N,); P1 by default.
        y_lengths: points of each cloud of ``y``, (N,); P2 by default.
        x_normals: (N, P1, D).
        y_normals: (N, P2, D).
        weights: of the clouds, (N,), not negative; a mean over the batch divides by their sum.
        batch_reduction: over the clouds; None leaves a value for each.
        point_reduction: over the points; ``max`` is the Hausdorff distance, None leaves a value for each point and
            asks for no ``batch_reduction``.
        norm: 2 for squared Euclidean distances, 1 for sums of absolute differences.
        single_directional: from ``x`` to ``y`` alone.
        abs_cosine: take opposite normals as equal.
        backend: of :func:`knn_points`.

    Returns:
        The distance and, with normals, one minus the cosine between the normals of nearest points (None without).
        Each is a scalar, (N,) without ``batch_reduction``, or, without ``point_reduction``, the pair (N, P1) and
        (N, P2), of which ``single_directional`` leaves the first.

    Raises:
        ValueError: for shapes or reductions that do not agree, a negative weight or a length beyond the points.
    """
    _check_reductions(batch_reduction, point_reduction, x_normals is not None or y_normals is not None)
    if weights is not None and (weights.shape != x.shape[:1] or bool((weights < 0).any())):
        raise ValueError(f"weights must be non-negative, of shape ({x.shape[0]},), but are {weights}.")
    clouds = _Cloud(x, _lengths(x, x_lengths), x_normals), _Cloud(y, _lengths(y, y_lengths), y_normals)
    directions = [clouds] if single_directional else [clouds, clouds[::-1]]
    terms = [_to_nearest(start, end, norm, abs_cosine, backend) for start, end in directions]
    lengths = [start.lengths for start, _ in directions]
    distances = _reduced([pair[0] for pair in terms], lengths, weights, point_reduction, batch_reduction)
    cosines = [pair[1] for pair in terms if pair[1] is not None]
    return distances, _reduced(cosines, lengths, weights, point_reduction, batch_reduction) if cosines else None


def sample_farthest_points(
    points: Tensor,
    lengths: Tensor | None = None,
    K: int | list[int] | Tensor = 50,  # noqa: N803
    random_start_point: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Points chosen one after the other, each the farthest from those chosen before; ties go to the first.

    Args:
        points: (N, P, D).
        lengths: points of each cloud, (N,); P by default.
        K: points to choose, one number for all clouds or one for each.
        random_start_point: start at a random point (of torch's global generator), not at the first.
        backend: ``pytorch3d`` or ``torch``; ``auto`` is pytorch3d for float32 where it is installed, torch otherwise.

    Returns:
        The chosen points (N, max K, D), zero where a cloud has or gives fewer, and their indices, -1 there.

    Raises:
        ValueError: for lengths or K that do not fit the points.
    """
    known = _lengths(points, lengths)
    wanted = torch.full_like(known, K) if isinstance(K, int) else torch.as_tensor(K, device=points.device)
    if wanted.shape != known.shape:
        raise ValueError(f"K must be one number or one for each of {len(points)} clouds, but is {K}.")
    if ops := _pytorch3d_ops(backend, points):
        number = K if isinstance(K, int) else wanted
        sampled, idx = ops.sample_farthest_points(points, known, number, random_start_point)
        return sampled, idx
    most = K if isinstance(K, int) else int(wanted.max())
    located, batch = points.detach(), torch.arange(len(points), device=points.device)
    last = (known * torch.rand(len(points), device=points.device)).long() if random_start_point else known * 0
    beyond = torch.arange(points.shape[1], device=points.device) >= known[:, None]
    closest = points.new_full(points.shape[:2], torch.inf).masked_fill_(beyond, -torch.inf)
    chosen = [last]
    for _ in range(1, most):
        torch.minimum(closest, (located - located[batch, last][:, None]).square().sum(-1), out=closest)
        last = closest.argmax(1)
        chosen.append(last)
    idx = torch.stack(chosen, 1)[:, :most]
    absent = torch.arange(idx.shape[1], device=idx.device) >= torch.minimum(wanted, known)[:, None]
    sampled = points.gather(1, idx[..., None].expand(-1, -1, points.shape[2])).masked_fill(absent[..., None], 0)
    return sampled, idx.masked_fill(absent, -1)


def _nearest(p1: Tensor, p2: Tensor, lengths2: Tensor, norm: int, k: int, in_order: bool) -> Tensor:
    """Indices (N, P1, K) of the nearest points, a bounded number of pairs at a time; 0 beyond P2."""
    beyond = torch.arange(p2.shape[1], device=p2.device) >= lengths2[:, None, None]  # (N, 1, P2)
    found = min(k, p2.shape[1])
    rows = max(1, PAIRS_AT_ONCE // max(1, p2.shape[0] * p2.shape[1]))
    indices = []
    for part in torch.split(p1, rows, 1):
        distances = torch.cdist(part, p2, p=norm, compute_mode="donot_use_mm_for_euclid_dist")
        indices.append(distances.masked_fill(beyond, torch.inf).topk(found, -1, largest=False, sorted=in_order).indices)
    return F.pad(torch.cat(indices, 1), (0, k - found))


def _gather(points: Tensor, idx: Tensor) -> Tensor:
    """Points (N, P1, K, D) of (N, P2, D) at indices (N, P1, K)."""
    flat = idx.flatten(1)[..., None].expand(-1, -1, points.shape[2])
    return points.gather(1, flat).view(*idx.shape, -1)


class _Cloud(NamedTuple):
    points: Tensor
    lengths: Tensor
    normals: Tensor | None


def _to_nearest(
    start: _Cloud, end: _Cloud, norm: int, abs_cosine: bool, backend: Backend
) -> tuple[Tensor, Tensor | None]:
    """From each point to the nearest of ``end``: distance, and that of the normals, (N, P1), 0 beyond the lengths."""
    nearest = knn_points(start.points, end.points, start.lengths, end.lengths, norm, backend=backend)
    if start.normals is None or end.normals is None:
        return nearest.dists[..., 0], None
    cosine = F.cosine_similarity(start.normals, _gather(end.normals, nearest.idx)[:, :, 0], dim=2, eps=1e-6)
    beyond = torch.arange(cosine.shape[1], device=cosine.device) >= start.lengths[:, None]
    return nearest.dists[..., 0], (1 - (cosine.abs() if abs_cosine else cosine)).masked_fill(beyond, 0)


def _reduced(
    terms: list[Tensor],
    lengths: list[Tensor],
    weights: Tensor | None,
    points: PointReduction | None,
    batch: BatchReduction | None,
) -> Loss:
    """Terms (N, P) of one or two directions, reduced over points, added (the larger taken for ``max``), over clouds."""
    if weights is not None:
        terms = [term * weights[:, None] for term in terms]
    if points is None:
        return (terms[0], terms[1]) if len(terms) == 2 else terms[0]
    if points == "max":
        clouds = torch.stack([term.amax(1) for term in terms]).amax(0)
    else:
        sums = [term.sum(1) for term in terms]
        means = [total / length.clamp(min=1) for total, length in zip(sums, lengths, strict=True)]
        clouds = torch.stack(means if points == "mean" else sums).sum(0)
    if batch is None:
        return clouds
    if batch == "sum" or len(clouds) == 0:
        return clouds.sum()
    if weights is None:
        return clouds.mean()
    return clouds.sum() / torch.where(weights.sum() > 0, weights.sum(), 1)


def _check_reductions(batch: str | None, points: str | None, normals: bool) -> None:
    if batch not in (None, *get_args(BatchReduction)):
        raise ValueError(f"batch_reduction must be None or one of {get_args(BatchReduction)}, but is {batch!r}.")
    if points not in (None, *get_args(PointReduction)):
        raise ValueError(f"point_reduction must be None or one of {get_args(PointReduction)}, but is {points!r}.")
    if points is None and batch is not None:
        raise ValueError(f"batch_reduction must be None when point_reduction is, but is {batch!r}.")
    if points == "max" and normals:
        raise ValueError("point_reduction='max' has no meaning for normals; leave x_normals and y_normals out.")


def _lengths(points: Tensor, lengths: Tensor | None) -> Tensor:
    """Points of each cloud (N,): the given ones, checked, or all."""
    if points.ndim != 3:
        raise ValueError(f"points must have shape (N, P, D), but have {tuple(points.shape)}.")
    if lengths is None:
        return torch.full((points.shape[0],), points.shape[1], dtype=torch.int64, device=points.device)
    if lengths.shape != points.shape[:1] or bool((lengths > points.shape[1]).any()):
        raise ValueError(
            f"lengths must have shape ({points.shape[0]},) and not exceed {points.shape[1]}, but are {lengths}."
        )
    return lengths.to(points.device, torch.int64)


@cache
def _load_pytorch3d(device: str) -> ModuleType | str:
    """pytorch3d's operations, or why they do not work on that type of device."""
    if find_spec("pytorch3d") is None:
        return "pytorch3d is not installed: pip install 'fairdiff_lightning[pytorch3d]'"
    try:
        ops = import_module("pytorch3d.ops")
        probe = torch.zeros(1, 1, 3, device=device)
        ops.knn_points(probe, probe)
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, or without kernels for the device
        reason = f"the installed pytorch3d does not work on '{device}' ({error})"
        warnings.warn(f"{reason}; torch computes instead.", stacklevel=2)
        return reason
    return ops


def _pytorch3d_ops(backend: Backend, *points: Tensor) -> ModuleType | None:
    """pytorch3d's operations, which know float32 alone, or None where torch computes."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, but is {backend!r}.")
    if backend == "torch":
        return None
    ops = _load_pytorch3d(points[0].device.type)
    fitting = all(cloud.dtype == torch.float32 for cloud in points)
    if backend == "auto":
        return ops if fitting and not isinstance(ops, str) else None
    if isinstance(ops, str):
        raise ModuleNotFoundError(f"backend='pytorch3d': {ops}.")
    if not fitting:
        raise ValueError(f"pytorch3d takes float32 points, but got {[cloud.dtype for cloud in points]}; use 'torch'.")
    return ops
