"""The parts of a Stable Diffusion from a folder or hub of diffusers, or a tiny one from its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fairdiff_lightning.networks.prompts import LEARNED_FILE, PromptEncoder, read_learned

TINY = "tiny"
TINY_UNET: dict[str, Any] = {
    "block_out_channels": (64, 96, 128),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "addition_embed_type": "text",  # the prompt also joins the embedding of the step, which every block sees
    "resnet_time_scale_shift": "scale_shift",
}
TINY_AUTOENCODER: dict[str, Any] = {"patch_size": 4, "scaling_factor": 3.0}
TINY_NOISE: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
"""Sampling starts from pure noise, so training must reach it too: otherwise every image keeps the mean brightness."""


@dataclass
class LatentDiffusion:
    """What a latent diffusion consists of.

    Attributes:
        unet: ``UNet2DConditionModel``.
        vae: ``AutoencoderKL``, or :class:`~fairdiff_lightning.networks.pixels.PatchAutoencoder` for pixels.
        noise: arguments of the noise schedule, for any scheduler of diffusers.
        prompts: the text encoder, None when there is none.
        learned: prompts that were learned instead, None when there are none.
        texts: of samples, that some of these are of.
        trained: whether the UNet has trained weights, which a new control branch must not disturb.
    """

    unet: Any
    vae: Any
    noise: dict[str, Any]
    prompts: PromptEncoder | None = None
    learned: Mapping[str, Tensor] | None = None
    texts: Sequence[str] = ()
    trained: bool = True

    @property
    def factor(self) -> int:
        """Pixels of the image to one of the latents, along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def check_images(self, size: tuple[int, int], channels: int) -> None:
        """Refuse images (channels, *size) that the base cannot make."""
        if any(side % self.factor for side in size):
            raise ValueError(f"image_size {size}: the base needs sides that are multiples of {self.factor}.")
        wanted = self.vae.config.in_channels
        if channels not in (1, wanted):
            raise ValueError(
                f"in_channels {channels}: the base makes images of {wanted} channels, which serve 1 or {wanted}."
            )


def make_pipeline(unet: Any, vae: Any, controlnet: Any, scheduler: Any, prompts: PromptEncoder | None) -> Any:
    """A ``StableDiffusionControlNetPipeline`` of these networks (not of copies), without a safety checker."""
    from diffusers import StableDiffusionControlNetPipeline

    return StableDiffusionControlNetPipeline(  # type: ignore[no-untyped-call]
        vae=vae,
        text_encoder=getattr(prompts, "encoder", None),
        tokenizer=getattr(prompts, "tokenizer", None),
        unet=unet,
        controlnet=controlnet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_base(source: str, in_channels: int, arguments: Mapping[str, Any], pretrained: bool = True) -> LatentDiffusion:
    """Build a base.

    Args:
        source: ``tiny``, a hub id, or a folder that ``save_pretrained`` of a Stable Diffusion pipeline wrote.
        in_channels: channels of the data's images, which the tiny base is built for.
        arguments: of the tiny base: any of ``UNet2DConditionModel``, and ``patch_size`` and ``scaling_factor``.
        pretrained: load the weights of UNet and autoencoder; otherwise a folder's configurations suffice.

    Raises:
        ValueError: for a folder that is no such pipeline, saying what it lacks, a Stable Diffusion of another kind
            (XL, inpainting), saying what differs, or a wrong argument.
    """
    if source == TINY:
        return _tiny(in_channels, arguments)
    if arguments:
        raise ValueError(f"base_args {sorted(arguments)} are for base='tiny'; '{source}' brings its own configuration.")
    folder = Path(source)
    if folder.is_dir():
        _check_folder(folder, ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"))
    try:
        base = _load(source, pretrained, has_text=not folder.is_dir() or (folder / "text_encoder").is_dir())
    except OSError as error:
        raise ValueError(
            f"base='{source}' cannot be loaded: it is neither a whole folder that a Stable Diffusion pipeline was "
            f"saved to, nor an id that the hub (reachable?) knows, nor 'tiny'. ({error})"
        ) from error
    _check_parts(base, source)
    if pretrained and base.prompts is None and (folder / LEARNED_FILE).is_file():
        base.learned, base.texts = read_learned(folder / LEARNED_FILE)
    return base


def _load(source: str, pretrained: bool, has_text: bool) -> LatentDiffusion:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    from fairdiff_lightning.networks.pixels import PatchAutoencoder

    unet = _model((UNet2DConditionModel,), source, "unet", pretrained)
    vae = _model((AutoencoderKL, PatchAutoencoder), source, "vae", pretrained)
    # latents are not bounded, so they are not clipped unless the base says so
    noise = {"clip_sample": False, **DDPMScheduler.load_config(source, subfolder="scheduler")}
    return LatentDiffusion(unet, vae, noise, _prompts(source) if has_text else None, trained=pretrained)


def _tiny(in_channels: int, arguments: Mapping[str, Any]) -> LatentDiffusion:
    from diffusers import UNet2DConditionModel

    from fairdiff_lightning.networks.pixels import PatchAutoencoder

    chosen = {**TINY_UNET, **TINY_AUTOENCODER, **arguments}
    patch, scaling = chosen.pop("patch_size"), chosen.pop("scaling_factor")
    if patch < 1 or patch & (patch - 1):
        raise ValueError(f"base_args: patch_size {patch}; expected is a power of two.")
    width, heads = chosen["cross_attention_dim"], 64  # which a ControlNet gives "text" whatever the UNet has
    if chosen["addition_embed_type"] == "text" and width % heads:
        raise ValueError(
            f"base_args: cross_attention_dim {width}; addition_embed_type='text' needs a multiple of {heads}."
        )
    channels, levels = in_channels * patch**2, len(chosen["block_out_channels"])
    down, up = ["DownBlock2D"] * levels, ["UpBlock2D"] * levels
    down[-1], up[0] = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"  # where there are few places
    fixed = {"in_channels": channels, "out_channels": channels, "down_block_types": down, "up_block_types": up}
    try:
        unet = UNet2DConditionModel(**{**fixed, **chosen})  # type: ignore[no-untyped-call]
    except TypeError as error:
        raise ValueError(
            f"base_args: {error}; beside patch_size and scaling_factor they are arguments of it."
        ) from error
    widths = tuple(in_channels * 4**level for level in range(patch.bit_length()))
    return LatentDiffusion(unet, PatchAutoencoder(in_channels, widths, scaling), dict(TINY_NOISE), trained=False)


def _model(classes: tuple[Any, ...], source: str, part: str, pretrained: bool) -> Any:
    config = classes[0].load_config(source, subfolder=part)
    known = {cls.__name__: cls for cls in classes}
    if config.get("_class_name") not in known:
        raise ValueError(
            f"base='{source}': its {part} is of class {config.get('_class_name')}; that of a Stable Diffusion 1 or 2 "
            f"is {classes[0].__name__}."
        )
    cls = known[config["_class_name"]]
    return cls.from_pretrained(source, subfolder=part) if pretrained else cls.from_config(config)


def _check_parts(base: LatentDiffusion, source: str) -> None:
    """Refuse parts that need more than a noisy latent, a step and a prompt, or do not fit each other."""
    unet, vae, text = base.unet.config, base.vae.config, base.prompts
    latents = vae.get("latent_channels", vae.in_channels * base.factor**2)  # the patches of pixels have no such entry
    wrong = []
    if unet.addition_embed_type not in (None, "text"):
        wrong.append(f"its UNet has addition_embed_type '{unet.addition_embed_type}', as Stable Diffusion XL has")
    if unet.in_channels != latents:
        wrong.append(f"its UNet takes {unet.in_channels} channels and its autoencoder makes {latents} (inpainting?)")
    if text is not None and text.encoder.config.hidden_size != unet.cross_attention_dim:
        width = text.encoder.config.hidden_size
        wrong.append(f"its text encoder makes {width} channels and its UNet expects {unet.cross_attention_dim}")
    if wrong:
        raise ValueError(f"base='{source}': {'; '.join(wrong)}. Give a text-to-image Stable Diffusion 1 or 2.")


def _prompts(source: str) -> PromptEncoder:
    from transformers import CLIPTextModel, CLIPTokenizer

    return PromptEncoder(
        CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"),
        CLIPTextModel.from_pretrained(source, subfolder="text_encoder"),
    )


def _check_folder(folder: Path, files: tuple[str, ...]) -> None:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise ValueError(
            f"base='{folder}' is no folder of a diffusers Stable Diffusion pipeline: {', '.join(missing)} missing; it "
            f"holds {', '.join(found) or 'nothing'}. Give the folder that save_pretrained of the pipeline wrote."
        )
