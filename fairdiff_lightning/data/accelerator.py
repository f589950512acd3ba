"""The accelerator, lent to a network that otherwise stays on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_accelerator(network: object) -> Iterator[None]:
    """Keep a network on this process's accelerator, where there is one, and on the CPU afterwards.

    From the CPU it can be copied into loader processes. What is no ``nn.Module`` is left alone.
    """
    device = torch.accelerator.current_accelerator(check_available=True) if isinstance(network, nn.Module) else None
    if device is None or not isinstance(network, nn.Module):
        yield
        return
    network.to(device)
    try:
        yield
    finally:
        network.to("cpu")
