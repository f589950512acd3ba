"""Distribution-aware mixture of experts: one noisy top-k router per group, experts shared by all groups."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairdiff_lightning.networks.checkpoint import LoadReport, Source, load_strictly
from fairdiff_lightning.networks.dispatch import ExpertFunction, compute_dtype, fastest_dispatch, prepare_experts

UnknownGroup = Literal["error", "mean", "prior"]


class GroupRouter(nn.Module):
    """Noisy top-k gates from the router of each sample's group (Oh et al., ICML 2025, arXiv:2502.00619, section 4).

    With the router of the sample's group, logits = tokens W + b, std = softplus(tokens W_n + b_n) and
    r = logits + noise * std; the gates are the softmax over the ``top_k`` largest entries of r, zero elsewhere.
    The gates are computed in the precision of the parameters, under autocast too.

    Args:
        channels: C, features of a token.
        num_experts: E.
        top_k: k, experts per token.
        num_groups: G, routers.
        noise_in_eval: add noise in evaluation too, as the authors' code does.
        unknown_group: what routes a sample of group -1: an ``error``, the ``mean`` of the routers, or their mean
            weighted by the groups' shares of the training set (``prior``, see :meth:`set_group_prior`).

    Shapes:
        tokens (B, N, C); group (B,) integers in [0, G), or -1; noise (B, N, E), standard normal;
        gates (B, N, E), each row k non-negative entries with sum 1; indices (B, N, k), largest r first.
    """

    group_prior: Tensor

    def __init__(
        self,
        channels: int,
        num_experts: int = 8,
        top_k: int = 2,
        num_groups: int = 1,
        noise_in_eval: bool = False,
        unknown_group: UnknownGroup = "error",
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie in [1, num_experts={num_experts}], but is {top_k}.")
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, but is {num_groups}.")
        if unknown_group not in get_args(UnknownGroup):
            raise ValueError(f"unknown_group must be one of {get_args(UnknownGroup)}, but is {unknown_group!r}.")
        self.channels, self.num_experts, self.top_k, self.num_groups = channels, num_experts, top_k, num_groups
        self.noise_in_eval = noise_in_eval
        self.unknown_group = unknown_group
        self.weight = nn.Parameter(torch.empty(num_groups, 2, num_experts, channels))  # [:, 0] logits, [:, 1] noise
        self.bias = nn.Parameter(torch.empty(num_groups, 2, num_experts))
        self.register_buffer("group_prior", torch.full((num_groups,), 1 / num_groups))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each router as :class:`torch.nn.Linear` does."""
        bound = 1 / math.sqrt(self.channels)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def set_group_prior(self, counts: Tensor) -> None:
        """Store the groups' shares of the training set, which weight the routers for unknown groups.

        Args:
            counts: (G,) samples per group, not all zero.

        Raises:
            ValueError: for another shape, a negative or no count.
        """
        if counts.shape != (self.num_groups,) or bool((counts < 0).any()) or not bool(counts.sum() > 0):
            raise ValueError(
                f"counts must hold one number of samples for each of {self.num_groups} groups, not all 0, "
                f"but is {counts.tolist()}."
            )
        self.group_prior.copy_(counts / counts.sum())

    def forward(self, tokens: Tensor, group: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates (B, N, E) and the experts' indices (B, N, k).

        Args:
            tokens: (B, N, C).
            group: (B,).
            noise: (B, N, E) standard normal, used in training and evaluation; drawn while training when None.

        Raises:
            ValueError: for a group that has no router, if ``group`` lies on the CPU (a GPU asserts on the device,
                so that no step waits for it), or a wrong shape.
        """
        self._check_group(group, len(tokens))
        noisy = noise is not None or self.training or self.noise_in_eval
        with torch.autocast(tokens.device.type, enabled=False):
            weight, bias = self._of_group(group, noisy)
            logits = torch.baddbmm(bias, tokens.to(weight.dtype), weight.mT)
            if noisy:
                logits, spread = logits.chunk(2, dim=-1)
                noise = torch.randn_like(logits) if noise is None else noise
                logits = logits + noise * F.softplus(spread)
            kept, indices = logits.topk(self.top_k, dim=-1)
            gates = torch.zeros_like(logits).scatter(-1, indices, kept.softmax(dim=-1))
        return gates, indices

    def reference_tensors(self) -> dict[str, Tensor]:
        """Name in the authors' checkpoint -> the part of this module that it fills."""
        return {
            f"{group}.{linear}.{kind}": parameter.detach()[group, row]
            for group in range(self.num_groups)
            for row, linear in enumerate(("topkroute_linear", "noise_linear"))
            for kind, parameter in (("weight", self.weight), ("bias", self.bias))
        }

    def load_reference_weights(self, source: Source) -> LoadReport:
        """Load ``{group}.topkroute_linear|noise_linear.weight|bias`` of the authors' checkpoint, strictly.

        Raises:
            CheckpointMismatchError: naming every tensor that does not fit.
        """
        return load_strictly(source, self.reference_tensors())

    def _of_group(self, group: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
        """Each sample's router: weight (B, E or 2E, C), bias (B, 1, E or 2E)."""
        rows = 2 if noisy else 1
        weight, bias = self.weight[:, :rows].flatten(1, 2), self.bias[:, :rows].reshape(self.num_groups, 1, -1)
        if self.unknown_group != "error":
            prior = self.unknown_group == "prior"
            share = (self.group_prior if prior else torch.ones_like(self.group_prior) / self.num_groups).view(-1, 1, 1)
            weight = torch.cat([weight, (share * weight).sum(0, keepdim=True)])
            bias = torch.cat([bias, (share * bias).sum(0, keepdim=True)])
        # Without an average router, num_groups is out of range: index_select refuses, where -1 could wrap around.
        outside = len(weight)  # a group beyond the last must not fall on the average router
        index = group.where(group < self.num_groups, outside).where(group != -1, self.num_groups)
        return weight.index_select(0, index), bias.index_select(0, index)

    def _check_group(self, group: Tensor, batch_size: int) -> None:
        if group.shape != (batch_size,) or group.is_floating_point():
            raise ValueError(
                f"group must hold one integer for each of {batch_size} samples, "
                f"but has shape {tuple(group.shape)} and type {group.dtype}."
            )
        if group.device.type != "cpu" or torch.compiler.is_compiling():
            return
        lowest = 0 if self.unknown_group == "error" else -1
        foreign = group[(group < lowest) | (group >= self.num_groups)]
        if len(foreign):
            raise ValueError(
                f"group holds {sorted(set(foreign.tolist()))}, but there are routers for 0 to {self.num_groups - 1}. "
                "Drop the samples whose group is unknown (-1), or build with unknown_group='mean' or 'prior'."
            )


class Expert(nn.Module):
    """Linear(C, H), ReLU, Linear(H, C).

    Both weights are (H, C), the second one transposed: a product with rows of H is faster so on a CPU.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(hidden, channels))
        self.bias1 = nn.Parameter(torch.empty(hidden))
        self.weight2 = nn.Parameter(torch.empty(hidden, channels))
        self.bias2 = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as :class:`torch.nn.Linear` does."""
        for fan_in, parameters in (
            (self.weight1.shape[1], (self.weight1, self.bias1)),
            (len(self.weight2), (self.weight2, self.bias2)),
        ):
            for parameter in parameters:
                nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., C) -> (..., C)."""
        return F.relu(F.linear(tokens, self.weight1, self.bias1)) @ self.weight2 + self.bias2


class DistributionAwareMoE(nn.Module):
    """Experts shared by all groups, mixed by a router per group (Oh et al., ICML 2025, arXiv:2502.00619, section 4).

    Returns the mixture sum_i G_i Expert_i(h) alone; the layer of the paper is h + mixture. An expert is Linear(C, 4C),
    ReLU, Linear(4C, C), Dropout. Tokens are sorted by expert, so that each expert sees its own and no other.
    On a CPU the experts have first derivatives only.

    Args:
        channels: C, features of a token.
        num_experts: E.
        top_k: k, experts per token.
        num_groups: G, routers.
        hidden_ratio: hidden features of an expert over C.
        dropout: of an expert's output.
        noise_in_eval: as in :class:`GroupRouter`.
        unknown_group: as in :class:`GroupRouter`.

    Shapes:
        tokens (B, N, C) -> (B, N, C), of the tokens' type; group (B,); noise (B, N, E).
    """

    def __init__(
        self,
        channels: int,
        num_experts: int = 8,
        top_k: int = 2,
        num_groups: int = 1,
        hidden_ratio: int = 4,
        dropout: float = 0.1,
        noise_in_eval: bool = False,
        unknown_group: UnknownGroup = "error",
    ) -> None:
        super().__init__()
        self.router = GroupRouter(channels, num_experts, top_k, num_groups, noise_in_eval, unknown_group)
        # A module each, not parameters of (E, ...): the CPU's allocator would map gradients so large anew each step.
        self.experts = nn.ModuleList(Expert(channels, hidden_ratio * channels) for _ in range(num_experts))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, group: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mixture (B, N, C) of the experts, without the residual; arguments as in :meth:`GroupRouter.forward`."""
        gates, indices = self.route(tokens, group, noise)
        return self.mix(tokens, gates, indices)

    def route(self, tokens: Tensor, group: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates (B, N, E) and experts (B, N, k) of each token; see :meth:`GroupRouter.forward`."""
        routed: tuple[Tensor, Tensor] = self.router(tokens, group, noise)
        return routed

    def prepare(self, tokens: Tensor) -> ExpertFunction:
        """The experts for tokens like these in one forward and backward pass; give it to every :meth:`mix` of that.

        Blocks that share the experts save by it: parameters are cast once, and their gradient is summed in place.
        """
        experts = [expert.parameters() for expert in self.experts]
        return prepare_experts(experts, compute_dtype(tokens), fastest_dispatch(tokens))

    def mix(self, tokens: Tensor, gates: Tensor, indices: Tensor, experts: ExpertFunction | None = None) -> Tensor:
        """Sum over a token's experts of gate times expert output, (B, N, C).

        Args:
            tokens: (B, N, C).
            gates: (B, N, E).
            indices: (B, N, k), the experts that each token is sent to.
            experts: of :meth:`prepare`, where several blocks share them.
        """
        experts = experts or self.prepare(tokens)
        top_k = indices.shape[-1]
        expert, order = indices.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(len(self.experts), device=expert.device), right=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        # Repeated before the gather, each row has one reader, so that the backward pass adds in a fixed order.
        rows = tokens.to(compute_dtype(tokens)).flatten(0, 1).unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1)
        rows = self.dropout(experts(rows.index_select(0, order), ends))
        rows = rows.index_select(0, back).view(-1, top_k, tokens.shape[-1])
        kept = gates.gather(-1, indices).flatten(0, 1).unsqueeze(-1)
        mixture: Tensor = (rows * kept).sum(1)
        return mixture.to(tokens.dtype).view_as(tokens)

    def reference_tensors(self) -> dict[str, Tensor]:
        """Name in the authors' checkpoint -> the part of this module that it fills."""
        names = {f"router.{name}": tensor for name, tensor in self.router.reference_tensors().items()}
        for i, expert in enumerate(self.experts):
            w1, b1, w2, b2 = (p.detach() for p in expert.parameters())
            linear = {"0.weight": w1, "0.bias": b1, "2.weight": w2.t(), "2.bias": b2}
            names |= {f"experts.{i}.net.{name}": tensor for name, tensor in linear.items()}
        return names

    def load_reference_weights(self, source: Source) -> LoadReport:
        """Load ``router.{g}.*`` and ``experts.{i}.net.{0,2}.*`` of the authors' checkpoint, strictly.

        Raises:
            CheckpointMismatchError: naming every tensor that does not fit.
        """
        return load_strictly(source, self.reference_tensors())
