"""Noise schedules of diffusers by name, one for training and any other for sampling along the same noise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def build_scheduler(name: str, arguments: Mapping[str, Any] | None = None, like: Any = None) -> Any:
    """Make a scheduler of diffusers.

    Args:
        name: class name, such as ``DDPMScheduler``, ``DDIMScheduler`` or ``DPMSolverMultistepScheduler``.
        arguments: its arguments; they win over those taken from ``like``.
        like: the training scheduler whose noise levels and prediction type a sampling scheduler follows.

    Raises:
        ValueError: for an unknown name or argument, with those that there are.
    """
    import diffusers

    known = [n for n in dir(diffusers) if n.endswith("Scheduler") and hasattr(getattr(diffusers, n), "from_config")]
    if name not in known:
        raise ValueError(f"scheduler {name!r} is not known; diffusers has {', '.join(known)}.")
    cls, arguments = getattr(diffusers, name), dict(arguments or {})
    accepted = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    unknown = sorted(arguments.keys() - accepted)
    if unknown:
        raise ValueError(f"{name} takes no argument {unknown}; it takes {', '.join(sorted(accepted))}.")
    if like is None:
        return cls(**arguments)
    return cls(**{key: value for key, value in like.config.items() if key in accepted} | arguments)


def training_target(scheduler: Any, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """What the network predicts under the scheduler's ``prediction_type``.

    Args:
        scheduler: of the training noise.
        clean: samples without noise (B, ...).
        noise: standard normal noise of the same shape.
        steps: step (B,) of each sample.

    Raises:
        ValueError: for a prediction type other than epsilon, v_prediction and sample.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(clean, noise, steps)
        return velocity
    if kind == "sample":
        return clean
    raise ValueError(f"prediction_type {kind!r}; expected is epsilon, v_prediction or sample.")
