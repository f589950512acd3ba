"""Stable seeds: a number that depends on names and counts, not on a process or its order of work."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: object) -> int:
    """Hash the parts to a seed in [0, 2**63); the same on every machine and Python version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
