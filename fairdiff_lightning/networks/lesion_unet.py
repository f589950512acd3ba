"""LeFusion's pseudo-3-D U-Net: convolutions within slices, depth mixed by attention alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fairdiff_lightning.networks.checkpoint import LoadReport, Source
from fairdiff_lightning.networks.lesion_attention import (
    NUM_BUCKETS,
    DepthAttention,
    Positions,
    relative_buckets,
    rotary_angles,
)
from fairdiff_lightning.networks.lesion_blocks import (
    NORM_GROUPS,
    BinTokens,
    Level,
    Middle,
    Parts,
    Residual,
    SliceConv,
    SliceUpsampling,
    choose,
    sinusoidal,
)
from fairdiff_lightning.networks.lesion_weights import Weights, load_reference, reference_tensors

Conditioning = Literal["film", "cross_attention"]


class LesionUNet(nn.Module):
    """Noise predictor of LeFusion and of its mask diffusion.

    Zhang et al., *LeFusion: Controllable Pathology Synthesis via Lesion-Focused Diffusion Models*, ICLR 2025,
    arXiv:2403.14066. At ``width`` 64 it is the authors' network for LIDC (35,834,897 parameters), at ``width=72,
    channels=2, cond_dim=32`` that for Emidec (44,895,314), and with ``channels=2, out_channels=1, cond_dim=None``
    that of lesion masks (35,711,041).

    Args:
        channels: of the noisy volume; for lesion classes as channels, their number.
        out_channels: of the prediction; ``channels`` when None.
        width: channels at full resolution, a multiple of 8.
        multipliers: of the width at each level; all levels but the last halve height and width.
        cond_dim: length of the condition, 16 bins for each lesion class; None for no condition.
        conditioning: ``film`` joins the condition to the time embedding, which scales and shifts every residual block,
            as the authors' code does; ``cross_attention`` has one token for each bin, which the voxels attend to at
            each level, as the paper says.
        heads: of each attention.
        head_dim: features of a head.
        checkpointing: compute activations again in the backward pass instead of keeping them; less memory, more time.

    Shapes:
        noisy (B, C, H, W, D), height and width multiples of :attr:`stride`; any depth, the axis that slices are stacked
        on. steps (B,) or (); condition (B, cond_dim); output (B, out_channels, H, W, D). The authors' code has depth
        first, (B, C, D, H, W).

    Raises:
        ValueError: for a width that the norms cannot divide, or an unknown conditioning.
    """

    def __init__(
        self,
        channels: int = 1,
        out_channels: int | None = None,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        cond_dim: int | None = 16,
        conditioning: Conditioning = "film",
        heads: int = 8,
        head_dim: int = 32,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if width % NORM_GROUPS:
            raise ValueError(f"width {width}; expected is a multiple of {NORM_GROUPS}, the groups of its norms.")
        if conditioning not in get_args(Conditioning):
            raise ValueError(f"conditioning {conditioning!r}; expected is {' or '.join(get_args(Conditioning))}.")
        self.channels, self.width, self.head_dim = channels, width, head_dim
        self.cond_dim, self.conditioning, self.checkpointing = cond_dim or 0, conditioning, checkpointing
        attends = bool(cond_dim) and conditioning == "cross_attention"
        embedding = 4 * width + (0 if attends else self.cond_dim)
        parts = Parts(embedding, heads, head_dim, 4 * width if attends else None)

        self.conv_in = SliceConv(channels, width, 7, padding=3)
        self.depth_in = DepthAttention(width, heads, head_dim)
        self.relative_bias = nn.Embedding(NUM_BUCKETS, heads)
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 4 * width))
        self.null_condition = nn.Parameter(torch.randn(1, self.cond_dim)) if cond_dim else None
        self.tokens = BinTokens(self.cond_dim, 4 * width) if attends else None

        widths = [width, *(width * m for m in multipliers)]
        steps = list(pairwise(widths))
        self.downs = nn.ModuleList(Level(i, o, parts) for i, o in steps)
        self.halvings = nn.ModuleList(SliceConv(o, o, 4, stride=2, padding=1) for _, o in steps[:-1])
        self.middle = Middle(widths[-1], parts)
        self.ups = nn.ModuleList(Level(2 * o, i, parts) for i, o in reversed(steps))
        self.doublings = nn.ModuleList(SliceUpsampling(i, i, 4, stride=2, padding=1) for i, _ in reversed(steps[1:]))
        self.block_out = Residual(2 * width, width, None)
        self.conv_out = SliceConv(width, channels if out_channels is None else out_channels, 1)

    @property
    def stride(self) -> int:
        """What height and width must be multiples of."""
        return int(2 ** len(self.halvings))

    @property
    def strides(self) -> tuple[int, int, int]:
        """What height, width and depth must be multiples of."""
        return self.stride, self.stride, 1

    def forward(
        self, noisy: Tensor, steps: Tensor, condition: Tensor | None = None, dropped: Tensor | None = None
    ) -> Tensor:
        """Predict the noise of ``noisy``.

        Args:
            noisy: (B, C, H, W, D).
            steps: (B,) or (), counted from 0.
            condition: (B, cond_dim); the learned null condition when None.
            dropped: (B,) bool, samples that get the null condition all the same, as training for guidance wants.

        Raises:
            ValueError: for another number of channels or dimensions, a height or width that cannot be halved so often,
                or a condition of another length.
        """
        self._check(noisy, condition)
        x = noisy.permute(0, 4, 2, 3, 1).contiguous().permute(0, 1, 4, 2, 3)  # slices, channels last in memory
        embedded = self.time(sinusoidal(steps.expand(len(noisy)), self.width).to(noisy.dtype))
        tokens = None
        if self.null_condition is not None:
            chosen = choose(self.null_condition, condition, dropped, len(noisy)).to(noisy.dtype)
            if self.tokens is None:
                embedded = torch.cat([embedded, chosen], 1)
            else:
                tokens = self.tokens(chosen)
        embedded = F.silu(embedded)
        positions = self._positions(x)

        x = first = self.conv_in(x)
        x = self._run(self.depth_in, x, positions)
        skips = []
        for i, level in enumerate(self.downs):
            x = self._run(level, x, embedded, positions, tokens)
            skips.append(x)
            x = self.halvings[i](x) if i < len(self.halvings) else x
        x = self._run(self.middle, x, embedded, positions, tokens)
        for i, level in enumerate(self.ups):
            x = self._run(level, torch.cat([x, skips.pop()], 2), embedded, positions, tokens)
            x = self.doublings[i](x) if i < len(self.doublings) else x
        x = self._run(self.block_out, torch.cat([x, first], 2), None)
        predicted: Tensor = self.conv_out(x).permute(0, 2, 3, 4, 1).contiguous()
        return predicted

    def load_reference_weights(self, source: Source, weights: Weights = "raw") -> LoadReport:
        """Load a checkpoint of the authors' code, with its wrappers, schedule and rotary tables.

        Args:
            source: path or content of a file with ``model`` and ``ema`` beside each other, or one state dict.
            weights: ``raw`` as the authors generate with, ``ema`` their running average.

        Raises:
            CheckpointMismatchError: naming every missing, unexpected or misshapen tensor.
            ValueError: when the file holds no weights of this kind.
        """
        return load_reference(self, source, weights)

    def reference_tensors(self) -> dict[str, Tensor]:
        """This network's tensors under the names and shapes that the authors' code gives them, sharing memory.

        Cross-attention, which that code does not have, keeps its names.
        """
        return reference_tensors(self)

    def _run(self, part: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            again: Tensor = checkpoint(part, *inputs, use_reentrant=False)
            return again
        out: Tensor = part(*inputs)
        return out

    def _positions(self, x: Tensor) -> Positions:
        bias = self.relative_bias(relative_buckets(x.shape[1], x.device)).permute(2, 0, 1)
        return Positions(bias, *rotary_angles(x.shape[1], self.head_dim, x))

    def _check(self, noisy: Tensor, condition: Tensor | None) -> None:
        if noisy.dim() != 5 or noisy.shape[1] != self.channels:
            raise ValueError(
                f"noisy has shape {tuple(noisy.shape)}; expected is (B, {self.channels}, H, W, D), depth last."
            )
        if any(side % self.stride for side in noisy.shape[2:4]):
            raise ValueError(
                f"slices of {noisy.shape[2]} x {noisy.shape[3]} cannot be halved {len(self.halvings)} times; pad "
                f"height and width to multiples of {self.stride}."
            )
        if condition is not None and condition.shape != (len(noisy), self.cond_dim):
            raise ValueError(
                f"condition has shape {tuple(condition.shape)}; expected is {(len(noisy), self.cond_dim)}, the bins of "
                "all lesion classes in one row for each sample (cond_dim)."
            )
