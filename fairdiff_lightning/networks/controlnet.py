"""The control branch: grown from a UNet, read from diffusers, from an original ``cldm`` checkpoint, or from ours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from fairdiff_lightning.networks.checkpoint import check_state_dict, describe, read_state_dict
from fairdiff_lightning.networks.cldm import load_cldm

HINT_WIDTHS = (16, 32, 96, 256)
"""Channels of the condition's encoder; each but the first halves the side."""
SHARED = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "down_block_types")
"""What control branch and UNet must have in common."""
BRANCH, UNET = "controlnet.", "unet."
"""Where checkpoints of ``ControlNetSynth`` have their tensors."""


def build_controlnet(source: str | None, unet: Any, factor: int, channels: int, silent: bool = True) -> Any:
    """Make a ``ControlNetModel`` for a UNet.

    Args:
        source: None grows it from the UNet's weights; else a folder or hub id of diffusers, a checkpoint of
            ``ControlNetSynth``, or a file in the original ``cldm`` layout (``.ckpt``, ``.pth``, ``.safetensors``).
        unet: ``UNet2DConditionModel`` that it will steer.
        factor: pixels of the condition to one of the latents, along each side.
        channels: channels of the condition.
        silent: a branch grown from the UNet begins without effect (zero convolutions), as a trained UNet needs it; one
            that is trained from scratch learns to follow its condition sooner without.

    Raises:
        ValueError: when the source holds no ControlNet, or one for another UNet or condition.
        CheckpointMismatchError: naming every missing, unexpected or misshapen tensor of a file.
    """
    from diffusers import ControlNetModel

    levels = factor.bit_length()
    widths = (*HINT_WIDTHS, *HINT_WIDTHS[-1:] * levels)[:levels]
    if source is not None and not Path(source).is_file():
        return _checked(_load(source), source, unet, len(widths), channels)
    grown = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=widths, conditioning_channels=channels, load_weights_from_unet=True
    )
    if source is not None:
        _load_file(source, grown)
    elif not silent:
        outlets = (*grown.controlnet_down_blocks, grown.controlnet_mid_block)
        for convolution in (*outlets, grown.controlnet_cond_embedding.conv_out):
            convolution.reset_parameters()
    return grown


def _load_file(source: str, controlnet: Any) -> None:
    """Fill a control branch from a checkpoint, ours or one in the original layout, strictly."""
    state = read_state_dict(source)
    branch = {name.removeprefix(BRANCH): tensor for name, tensor in state.items() if name.startswith(BRANCH)}
    if not branch:
        load_cldm([controlnet], state, describe(source))
        return
    check_state_dict(branch, controlnet.state_dict(), f"the control branch of {describe(source)}")
    controlnet.load_state_dict(branch)
    trained = sum(name.startswith(UNET) for name in state)
    if trained:
        warnings.warn(
            f"controlnet={describe(source)} takes the control branch alone; {trained} tensors of the UNet were trained "
            "with it and stay behind. Call save_pretrained(folder) of that module and go on with base=folder, "
            "controlnet=folder/controlnet.",
            stacklevel=2,
        )


def _load(source: str) -> Any:
    from diffusers import ControlNetModel

    try:
        kind = ControlNetModel.load_config(source).get("_class_name")
        if kind == ControlNetModel.__name__:
            return ControlNetModel.from_pretrained(source)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ValueError(
            f"controlnet='{source}' cannot be loaded: it is no file, no folder with a ControlNet's config.json, and no "
            "id that the hub (reachable?) knows. Weights that come from a checkpoint of ours need none: reload with "
            f"controlnet=None. ({error})"
        ) from error
    raise ValueError(f"controlnet='{source}' holds a {kind}; expected is a ControlNetModel.")


def _checked(controlnet: Any, source: str, unet: Any, levels: int, channels: int) -> Any:
    found, wanted = controlnet.config, unet.config
    pairs = {key: (_plain(found[key]), _plain(wanted[key])) for key in SHARED}
    differences = [f"{key} {ours}, the UNet has {its}" for key, (ours, its) in pairs.items() if ours != its]
    if found.conditioning_channels != channels:
        differences.append(f"conditioning_channels {found.conditioning_channels}, the condition has {channels}")
    if len(found.conditioning_embedding_out_channels) != levels:
        differences.append(
            f"conditions {2 ** (len(found.conditioning_embedding_out_channels) - 1)} times as wide as the latents, the "
            f"autoencoder makes them {2 ** (levels - 1)} times"
        )
    if differences:
        raise ValueError(f"controlnet='{source}' does not fit: {'; '.join(differences)}.")
    return controlnet


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # as configurations come from JSON
