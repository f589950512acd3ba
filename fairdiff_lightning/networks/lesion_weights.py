"""Checkpoints of LeFusion's code: which weights of a file, and the names and shapes that its U-Net has there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from fairdiff_lightning.networks.checkpoint import (
    LoadReport,
    Source,
    check_state_dict,
    describe,
    load_strictly,
    read_checkpoint,
    read_state_dict,
)

Weights = Literal["raw", "ema"]

_SCHEDULE = frozenset(
    (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    )
)
_RENAMED = (
    (r"^conv_in\.", "init_conv."),
    (r"^depth_in\.", "init_temporal_attn.along."),
    (r"^relative_bias\.", "time_rel_pos_bias.relative_attention_bias."),
    (r"^time\.0\.", "time_mlp.1."),
    (r"^time\.2\.", "time_mlp.3."),
    (r"^null_condition$", "null_cond_emb"),
    (r"^halvings\.(\d+)\.", r"downs.\1.4."),
    (r"^doublings\.(\d+)\.", r"ups.\1.4."),
    (r"^(downs|ups)\.(\d+)\.block1\.", r"\1.\2.0."),
    (r"^(downs|ups)\.(\d+)\.block2\.", r"\1.\2.1."),
    (r"^(downs|ups)\.(\d+)\.within\.", r"\1.\2.2.linear."),
    (r"^(downs|ups)\.(\d+)\.along\.", r"\1.\2.3.along."),
    (r"^middle\.block(\d)\.", r"mid_block\1."),
    (r"^middle\.within\.", "mid_spatial_attn.along."),
    (r"^middle\.along\.", "mid_temporal_attn.along."),
    (r"^block_out\.", "final_conv.0."),
    (r"^conv_out\.", "final_conv.1."),
    (r"\.(along|linear)\.norm\.weight$", ".fn.norm.gamma"),
    (r"\.along\.", ".fn.fn.fn."),
    (r"\.linear\.", ".fn.fn."),
    (r"\.film\.", ".mlp.1."),
    (r"\.conv([12])\.", r".block\1.proj."),
    (r"\.norm([12])\.", r".block\1.norm."),
    (r"\.shortcut\.", ".res_conv."),
)


def reference_name(name: str) -> str:
    """The authors' name of a tensor of :class:`LesionUNet`."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def reference_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The network's tensors under the names and shapes that the authors' code gives them, sharing memory.

    Cross-attention, which that code does not have, keeps its names.
    """
    return {reference_name(name): _as_in_reference(name, tensor) for name, tensor in network.state_dict().items()}


def load_reference(network: nn.Module, source: Source, weights: Weights = "raw") -> LoadReport:
    """Load a checkpoint of the authors' code into a ``LesionUNet``.

    Args:
        network: to fill.
        source: path or content of a file ``{step, model, ema, scaler}``, or a state dict as either of the two is.
        weights: ``raw`` takes ``model``, ``ema`` the running average.

    Raises:
        CheckpointMismatchError: naming every missing, unexpected or misshapen tensor.
        ValueError: for other weights than these, or a file without them.
    """
    named = read_state_dict(_chosen(source, weights))
    found = {re.sub(r"^(denoise_fn\.|module\.)+", "", name): tensor for name, tensor in named.items()}
    ignored = tuple(name for name in found if name in _SCHEDULE or name.endswith(".rotary_emb.freqs"))
    for name in ignored:
        del found[name]
    wanted = reference_tensors(network)
    check_state_dict(found, wanted, describe(source))
    return LoadReport(describe(source), load_strictly(found, wanted).loaded, ignored)


def _as_in_reference(name: str, tensor: Tensor) -> Tensor:
    """A view in the authors' shape: they convolve volumes with flat kernels, and slices in linear attention."""
    if re.search(r"(within|along|depth_in)\.norm\.weight$", name):
        return tensor.view(1, -1, 1, 1, 1)
    if re.match(r"(downs|ups)\.\d+\.within\..*weight$", name):
        return tensor[..., None, None]
    return tensor.unsqueeze(2) if tensor.dim() == 4 else tensor


def _chosen(source: Source, weights: Weights) -> Source:
    """The state dict of a file that holds two, or a state dict as it is."""
    if weights not in get_args(Weights):
        raise ValueError(f"weights {weights!r}; expected is {' or '.join(get_args(Weights))}.")
    content: Any = source if isinstance(source, Mapping) else read_checkpoint(Path(source))
    if not {"model", "ema"} & content.keys():
        state_dict: Source = content
        return state_dict
    key = "model" if weights == "raw" else "ema"
    if key not in content:
        raise ValueError(
            f"{describe(source)} has no {key!r}, which weights={weights!r} asks for; it holds {', '.join(content)}."
        )
    chosen: Source = content[key]
    return chosen
