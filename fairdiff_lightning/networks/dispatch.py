"""Three ways to run token rows, sorted by expert, through two-layer experts: for CPUs, bfloat16 GPUs and other GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

Dispatch = Literal["split", "grouped", "blocks"]
ExpertFunction = Callable[[Tensor, Tensor], Tensor]
"""Rows (R, C) sorted by expert and the end of each expert's rows (E,) -> rows (R, C)."""


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """Type that products of the tokens have, autocast considered."""
    kind = tokens.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype


def fastest_dispatch(tokens: Tensor) -> Dispatch:
    """The fastest way for these tokens (..., C) that does not make the host wait for a GPU."""
    if tokens.device.type == "cpu":
        return "split"
    suits = compute_dtype(tokens) == torch.bfloat16 and tokens.shape[-1] % 8 == 0
    if tokens.device.type == "cuda" and suits and torch.version.hip is None:
        # Other generations run grouped_mm too, but by a loop whose sizes the host waits for.
        return "grouped" if torch.cuda.get_device_capability(tokens.device)[0] in (9, 10) else "blocks"
    return "blocks"


def prepare_experts(experts: Iterable[Iterable[Tensor]], dtype: torch.dtype, dispatch: Dispatch) -> ExpertFunction:
    """Experts as one function, for a single forward pass, in which it may be called often.

    What can be done once is done here: the parameters are cast, and stacked for the ways that need it.

    Args:
        experts: of each, weight (H, C) and bias (H,) of the first layer, weight (H, C) and bias (C,) of the second.
        dtype: of the rows.
        dispatch: the way.
    """
    parameters = [list(expert) for expert in experts]
    if dispatch == "split":
        split: ExpertFunction = _SplitExperts(parameters, dtype)
        return split
    w1, b1, w2, b2 = (torch.stack([p.to(dtype) for p in kind]) for kind in zip(*parameters, strict=True))
    multiply: ExpertFunction = partial(_grouped if dispatch == "grouped" else _blocks, w1=w1, b1=b1, w2=w2, b2=b2)
    return multiply


class _SplitExperts:
    """One product per expert on its own rows; the sizes are read by the host, which costs nothing on a CPU.

    The weights' gradient is not made call by call, by products with few rows that add up matrices of 151 MB (ViT-B),
    but from the rows of many calls at once. A token passes through the calls: its gradient comes back to the weights
    when all calls have put theirs down.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __init__(self, parameters: list[list[Tensor]], dtype: torch.dtype) -> None:
        self.weights = [[p.detach().to(dtype) for p in expert] for expert in parameters]
        self.ledger = _Ledger()
        self.token: Tensor = _Collect.apply(self.ledger, *(p for expert in parameters for p in expert))  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        out: Tensor
        out, token = _SplitMLP.apply(rows, self.token, sizes, self.weights, self.ledger)  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled():  # a call that records nothing must not cut the token off
            self.token = token
        return out


class _Ledger:
    """Rows and gradients of which the weights' gradient is made, expert by expert."""

    LIMIT = 2048  # rows to wait for: enough for efficient products, about 70 MB for ViT-B

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.calls: list[list[tuple[Tensor, ...]]] = []  # call, expert, (rows, hidden, gradients of both layers)
        self.count = 0
        self.sums: list[list[Tensor]] = []  # expert, parameter

    def add(self, call: list[tuple[Tensor, ...]]) -> None:
        self.calls.append(call)
        self.count += sum(len(parts[0]) for parts in call)
        if self.count >= self.LIMIT:
            self.total()

    def total(self) -> list[list[Tensor]]:
        """Gradients of each expert's parameters."""
        for i, calls in enumerate(zip(*self.calls, strict=True)):
            x, h, gh, g = calls[0] if len(calls) == 1 else (torch.cat(parts) for parts in zip(*calls, strict=True))
            if i == len(self.sums):
                self.sums.append([gh.t() @ x, gh.sum(0), h.t() @ g, g.sum(0)])
                continue
            w1, b1, w2, b2 = self.sums[i]
            torch.addmm(w1, gh.t(), x, out=w1)
            torch.addmm(w2, h.t(), g, out=w2)
            b1 += gh.sum(0)
            b2 += g.sum(0)
        self.calls, self.count = [], 0
        return self.sums


class _Collect(torch.autograd.Function):
    """Parameters -> the token that stands for them; its gradient is what the ledger holds."""

    @staticmethod
    def forward(ctx: Any, ledger: _Ledger, *parameters: Tensor) -> Tensor:
        ctx.ledger, ctx.count = ledger, len(parameters)
        ctx.set_materialize_grads(False)
        return parameters[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor | None) -> tuple[Any, ...]:
        if token is None:
            return tuple(None for _ in range(1 + ctx.count))
        sums = ctx.ledger.total()
        ctx.ledger.clear()
        return None, *(grad for expert in sums for grad in expert)


class _SplitMLP(torch.autograd.Function):
    """Rows and token -> rows and token, by the weights of each expert."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, token: Tensor, sizes: list[int], weights: list[list[Tensor]], ledger: _Ledger
    ) -> tuple[Tensor, Tensor]:
        hidden, out = rows.new_empty(len(rows), len(weights[0][0])), torch.empty_like(rows)
        for x, h, y, (w1, b1, w2, b2) in zip(*_parts(sizes, rows, hidden, out), weights, strict=True):
            torch.addmm(b1, x, w1.t(), out=h).relu_()
            torch.addmm(b2, h, w2, out=y)
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.ledger = sizes, ledger
        ctx.save_for_backward(rows, hidden, *(w for expert in weights for w in expert))
        return out, token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, token: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, token, None, None, None
        if token is None:  # the first call that this backward pass reaches
            ctx.ledger.clear()
        rows, hidden, *flat = ctx.saved_tensors
        weights = [flat[i : i + 4] for i in range(0, len(flat), 4)]
        grad, grad_rows = grad.contiguous(), torch.empty_like(rows)
        call = []
        for x, h, g, gx, (w1, _, w2, _) in zip(*_parts(ctx.sizes, rows, hidden, grad, grad_rows), weights, strict=True):
            gh = torch.ops.aten.threshold_backward(g @ w2.t(), h, 0)
            torch.mm(gh, w1, out=gx)
            call.append((x, h, gh, g))
        if ctx.needs_input_grad[1]:
            ctx.ledger.add(call)
        return grad_rows, rows.new_zeros(()), None, None, None


def _parts(sizes: list[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [torch.split(tensor, sizes) for tensor in tensors]


def _grouped(rows: Tensor, ends: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Both layers as grouped products, which PyTorch has on GPUs for bfloat16."""
    position, offsets = torch.arange(len(rows), device=rows.device).unsqueeze(1), ends.to(torch.int32)
    member = ((position < ends) & (position >= F.pad(ends[:-1], (1, 0)))).to(rows.dtype)  # one-hot (R, E)
    hidden = torch.addmm(F.grouped_mm(rows, w1.mT, offs=offsets), member, b1).relu_()
    return torch.addmm(F.grouped_mm(hidden, w2, offs=offsets), member, b2)


def _blocks(rows: Tensor, ends: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Both layers as batched products over equal blocks of rows, each of one expert, its last block padded.

    There are as many blocks as the worst routing needs: no shape depends on the data, so the host need not wait.
    """
    count, num_experts = len(rows), len(ends)
    size = min(512, max(16, count // (4 * num_experts)))
    num_blocks = count // size + num_experts
    position, block = (torch.arange(n, device=rows.device) for n in (count, num_blocks))
    starts = F.pad(ends[:-1], (1, 0))
    blocks = (ends - starts + size - 1) // size
    last = blocks.cumsum(0)
    owner = torch.searchsorted(last, block, right=True).clamp(max=num_experts - 1)
    shift = (last - blocks) * size - starts  # of an expert's rows, from sorted to padded
    place = position + shift[torch.searchsorted(ends, position, right=True)]
    padded = rows.new_zeros(num_blocks * size, rows.shape[-1]).index_copy(0, place, rows).view(num_blocks, size, -1)
    hidden = _block_linear(padded, w1.mT, b1, owner).relu_()
    return _block_linear(hidden, w2, b2, owner).flatten(0, 1).index_select(0, place)


class _BlockLinear(torch.autograd.Function):
    """Blocks of rows (M, S, I) times their owner's weight (I, O); gathered weights live for one product only."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor, bias: Tensor, owner: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, owner)
        return torch.baddbmm(bias[owner].unsqueeze(1), rows, weight[owner])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        rows, weight, owner = ctx.saved_tensors
        member = (owner == torch.arange(len(weight), device=owner.device).unsqueeze(1)).to(grad.dtype)  # one-hot (E, M)
        grad_weight = (member @ (rows.mT @ grad).flatten(1)).view_as(weight)
        return grad @ weight[owner].mT, grad_weight, member @ grad.sum(1), None


_block_linear: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _BlockLinear.apply
