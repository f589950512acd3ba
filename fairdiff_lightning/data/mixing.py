"""Real and synthetic samples in one training set: which, and how many of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np

from fairdiff_lightning.data.native import Record

Group = TypeVar("Group", str, int)
Balance = Literal["none", "oversample", "repeat_sample", "equal_scale", "natural_scale"]


def quotas(total: int, groups: Sequence[Group]) -> dict[Group, int]:
    """Divide a total evenly over groups; the first ``total % len(groups)`` get one more."""
    share, rest = divmod(total, len(groups))
    return {group: share + (i < rest) for i, group in enumerate(groups)}


def equal_scale(real: Mapping[Group, int], total: int) -> dict[Group, tuple[int, int]]:
    """How many real and synthetic samples of each group make an Equal-Scale set (FairDiff, data combination).

    Every group gets the same quota; real samples come first and synthetic ones fill the gap.

    Args:
        real: group -> number of real samples at hand.
        total: size of the set.

    Returns:
        Group -> (real, synthetic).
    """
    return {
        group: (min(real[group], quota), max(quota - real[group], 0))
        for group, quota in quotas(total, list(real)).items()
    }


def mix(
    real: Sequence[Record],
    synthetic: Sequence[Record],
    balance: Balance,
    attribute: str,
    group_names: Mapping[int, str],
    total: int | None,
    seed: int,
) -> list[Record]:
    """Make the training set.

    Args:
        real: real training samples.
        synthetic: generated samples of the same data set.
        balance: ``none`` takes everything once; ``oversample`` repeats each group until all are as large, the last
            repetition in part; ``repeat_sample`` draws as many from each group with replacement (FairDiff's
            Repeat_Sample lists); ``equal_scale`` see :func:`equal_scale`; ``natural_scale`` as FairDiff's script
            ``data_combination.py``: a quarter of the total are real samples drawn with replacement whatever their
            group, synthetic ones fill each group up to its quota.
        attribute: whose groups are balanced; samples of an unknown group are left out when balancing.
        group_names: index -> name of the groups that are balanced.
        total: size of the balanced set; when None, the largest group's size for each group (``oversample``,
            ``repeat_sample``) or the number of real samples of these groups (``equal_scale``, ``natural_scale``).
        seed: of every draw.

    Raises:
        ValueError: when a group has nothing to draw from, or too few synthetic samples, with the numbers.
    """
    if balance == "none":
        if total is not None:
            raise ValueError(f"total={total} without balance; choose balance='oversample' or 'equal_scale'.")
        return [*real, *synthetic]
    rng = np.random.default_rng(seed)
    pools = {
        source: {g: [r for r in records if r.attributes[attribute] == g] for g in group_names}
        for source, records in (("real", real), ("synthetic", synthetic))
    }
    if balance in ("oversample", "repeat_sample"):
        both = {g: pools["real"][g] + pools["synthetic"][g] for g in group_names}
        _refuse_empty(both, attribute, group_names)
        target = quotas(total or max(map(len, both.values())) * len(both), list(both))
        draw = _draw_with_repeats if balance == "oversample" else _draw_with_replacement
        return [r for g, pool in both.items() for r in draw(pool, target[g], rng)]
    size = sum(map(len, pools["real"].values())) if total is None else total
    if balance == "natural_scale":
        known = [r for r in real if r.attributes[attribute] in group_names]
        _refuse_empty({-1: known}, attribute, {-1: "of any group"})
        drawn = _draw_with_replacement(known, size // 4, rng)
        pools["real"] = {g: [r for r in drawn if r.attributes[attribute] == g] for g in group_names}
    plan = equal_scale({g: len(pool) for g, pool in pools["real"].items()}, size)
    short = {
        group_names[g]: needed - len(pools["synthetic"][g])
        for g, (_, needed) in plan.items()
        if needed > len(pools["synthetic"][g])
    }
    if short:
        raise ValueError(
            f"{balance} with total={size} over '{attribute}' lacks synthetic samples: {short}. "
            "Generate them and name their folder in `synthetic`, or lower `total`."
        )
    return [
        record
        for g, (num_real, num_synthetic) in plan.items()
        for record in [
            *_draw(pools["real"][g], num_real, rng),
            *_draw(pools["synthetic"][g], num_synthetic, rng),
        ]
    ]


def _draw(pool: Sequence[Record], count: int, rng: np.random.Generator) -> list[Record]:
    return [pool[i] for i in np.sort(rng.permutation(len(pool))[:count])]


def _draw_with_repeats(pool: Sequence[Record], count: int, rng: np.random.Generator) -> list[Record]:
    whole, rest = divmod(count, len(pool))
    return [*pool] * whole + _draw(pool, rest, rng)


def _draw_with_replacement(pool: Sequence[Record], count: int, rng: np.random.Generator) -> list[Record]:
    return [pool[i] for i in rng.integers(len(pool), size=count)]


def _refuse_empty(pools: Mapping[int, Sequence[Record]], attribute: str, group_names: Mapping[int, str]) -> None:
    empty = [group_names[g] for g, pool in pools.items() if not pool]
    if empty:
        raise ValueError(
            f"no training sample of '{attribute}' {empty}, so it cannot be balanced. "
            "Give synthetic ones, or filter the group out with `groups`."
        )
