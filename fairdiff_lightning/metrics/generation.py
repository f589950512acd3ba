"""Exact comparisons of generated with real samples by the matrix of their distances, on plain tensors."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 2**20
"""Distances worked on at a time on a CPU: 8 MiB of float64, which its allocator reuses."""

Distance = Literal["cosine", "euclidean", "chamfer"]


def cosine_distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances (1 - cos) / 2 between all rows, as FairDiff measures them; a zero row is 0.5 away from any other.

    Args:
        a: (N, D) features.
        b: (M, D) features.

    Returns:
        (N, M) in [0, 1]; worked out in float64 (float32 on MPS), in the features' dtype.

    Raises:
        ValueError: a set is empty, is not of that shape, or holds NaN or infinity.
    """

    def block(x: Tensor, y: Tensor) -> Tensor:
        return ((1 - F.normalize(x) @ F.normalize(y).T) / 2).clamp(0, 1)

    return _by_rows(*_checked_sets(a, b, dim=2), block)


def euclidean_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, M) between all rows; arguments and errors as :func:`cosine_distances`."""
    return _by_rows(*_checked_sets(a, b, dim=2), torch.cdist)


def chamfer_distances(a: Tensor, b: Tensor) -> Tensor:
    """Chamfer distances between all clouds: squared distances to the nearest point, averaged, both directions summed.

    Args:
        a: (N, P, 3) clouds.
        b: (M, Q, 3) clouds.

    Returns:
        (N, M), at least 0, in the squared unit of the points; worked out in float64 (float32 on MPS).

    Raises:
        ValueError: a set is empty, is not of that shape, or holds NaN or infinity.
    """
    a, b = _checked_sets(a, b, dim=3)
    center = b.mean((0, 1), dtype=_exact(b))
    x, y = a.to(center) - center, b.to(center) - center
    # |x - y|^2 = <(-2x, |x|^2, 1), (y, 1, |y|^2)>: one product gives all squared distances of a block.
    left = torch.cat([-2 * x, x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1])], -1)
    right = torch.cat([y, torch.ones_like(y[..., :1]), y.square().sum(-1, keepdim=True)], -1).mT
    pair, size = a.shape[1] * b.shape[1], _block(a)
    columns = max(1, min(len(b), size // pair))
    rows = max(1, size // (columns * pair))

    def block(left: Tensor, right: Tensor) -> Tensor:
        squares = left[:, None] @ right
        return (squares.amin(-1).mean(-1) + squares.amin(-2).mean(-1)).clamp(min=0)

    strips = [torch.cat([block(i, j) for j in torch.split(right, columns)], 1) for i in torch.split(left, rows)]
    return torch.cat(strips).to(a.dtype)


def minimum_matching_distance(distances: Tensor, reference_behaviour: bool = False) -> Tensor:
    """Mean over the real samples of the distance to the nearest generated one (MMD); lower is better.

    Achlioptas et al., *Learning Representations and Generative Models for 3D Point Clouds*, ICML 2018. Not the maximum
    mean discrepancy, which shares the abbreviation.

    Args:
        distances: (G, R), rows generated, columns real.
        reference_behaviour: FairDiff's code swaps the roles: mean over the generated of the distance to the nearest
            real one.

    Raises:
        ValueError: the matrix is not of that shape, empty, or holds NaN or infinity.
    """
    distances = _checked_distances(distances)
    return distances.amin(1 if reference_behaviour else 0).mean()


def coverage(distances: Tensor, reference_behaviour: bool = False) -> Tensor:
    """Fraction of the real samples that are the nearest one of at least one generated sample (COV); 1 is best.

    Of real samples at the same smallest distance all count, so that the order of the samples does not matter.

    Args:
        distances: (G, R), rows generated, columns real.
        reference_behaviour: FairDiff's code swaps the roles: fraction of the generated that are nearest to a real one.

    Raises:
        ValueError: the matrix is not of that shape, empty, or holds NaN or infinity.
    """
    distances = _checked_distances(distances)
    distances = distances.mT if reference_behaviour else distances
    return (distances == distances.amin(1, keepdim=True)).any(0).to(distances.dtype).mean()


def one_nearest_neighbour_accuracy(generated_generated: Tensor, generated_real: Tensor, real_real: Tensor) -> Tensor:
    """Leave-one-out accuracy of telling generated from real by the nearest other sample (1-NNA); 0.5 is best.

    Lopez-Paz and Oquab, *Revisiting Classifier Two-Sample Tests*, ICLR 2017. Near 1 the sets lie apart, near 0 one
    copies the other. A sample whose nearest ones are of both kinds, at the same distance, counts half.

    Args:
        generated_generated: (G, G); the diagonal is not looked at.
        generated_real: (G, R), rows generated, columns real.
        real_real: (R, R); the diagonal is not looked at.

    Raises:
        ValueError: a matrix is not of that shape, empty, or holds NaN or infinity.
    """
    between = _checked_distances(generated_real)
    correct = []
    for within, across in ((generated_generated, between), (real_real, between.mT)):
        if within.shape != (len(across), len(across)):
            raise ValueError(
                f"1-NNA: distances within a set have shape {tuple(within.shape)}, expected {(len(across),) * 2}: "
                f"those between generated and real are {tuple(between.shape)}."
            )
        itself = torch.eye(len(across), dtype=torch.bool, device=within.device)
        same = _checked_distances(within).masked_fill(itself, torch.inf).amin(1)
        other = across.amin(1)
        correct.append((same < other).to(between.dtype) + (same == other).to(between.dtype) / 2)
    return torch.cat(correct).mean()


def nearest_real_distance(distances: Tensor) -> Tensor:
    """Distance (G,) of each generated sample to the nearest real one; 0 is a copy, a sign of memorisation.

    Args:
        distances: (G, R), rows generated, columns real (those that the generator was trained on).

    Raises:
        ValueError: the matrix is not of that shape, empty, or holds NaN or infinity.
    """
    return _checked_distances(distances).amin(1)


def generation_scores(
    generated: Tensor, real: Tensor, distance: Distance = "cosine", reference_behaviour: bool = False
) -> dict[str, Tensor]:
    """All scores above of two sets, each distance computed once.

    Args:
        generated: (G, D) features, or (G, P, 3) clouds for ``chamfer``.
        real: (R, D) or (R, Q, 3).
        distance: between two samples.
        reference_behaviour: swap the roles of generated and real in ``mmd`` and ``coverage``, as FairDiff's code does.

    Returns:
        Scalars ``mmd``, ``coverage``, ``1nna`` and ``nearest_real`` (mean over the generated).

    Raises:
        ValueError: a set is empty, of another shape, or holds NaN or infinity; or the distance is unknown.
    """
    measure = distance_function(distance)
    between = measure(generated, real)
    return {
        "mmd": minimum_matching_distance(between, reference_behaviour),
        "coverage": coverage(between, reference_behaviour),
        "1nna": one_nearest_neighbour_accuracy(measure(generated, generated), between, measure(real, real)),
        "nearest_real": nearest_real_distance(between).mean(),
    }


def distance_function(distance: Distance) -> Callable[[Tensor, Tensor], Tensor]:
    """Look up the function of a distance's name.

    Raises:
        ValueError: there is none of that name.
    """
    known = {"cosine": cosine_distances, "euclidean": euclidean_distances, "chamfer": chamfer_distances}
    if distance not in known:
        raise ValueError(f"distance is {distance!r}, expected one of {', '.join(known)}.")
    return known[distance]


def _by_rows(a: Tensor, b: Tensor, block: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Distances of the rows of ``a`` to all of ``b``, some rows at a time.

    In float64, because a product of float32 leaves nothing of the distance of near copies.
    """
    exact = b.to(_exact(b))
    blocks = torch.split(a, max(1, _block(a) // len(b)))
    return torch.cat([block(rows.to(exact.dtype), exact).to(a.dtype) for rows in blocks])


def _block(x: Tensor) -> int:
    return BLOCK if x.device.type == "cpu" else 64 * BLOCK  # many small kernels would be slow there


def _exact(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _checked_sets(a: Tensor, b: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The sets in one dtype, at least float32."""
    expected = "(N, D) features" if dim == 2 else "(N, P, 3) clouds"
    for x in (a, b):
        if x.numel() == 0:
            raise ValueError(f"a set of shape {tuple(x.shape)} is empty, expected at least one sample of {expected}.")
        if x.dim() != dim or x.shape[-1] != (3 if dim == 3 else a.shape[-1]):
            raise ValueError(
                f"cannot compare samples of shape {tuple(a.shape)} with {tuple(b.shape)}, expected {expected} of the "
                "same size for both."
            )
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(x)} samples hold NaN or infinity, expected finite values: look at the generator or at "
                "the feature extractor first."
            )
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


def _checked_distances(distances: Tensor) -> Tensor:
    if distances.dim() != 2 or distances.numel() == 0:
        raise ValueError(
            f"distances have shape {tuple(distances.shape)}, expected (generated, real) with at least one of each."
        )
    if not bool(distances.isfinite().all()):
        raise ValueError("distances hold NaN or infinity, expected finite values.")
    return distances
