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
    if tokens.device.type == "cuda" and compute_dtype(tokens) == torch.bfloat16 and tokens.shape[-1] % 8 == 0:
        return "grouped" if torch.cuda.get_device_capability(tokens.device) >= (8, 0) else "blocks"
    return "blocks"


def prepare_experts(experts: Iterable[Iterable[Tensor]], dtype: torch.dtype, dispatch: Dispatch) -> ExpertFunction:
    """Experts as one function, for a single forward pass, in which it may be called often.

    What can be done once is done here: the parameters are cast, and stacked for the ways that need it.

    Args:
        experts: of each, weight (H, C) and bias (H,) of the first layer, weight (H, C) and bias (C,) of the second.
        dtype: of the rows.
        dispatch: the way.
    """
    parameters = [[p.to(dtype) for p in expert] for expert in experts]
    if dispatch == "split":
        return _SplitExperts(parameters)
    w1, b1, w2, b2 = (torch.stack(kind) for kind in zip(*parameters, strict=True))
    return partial(_grouped if dispatch == "grouped" else _blocks, w1=w1, b1=b1, w2=w2, b2=b2)


class _SplitExperts:
    """One product per expert on its own rows; the sizes are read by the host, which costs nothing on a CPU.

    The weights pass through every call, so that their gradient comes back through every call, growing in place: where
    blocks share the experts, autograd would make and add as many gradients of 151 MB (ViT-B) as there are blocks.
    """

    def __init__(self, parameters: list[list[Tensor]]) -> None:
        self.parameters = [p for expert in parameters for p in expert]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        out: Tensor
        out, *self.parameters = _SplitMLP.apply(rows, sizes, *self.parameters)  # type: ignore[no-untyped-call]
        return out


class _SplitMLP(torch.autograd.Function):
    """Rows, sizes and (w1, b1, w2, b2) of each expert -> rows, and the parameters again."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, sizes: list[int], *parameters: Tensor) -> tuple[Tensor, ...]:
        hidden, out = rows.new_empty(len(rows), len(parameters[0])), torch.empty_like(rows)
        parts = zip(rows.split(sizes), hidden.split(sizes), out.split(sizes), _by_expert(parameters), strict=True)
        for x, h, y, (w1, b1, w2, b2) in parts:
            torch.addmm(b1, x, w1.t(), out=h).relu_()
            torch.addmm(b2, h, w2, out=y)
        ctx.set_materialize_grads(False)
        ctx.sizes = sizes  # type: ignore[attr-defined]
        ctx.save_for_backward(rows, hidden, *parameters)
        return out, *(p.detach() for p in parameters)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor | None, *sums: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, *sums
        rows, hidden, *parameters = ctx.saved_tensors
        grad, grad_rows = grad.contiguous(), torch.empty_like(rows)
        parts = zip(*(t.split(ctx.sizes) for t in (rows, hidden, grad, grad_rows)), strict=True)
        total: list[Tensor | None] = []
        for (x, h, g, gx), (w1, _, w2, _), (s1, t1, s2, t2) in zip(
            parts, _by_expert(parameters), _by_expert(sums), strict=True
        ):
            gh = torch.ops.aten.threshold_backward(g @ w2.t(), h, 0)
            torch.mm(gh, w1, out=gx)
            if any(ctx.needs_input_grad[2:]):
                total += [_add_product(s1, gh, x), _add_sum(t1, gh), _add_product(s2, h, g), _add_sum(t2, g)]
        return grad_rows, None, *(total or sums)


def _by_expert(parameters: Any) -> list[Any]:
    return [parameters[i : i + 4] for i in range(0, len(parameters), 4)]


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left.t() @ right if total is None else torch.addmm(total, left.t(), right, out=total)


def _add_sum(total: Tensor | None, grad: Tensor) -> Tensor:
    return grad.sum(0) if total is None else total.add_(grad.sum(0))


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
