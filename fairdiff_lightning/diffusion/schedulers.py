"""Noise schedules of diffusers by name, one for training and any other for sampling along the same noise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def build_scheduler(name: str, arguments: Mapping[str, Any] | None = None, like: Any = None) -> Any:
    """Make a scheduler of diffusers, with its tables of a given, linear or scaled linear noise in float64.

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
    followed = {} if like is None else {key: value for key, value in like.config.items() if key in accepted}
    with torch.device("cpu"):  # numbers, also where networks are made without memory
        scheduler = cls(**followed | arguments)
        _sharpen(scheduler)
    return scheduler


def exact_betas(scheduler: Any) -> Tensor:
    """Noise (T,) that each step of a scheduler adds, in float64.

    diffusers rounds it to float32. What its configuration says is worked out again where that is one line: for
    ``trained_betas``, ``linear`` and ``scaled_linear``. Other schedules have the digits that diffusers leaves.
    """
    config, double = scheduler.config, torch.float64
    kind, count = config.get("beta_schedule"), config.num_train_timesteps
    if config.get("rescale_betas_zero_snr"):
        kind = "rescaled"
    elif config.get("trained_betas") is not None:
        return torch.as_tensor(config.trained_betas, dtype=double)
    if kind == "linear":
        return torch.linspace(config.beta_start, config.beta_end, count, dtype=double)
    if kind == "scaled_linear":
        return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, count, dtype=double).square()
    rounded: Tensor = scheduler.betas.double()
    return rounded


def _sharpen(scheduler: Any) -> None:
    """Put float64 in place of the float32 tables, in schedulers whose tables are those of their betas."""
    rounded = getattr(scheduler, "alphas_cumprod", None)
    if rounded is None or getattr(scheduler, "betas", None) is None:
        return
    betas = exact_betas(scheduler)
    kept = (1 - betas).cumprod(0)
    if kept.shape != rounded.shape or not torch.allclose(kept.float(), rounded, rtol=1e-3):
        return
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = betas, 1 - betas, kept
    if scheduler.config.get("set_alpha_to_one") is False:
        scheduler.final_alpha_cumprod = kept[0]


def build_training_scheduler(name: str, arguments: Mapping[str, Any] | None = None, like: Any = None) -> Any:
    """Make a scheduler whose noise a network is trained on, see :func:`build_scheduler`.

    Raises:
        ValueError: also for a scheduler whose noise is not sqrt(a) * clean + sqrt(1 - a) * noise with a falling a in
            [0, 1] (``alphas_cumprod``), such as those of flow matching, or an unknown prediction type.
    """
    scheduler = build_scheduler(name, arguments, like)
    if scheduler.config.get("use_flow_sigmas") or not _falls(getattr(scheduler, "alphas_cumprod", None)):
        raise ValueError(
            f"scheduler {name!r} cannot be trained with: it has no `alphas_cumprod` that falls from 1 towards 0, the "
            "shares of the signal's power that are left (variance-preserving noise). Train with DDPMScheduler, and "
            "choose the one that samples by `sampler`."
        )
    _check_prediction(scheduler.config.get("prediction_type"))
    return scheduler


def signal_power(scheduler: Any, steps: Tensor) -> Tensor:
    """Share of the signal's power (B,) that is left at steps (B,).

    The schedule follows to the steps' device once, as in diffusers' own schedulers, so that no training step waits.
    """
    precise = torch.float32 if steps.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(steps.device, precise)
    kept: Tensor = scheduler.alphas_cumprod[steps]
    return kept


def add_noise(scheduler: Any, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """Noisy samples sqrt(a) * clean + sqrt(1 - a) * noise, a being :func:`signal_power`.

    The schedulers' own methods do not all do that before ``set_timesteps``: some count the steps backwards, others
    leave the signal unscaled, and some wait for the device.

    Args:
        scheduler: of the training noise, made by :func:`build_training_scheduler`.
        clean: samples without noise (B, ...).
        noise: standard normal noise of the same shape.
        steps: step (B,) of each sample, on their device.
    """
    signal, spread = _amplitudes(scheduler, clean, steps)
    return signal * clean + spread * noise


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
    _check_prediction(kind)
    if kind == "v_prediction":
        signal, spread = _amplitudes(scheduler, clean, steps)
        return signal * noise - spread * clean
    return noise if kind == "epsilon" else clean


def clean_estimate(scheduler: Any, predicted: Tensor, noisy: Tensor, steps: Tensor) -> Tensor:
    """The clean samples (B, ...) that a prediction speaks of, not clipped.

    Args:
        scheduler: whose schedule and ``prediction_type`` the prediction follows.
        predicted: of the network (B, ...).
        noisy: what the network saw (B, ...).
        steps: step (B,) of each sample.

    Raises:
        ValueError: for a prediction type other than epsilon, v_prediction and sample.
    """
    kind = scheduler.config.prediction_type
    _check_prediction(kind)
    signal, spread = _amplitudes(scheduler, noisy, steps)
    if kind == "v_prediction":
        return signal * noisy - spread * predicted
    return (noisy - spread * predicted) / signal if kind == "epsilon" else predicted


def _amplitudes(scheduler: Any, like: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of signal and noise, shaped to multiply ``like`` (B, ...)."""
    kept = signal_power(scheduler, steps).view(-1, *[1] * (like.dim() - 1))
    return kept.sqrt().to(like.dtype), (1 - kept).sqrt().to(like.dtype)


def _falls(kept: Any) -> bool:
    """Whether this is a schedule of powers that fall from 1 towards 0."""
    if not isinstance(kept, Tensor) or kept.dim() != 1:
        return False
    return bool((kept.diff() <= 0).all() & (kept >= 0).all() & (kept <= 1).all())


def _check_prediction(kind: str | None) -> None:
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type {kind!r}; expected is epsilon, v_prediction or sample.")
