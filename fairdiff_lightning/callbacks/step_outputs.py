"""Checks that a step of any LightningModule returns what a callback reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def require_keys(found: object, expected: Mapping[str, str], where: str, callback: object) -> Mapping[str, Any]:
    """Return ``found`` when it is a mapping with the expected keys.

    Args:
        found: what a step returned, or a batch.
        expected: key -> what it should hold.
        where: what gave it, such as ``Segmenter.test_step``.
        callback: who reads it.

    Raises:
        ValueError: naming where it came from, the keys found, and those that are missing with their meaning.
    """
    has = f"a dict with the keys {sorted(map(str, found))}" if isinstance(found, Mapping) else type(found).__name__
    missing = [key for key in expected if not isinstance(found, Mapping) or key not in found]
    if not isinstance(found, Mapping) or missing:
        needs = "; ".join(f"'{key}': {expected[key]}" for key in missing)
        raise ValueError(
            f"{type(callback).__name__}: {where} gave {has}. Missing: {needs}. "
            "Give a dict with them, or leave the callback out."
        )
    return found
