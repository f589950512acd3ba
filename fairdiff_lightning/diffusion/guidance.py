"""Classifier-free guidance of a prediction made for both branches in one batch."""

from __future__ import annotations

from torch import Tensor


def guide(predicted: Tensor, scale: float) -> Tensor:
    """Push the prediction away from the unconditional one.

    Args:
        predicted: (2B, ...), the unconditional half first.
        scale: 1 gives the conditional half.

    Returns:
        (B, ...): unconditional + scale * (conditional - unconditional).
    """
    unconditional, conditional = predicted.chunk(2)
    return unconditional + scale * (conditional - unconditional)
