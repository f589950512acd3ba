"""The order in which a sampler with resampling (RePaint) visits the noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def visit_list(num_steps: int, jump_length: int = 1, jump_n_sample: int = 1) -> list[int]:
    """Noise levels in the order in which a chain visits them.

    Lugmayr et al., *RePaint*, CVPR 2022, arXiv:2201.09865, section 4.2: at each multiple of ``jump_length`` the chain
    goes back up by that many levels, ``jump_n_sample - 1`` times, so that what is generated agrees with what is given.

    Args:
        num_steps: number of levels; the chain starts at ``num_steps - 1``.
        jump_length: levels of a jump.
        jump_n_sample: how often each stretch is gone down in all; 1 for no jumps.

    Returns:
        Levels, each one below or above its predecessor, -1 (no noise) at the end. Each step down is one evaluation of
        the network.
    """
    left = dict.fromkeys(range(0, num_steps - jump_length, jump_length), jump_n_sample - 1)
    levels, level = [], num_steps
    while level > 0:
        level -= 1
        levels.append(level)
        if left.get(level, 0) > 0:
            left[level] -= 1
            levels.extend(range(level + 1, level + jump_length + 1))
            level += jump_length
    return [*levels, -1]


def num_visits(num_steps: int, jump_length: int = 1, jump_n_sample: int = 1) -> int:
    """Length of :func:`visit_list`, without making it."""
    return num_steps + 1 + 2 * (jump_n_sample - 1) * jump_length * len(range(0, num_steps - jump_length, jump_length))


def check_jumps(num_steps: int, jump_length: int, jump_n_sample: int, most: int) -> None:
    """Refuse jumps that are none, or too many.

    Raises:
        ValueError: for numbers below 1, a jump that has no effect, or a list of more than ``most`` levels.
    """
    numbers = {"num_steps": num_steps, "jump_length": jump_length, "jump_n_sample": jump_n_sample}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value}; expected is at least 1.")
    if jump_n_sample == 1 and jump_length > 1:
        raise ValueError(
            f"jump_length={jump_length} has no effect with jump_n_sample=1, which never jumps; raise jump_n_sample, or "
            "set both to 1 for a chain without resampling."
        )
    if jump_n_sample > 1 and jump_length >= num_steps:
        raise ValueError(
            f"jump_length={jump_length} has no effect on {num_steps} steps: no level can be jumped from. Take one "
            f"below {num_steps}, or jump_n_sample=1 for a chain without resampling."
        )
    length = num_visits(**numbers)
    if length > most:
        raise ValueError(
            f"num_steps={num_steps}, jump_length={jump_length}, jump_n_sample={jump_n_sample} visit {length} noise "
            f"levels, more than max_visits={most}; lower jump_n_sample or num_steps, or raise max_visits."
        )


def check_visits(levels: Sequence[int], num_steps: int, most: int) -> None:
    """Refuse a list that no chain can follow.

    Raises:
        ValueError: when it does not start at the noisiest level, leaves the levels, skips one, or does not end at -1;
            or when it has more than ``most`` entries.
    """
    if len(levels) > most:
        raise ValueError(
            f"visit_list has {len(levels)} entries, more than max_visits={most}; shorten it or raise that."
        )
    if len(levels) < 2 or levels[0] != num_steps - 1 or levels[-1] != -1:
        raise ValueError(
            f"visit_list has {len(levels)} entries from {list(levels[:1])} to {list(levels[-1:])}; expected is from "
            f"{num_steps - 1}, the noisiest level, to -1."
        )
    for place, (now, then) in enumerate(pairwise(levels)):
        if abs(now - then) != 1 or not 0 <= now < num_steps:
            raise ValueError(
                f"visit_list goes from {now} to {then} at place {place}; expected are levels 0 ... {num_steps - 1}, "
                "each one below or above its predecessor, and -1 at the end alone."
            )
