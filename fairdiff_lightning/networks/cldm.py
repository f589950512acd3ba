"""Names of the original ControlNet code (``cldm``, ``ldm``) for diffusers' tensors, and the way back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fairdiff_lightning.networks.checkpoint import LoadReport, check_state_dict
from fairdiff_lightning.networks.prompts import PromptEncoder

PREFIXES = {"ControlNetModel": "control_model.", "UNet2DConditionModel": "model.diffusion_model."}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_FIXED = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
}
_LAYER = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_HINT = re.compile(r"controlnet_cond_embedding\.blocks\.(\d+)\.(.+)")
_ZERO = re.compile(r"controlnet_down_blocks\.(\d+)\.(.+)")


def original_names(network: Any) -> dict[str, str]:
    """Name in diffusers -> name in ``cldm``, without the prefix, of every tensor.

    Args:
        network: a ``ControlNetModel`` or ``UNet2DConditionModel`` of Stable Diffusion 1 or 2.

    Raises:
        ValueError: when the network has a part that the original code has not.
    """
    config = network.config
    names = {name: _original(name, config) for name in network.state_dict()}
    foreign = [name for name, original in names.items() if original is None]
    if foreign:
        raise ValueError(f"{type(network).__name__}: {', '.join(foreign[:8])} have no place in the cldm layout.")
    return {name: original for name, original in names.items() if original is not None}


def to_cldm(*networks: nn.Module) -> dict[str, Tensor]:
    """Tensors of a ControlNet, and of a UNet, in the original layout: what :func:`load_cldm` reads."""
    return {
        PREFIXES[type(network).__name__] + original: network.state_dict()[name]
        for network in networks
        for name, original in original_names(network).items()
    }


@dataclass(frozen=True)
class Match:
    """A network and the part of a checkpoint that fits it.

    Attributes:
        network: has ``load_state_dict``.
        tensors: by the network's own names.
        names: of the tensors, as the checkpoint has them.
    """

    network: Any
    tensors: Mapping[str, Tensor]
    names: tuple[str, ...]

    def load(self) -> None:
        """Copy the tensors into the network."""
        self.network.load_state_dict(self.tensors)


def load_cldm(
    networks: Sequence[nn.Module],
    state: Mapping[str, Tensor],
    source: str,
    vae: Any = None,
    prompts: PromptEncoder | None = None,
) -> LoadReport:
    """Load an original checkpoint strictly, all of it or nothing.

    Args:
        networks: a ``ControlNetModel`` and a ``UNet2DConditionModel``, or one of them; their parts must be there.
        state: tensors of the checkpoint; other parts are left alone, and a ControlNet may come without its prefix.
        source: the checkpoint's name for messages.
        vae: ``AutoencoderKL``, loaded from ``first_stage_model`` where that is there.
        prompts: with a CLIP text encoder, loaded from ``cond_stage_model`` where that is there.

    Raises:
        ValueError: when the checkpoint lacks a network's part, naming those that it has.
        CheckpointMismatchError: naming every missing, unexpected or misshapen tensor.
    """
    found = [_match(network, state, source) for network in networks]
    found += [_match_autoencoder(vae, state, source)] if vae is not None else []
    found += [_match_text_encoder(prompts, state, source)] if prompts is not None else []
    found = [match for match in found if match.names]
    for match in found:
        match.load()
    loaded = tuple(name for match in found for name in match.names)
    known = set(loaded)
    return LoadReport(source, loaded, tuple(name for name in state if name not in known))


def _match(network: nn.Module, state: Mapping[str, Tensor], source: str) -> Match:
    kind = type(network).__name__
    prefix = PREFIXES[kind]
    if kind == "ControlNetModel" and "zero_convs.0.0.weight" in state:
        prefix = ""
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not found:
        parts = sorted({name.split(".")[0] for name in state})
        raise ValueError(
            f"{source} holds no '{prefix}*', so no {kind} in the original cldm layout; its tensors begin with "
            f"{', '.join(parts[:8])}. For diffusers' layout give the folder that holds config.json."
        )
    names, tensors = original_names(network), network.state_dict()
    check_state_dict(found, {original: tensors[name] for name, original in names.items()}, source)
    renamed = {name: found[original] for name, original in names.items()}
    return Match(network, renamed, tuple(prefix + original for original in names.values()))


def _match_autoencoder(vae: Any, state: Mapping[str, Tensor], source: str) -> Match:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    parts = tuple(f"first_stage_model.{part}." for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"))
    found = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    if not found:
        return Match(vae, {}, ())
    converted = convert_ldm_vae_checkpoint(found, vae.config)  # type: ignore[no-untyped-call]
    check_state_dict(converted, vae.state_dict(), f"the first_stage_model of {source}, in diffusers' names,")
    return Match(vae, converted, tuple(found))


def _match_text_encoder(prompts: PromptEncoder, state: Mapping[str, Tensor], source: str) -> Match:
    prefix, expected = "cond_stage_model.transformer.", prompts.encoder.state_dict()
    names = [name for name in state if name.startswith(prefix) and not name.endswith("position_ids")]
    flat = not any(name.startswith("text_model.") for name in expected)  # transformers 5.6 dropped the level
    inner = f"{prefix}text_model." if flat else prefix
    found = {name.removeprefix(inner): state[name] for name in names}
    if names:
        check_state_dict(found, expected, f"the cond_stage_model of {source}")
    return Match(prompts, found, tuple(names))


def _original(name: str, config: Any) -> str | None:
    if match := _LAYER.fullmatch(name):
        return _layer(match, config)
    if match := _MIDDLE.fullmatch(name):
        kind, index, rest = match.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{_inner(kind, rest)}"
    if match := _HINT.fullmatch(name):
        return f"input_hint_block.{2 * (int(match[1]) + 1)}.{match[2]}"
    if match := _ZERO.fullmatch(name):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    module, _, tensor = name.rpartition(".")
    if module == "controlnet_cond_embedding.conv_out":
        return f"input_hint_block.{4 * len(config.conditioning_embedding_out_channels) - 2}.{tensor}"
    return f"{_FIXED[module]}.{tensor}" if module in _FIXED else None


def _layer(match: re.Match[str], config: Any) -> str:
    """A layer of a block; the original code counts the layers of all blocks, samplers among them."""
    side, block, kind, index, rest = match.groups()
    layers = config.layers_per_block + 1
    first = int(block) * layers
    if kind == "downsamplers":
        return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in config.up_block_types[int(block)] else 1
        return f"output_blocks.{first + layers - 1}.{place}.{rest}"
    name, number = ("input_blocks", first + 1) if side == "down_blocks" else ("output_blocks", first)
    return f"{name}.{number + int(index)}.{1 if kind == 'attentions' else 0}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    part, _, tensor = rest.partition(".")
    return f"{_RESNET[part]}.{tensor}" if kind == "resnets" else rest
