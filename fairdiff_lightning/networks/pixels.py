"""An autoencoder without weights: diffusion in pixels through everything that expects latents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Lossless stand-in for ``AutoencoderKL``, whose latents are the image's own pixels, patch by patch.

    Each level halves the side and makes four channels of one (space to depth), so that a small network sees few places
    and still draws every pixel. One level is plain pixel space.

    Args:
        in_channels: channels of the image.
        block_out_channels: channels after each level, ``in_channels`` times 1, 4, 16, ...; pipelines tell the factor
            between image and latents from its length.
        scaling_factor: what latents are multiplied by before noise is added; it should bring them to about unit
            variance.

    Shapes:
        image (B, C, H, W) in [-1, 1], H and W multiples of the patch; latents (B, C * patch^2, H / patch, W / patch).
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, in_channels: int = 1, block_out_channels: tuple[int, ...] = (1, 4, 16), scaling_factor: float = 1.0
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        expected = tuple(in_channels * 4**level for level in range(len(block_out_channels)))
        if tuple(block_out_channels) != expected:
            raise ValueError(f"block_out_channels {tuple(block_out_channels)}: {in_channels} channels make {expected}.")
        self.patch = 2 ** (len(block_out_channels) - 1)
        self.register_buffer("scaling", torch.tensor(float(scaling_factor)))  # tells device and type, and makes a file

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Latents of an image, as a distribution without spread."""
        distribution = IdentityDistribution(F.pixel_unshuffle(x, self.patch))
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """The image of latents; ``generator`` is there for the pipelines."""
        image = F.pixel_shuffle(z, self.patch)
        return DecoderOutput(sample=image) if return_dict else (image,)
