"""PointNet VAE with a coupling-flow prior and a gated point-wise denoiser, FairDiff's network for outlines."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairdiff_lightning.networks.checkpoint import (
    LoadReport,
    Source,
    check_state_dict,
    describe,
    load_strictly,
    read_state_dict,
)

POINT_DIM, LATENT_DIM = 3, 256
FEATURES = (128, 128, 256, 512)
HEAD = (512, 256, 128)
DENOISER = (128, 256, 512, 256, 128)
TIME_DIM = 3
_SCHEDULE = "diffusion.var_sched."


class PointVAE(nn.Module):
    """Encoder, prior and denoiser of point clouds; the noise schedule and the losses are not part of it.

    FairDiff (Li et al., MICCAI 2024, arXiv:2407.06250) re-uses the design of Luo and Hu (CVPR 2021, arXiv:2103.01458).
    A cloud has a latent code; the code's prior is a normalising flow; given the code, a diffusion model moves every
    point by itself. Groups are not in the reference: a learned vector of the group is added to the code that the
    denoiser sees, and the flow's base distribution N(mean of the group, I) has a learned mean. Both start at zero.

    Args:
        num_groups: G; 0 for the reference's network of 3,879,832 parameters.
        num_layers: coupling layers of the flow.
        hidden_dim: of the coupling layers' networks.

    Shapes:
        points (B, N, 3), normalised; latent code and its prior's noise (B, 256); group (B,) integers in [0, G), -1 when
        unknown, or None; time (B,), a number that tells the step of each cloud: in the reference, its beta.
    """

    def __init__(self, num_groups: int = 0, num_layers: int = 14, hidden_dim: int = 256) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.encoder = PointNetEncoder(LATENT_DIM)
        self.flow = CouplingFlow(LATENT_DIM, num_layers, hidden_dim)
        self.denoiser = PointDenoiser(LATENT_DIM)
        if num_groups:  # one row more for unknown groups
            self.context_shift = nn.Embedding(num_groups + 1, LATENT_DIM)
            self.prior_mean = nn.Embedding(num_groups + 1, LATENT_DIM)
            nn.init.zeros_(self.context_shift.weight)
            nn.init.zeros_(self.prior_mean.weight)

    def forward(self, points: Tensor, time: Tensor, latent: Tensor, group: Tensor | None = None) -> Tensor:
        """What the diffusion predicts for noisy points (B, N, 3), of their shape."""
        context: Tensor = latent if group is None else latent + self._of_group(self.context_shift, group)
        prediction: Tensor = self.denoiser(points, time, context)
        return prediction

    def encode(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, 256) of the latent code of clean points."""
        mean, log_variance = self.encoder(points)
        return mean, log_variance

    def log_prior(self, latent: Tensor, group: Tensor | None = None) -> Tensor:
        """Log-density (B,) of latent codes, in their precision, under autocast too."""
        with torch.autocast(latent.device.type, enabled=False):
            noise, log_determinant = self.flow(latent)
        if group is not None:
            noise = noise - self._of_group(self.prior_mean, group)
        density: Tensor = standard_normal_log_density(noise) + log_determinant
        return density

    def draw_latent(self, noise: Tensor, group: Tensor | None = None) -> Tensor:
        """Latent codes of the prior from standard normal noise (B, 256)."""
        if group is not None:
            noise = noise + self._of_group(self.prior_mean, group)
        latent: Tensor = self.flow.inverse(noise)
        return latent

    def reference_tensors(self) -> dict[str, Tensor]:
        """Name in the authors' checkpoint -> the tensor of this module that it fills."""
        return {
            **{f"encoder.{name}": tensor for name, tensor in self.encoder.reference_tensors()},
            **{f"flow.{name}": tensor for name, tensor in self.flow.reference_tensors()},
            **{f"diffusion.net.{name}": tensor for name, tensor in self.denoiser.reference_tensors()},
        }

    def load_reference_weights(self, source: Source, betas: Tensor | None = None) -> LoadReport:
        """Load a checkpoint of the authors' ``train.py``, strictly; what is of the groups stays as it is.

        The file also pickles the training script's arguments, an ``argparse.Namespace``: this class is allowed while
        it is read, and is the only one that is.

        Args:
            source: path or state dict.
            betas: schedule (T,) that the network will be used with; a checkpoint of another one is refused.

        Raises:
            CheckpointMismatchError: naming every tensor that does not fit.
            ValueError: for a file that cannot be read safely, or another noise schedule.
        """
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = read_state_dict(source)
        schedule = {name: state.pop(name) for name in list(state) if name.startswith(_SCHEDULE)}
        found = schedule.get(f"{_SCHEDULE}betas")
        if betas is not None and found is not None:
            _check_schedule(found, betas, describe(source))
        targets = self.reference_tensors()
        check_state_dict(state, targets, describe(source))
        report = load_strictly(state, targets)
        return LoadReport(describe(source), report.loaded, tuple(schedule))

    def _of_group(self, table: nn.Embedding, group: Tensor) -> Tensor:
        """Rows (B, 256) of the groups; that of -1 is the last."""
        outside = (group < -1) | (group >= self.num_groups)
        if group.device.type == "cpu" and bool(outside.any()):  # a GPU asserts on the device, so that no step waits
            raise ValueError(f"group must be -1 (unknown) or 0 to {self.num_groups - 1}, but is {group.tolist()}.")
        row: Tensor = table(group.where(group != -1, self.num_groups).where(~outside, self.num_groups + 1))
        return row


class PointNetEncoder(nn.Module):
    """Mean and log-variance (B, D) of a cloud (B, N, 3) in any order, with any number of points."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        widths = (POINT_DIM, *FEATURES)
        self.convolutions = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(_BatchNorm(width) for width in FEATURES)
        self.mean, self.log_variance = _Head(latent_dim), _Head(latent_dim)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, D)."""
        x = points.mT
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(x))
            if i < len(self.norms) - 1:
                x = F.relu(x)
        features = x.amax(-1)
        return self.mean(features), self.log_variance(features)

    def reference_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names in the authors' checkpoint, and tensors."""
        yield from _named(self.convolutions, "conv{}")
        yield from _named(self.norms, "bn{}")
        for letter, head in (("m", self.mean), ("v", self.log_variance)):
            yield from _named(head.linears, f"fc{{}}_{letter}")
            yield from _named(head.norms, f"fc_bn{{}}_{letter}")


class CouplingFlow(nn.Module):
    """Affine coupling layers that map a latent code (B, D) to noise (B, D), each changing one half given the other.

    Layers 0, 2, ... change the first half. The changed half is multiplied by sigmoid(s + 2) and shifted by t, where a
    network of the other half gives s and t.
    """

    def __init__(self, dim: int, num_layers: int, hidden_dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.networks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(half, hidden_dim),
                nn.ReLU(),
                nn.Linear(hidden_dim, hidden_dim),
                nn.ReLU(),
                nn.Linear(hidden_dim, dim),
            )
            for _ in range(num_layers)
        )

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (B, D) and log|det d noise / d latent| (B,)."""
        halves = list(latent.chunk(2, -1))
        log_determinant = latent.new_zeros(len(latent))
        for i, network in enumerate(self.networks):
            changed, given = i % 2, 1 - i % 2
            logit, shift = network(halves[given]).chunk(2, -1)
            halves[changed] = halves[changed] * torch.sigmoid(logit + 2) + shift
            log_determinant = log_determinant + F.logsigmoid(logit + 2).sum(-1)
        return torch.cat(halves, -1), log_determinant

    def inverse(self, noise: Tensor) -> Tensor:
        """Latent code (B, D) of noise (B, D)."""
        halves = list(noise.chunk(2, -1))
        for i, network in reversed(list(enumerate(self.networks))):
            changed, given = i % 2, 1 - i % 2
            logit, shift = network(halves[given]).chunk(2, -1)
            halves[changed] = (halves[changed] - shift) / torch.sigmoid(logit + 2)
        return torch.cat(halves, -1)

    def reference_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names in the authors' checkpoint, and tensors."""
        return _named(self.networks, "chain.{}.net_s_t", start=0)


class PointDenoiser(nn.Module):
    """Gated linear layers on each point (B, N, 3), whose gate and bias come from the step and the cloud's code.

    The step enters as [time, sin time, cos time]; the input is added to the output.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        widths = (POINT_DIM, *DENOISER, POINT_DIM)
        self.layers = nn.ModuleList(GatedLinear(a, b, TIME_DIM + latent_dim) for a, b in pairwise(widths))

    def forward(self, points: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Prediction (B, N, 3) for noisy points, time (B,) and context (B, D)."""
        time = time[:, None].to(points.dtype)
        context = torch.cat([time, time.sin(), time.cos(), context], -1)[:, None]
        x = points
        for i, layer in enumerate(self.layers):
            x = layer(x, context)
            if i < len(self.layers) - 1:
                x = F.leaky_relu(x, inplace=True)
        return points + x

    def reference_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names in the authors' checkpoint, and tensors."""
        for i, layer in enumerate(self.layers):
            parts = {"linear": "_layer", "gate": "_hyper_gate", "shift": "_hyper_bias"}
            for name, tensor in layer.state_dict().items():
                part, kind = name.split(".")
                yield f"layers.{i}.{parts[part]}.{kind}", tensor


class GatedLinear(nn.Module):
    """(W x + b) sigmoid(G c + g) + H c for points x (B, N, I) and context c (B, 1, C)."""

    def __init__(self, in_dim: int, out_dim: int, context_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        self.gate = nn.Linear(context_dim, out_dim)
        self.shift = nn.Linear(context_dim, out_dim, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Features (B, N, O)."""
        return torch.addcmul(self.shift(context), self.linear(x), self.gate(context).sigmoid())


class _Head(nn.Module):
    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((*HEAD, latent_dim)))
        self.norms = nn.ModuleList(_BatchNorm(width) for width in HEAD[1:])

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linears[:-1], self.norms, strict=True):
            x = F.relu(norm(linear(x)))
        out: Tensor = self.linears[-1](x)
        return out


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that lets an epoch's last batch hold a single value: it uses the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def standard_normal_log_density(x: Tensor) -> Tensor:
    """Log-density (B,) of vectors (B, D) under N(0, I)."""
    return -0.5 * (x.square().sum(-1) + x.shape[-1] * math.log(2 * math.pi))


def gaussian_entropy(log_variance: Tensor) -> Tensor:
    """Entropy (B,) of normal distributions with diagonal log-variances (B, D)."""
    return 0.5 * (log_variance.sum(-1) + log_variance.shape[-1] * (1 + math.log(2 * math.pi)))


def _named(modules: nn.ModuleList, pattern: str, start: int = 1) -> Iterator[tuple[str, Tensor]]:
    for i, module in enumerate(modules, start):
        for name, tensor in module.state_dict().items():
            yield f"{pattern.format(i)}.{name}", tensor


def _check_schedule(found: Tensor, betas: Tensor, source: str) -> None:
    """Compare with the checkpoint's betas (T + 1,), of which the first is padding."""
    wanted = betas.cpu().double()
    given = found.cpu().double()[1:]
    if given.shape != wanted.shape or not torch.allclose(given, wanted, rtol=1e-5, atol=0):
        raise ValueError(
            f"{source} was trained with {len(given)} steps of beta {given[0]:.6g} to {given[-1]:.6g}; here it would be "
            f"used with {len(wanted)} steps of {wanted[0]:.6g} to {wanted[-1]:.6g}. Build the module with the "
            "checkpoint's schedule (terminal_snr='reference')."
        )
