"""SAMed: the Segment Anything model of transformers, adapted by low-rank updates of its image encoder's attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamConfig, SamModel
from transformers.models.sam.modeling_sam import SamMaskDecoder

from fairdiff_lightning.networks.checkpoint import check_state_dict, describe, read_state_dict

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of SAM's preprocessing, for images in [0, 1]
_POSITIONS = "shared_image_embedding.positional_embedding"
_TIED_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
_FRESH = tuple(f"mask_decoder.{part}." for part in ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head"))
"""What depends on the number of masks; it starts from random weights, as in the authors' code."""


class SAMed(nn.Module):
    """SAM with low-rank updates of queries and values (LoRA, by peft), and one mask token per class.

    Zhang and Liu, *Customized Segment Anything Model for Medical Image Segmentation*, arXiv:2304.13785. No prompt is
    given: the decoder sees SAM's embedding of "no mask". The image encoder is frozen but for the low-rank updates, so
    that it needs ``pretrained`` weights to be of use; prompt encoder and mask decoder are trained. The decoder's head
    for the quality of masks and the embeddings of points, boxes and masks take no part and get no gradient: with
    DistributedDataParallel, choose ``find_unused_parameters``.

    Args:
        num_classes: K, the background included; at least 2.
        in_channels: 1, which is repeated to three inside, or 3.
        image_size: side of the square image in pixels, a multiple of the patch (16).
        pretrained: folder with SAM in transformers' format (``config.json`` and ``model.safetensors``); its position
            embeddings are resampled to ``image_size``. None for random weights of ViT-B's sizes.
        rank: of the low-rank updates.
        normalize: by SAM's mean and standard deviation; False leaves the image in [0, 1], as the authors' code does.
        config: sizes other than ViT-B's, where there is no folder: ``vision_config``, ``prompt_encoder_config`` and
            ``mask_decoder_config`` of transformers' ``SamConfig``, each a dictionary.

    Shapes:
        image (B, C, H, W) in [0, 1], H = W = ``image_size``; logits (B, K, H, W).

    Raises:
        ValueError: for an argument out of its range, or a folder without SAM.
        CheckpointMismatchError: naming every tensor of the folder that does not fit its configuration.

    Differences from the reference:
        ==============  =====================================  ===============================  ====================
        What            Reference code                         Here                             To restore
        ==============  =====================================  ===============================  ====================
        normalization   none                                   SAM's                            ``normalize=False``
        loss            on logits of a quarter of the side     on logits of the image's size    not offered
        ==============  =====================================  ===============================  ====================
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int = 2,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 512,
        pretrained: str | None = None,
        rank: int = 4,
        normalize: bool = True,
        config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(num_classes, in_channels, rank)
        sizes = _default_config(config or {}) if pretrained is None else _folder_config(pretrained, config)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.image_size = _checked_side(image_size, sizes.vision_config.patch_size)
        self.sam: Any = _build_sam(sizes, self.image_size, num_classes, pretrained)
        for layer in self.sam.vision_encoder.layers:
            layer.attn.qkv = SplitProjection(layer.attn.qkv)
        updates = LoraConfig(r=rank, lora_alpha=rank, target_modules=r".*\.qkv\.(query|value)")  # alpha = r: no scaling
        inject_adapter_in_model(updates, self.sam.vision_encoder)  # which freezes all else in it
        for name, values in (("mean", _MEAN if normalize else (0.0,) * 3), ("std", _STD if normalize else (1.0,) * 3)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, H, W) of images (B, C, H, W).

        Raises:
            ValueError: for an image of other channels or sides than the network was built for.
        """
        wanted = (self.in_channels, self.image_size, self.image_size)
        if tuple(image.shape[1:]) != wanted:
            raise ValueError(f"the images have shape {tuple(image.shape[1:])}, but this SAMed was built for {wanted}.")
        normal = (image - self.mean) / self.std
        features = self.sam.vision_encoder(normal).last_hidden_state
        _, no_mask = self.sam.prompt_encoder(None, None, None, None)
        masks = self.sam.mask_decoder(features + no_mask, self.sam.get_image_wide_positional_embeddings())
        return F.interpolate(masks, size=image.shape[2:], mode="bilinear", align_corners=False)


class SplitProjection(nn.Module):
    """SAM's fused projection (..., D) -> (..., 3 D) as those to query, key and value, which can be adapted one by one.

    Args:
        fused: the projection that it takes the place of, with the same output.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        sizes = fused.in_features, fused.out_features // 3, fused.bias is not None
        self.query, self.key, self.value = (nn.Linear(*sizes) for _ in range(3))
        for i, projection in enumerate((self.query, self.key, self.value)):
            projection.load_state_dict({name: whole.chunk(3)[i] for name, whole in fused.named_parameters()})

    def forward(self, x: Tensor) -> Tensor:
        """Query, key and value, one after the other, of x."""
        return torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)


class ClassDecoder(SamMaskDecoder):
    """SAM's mask decoder, all of whose mask tokens are classes."""

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (B, K, 4 h, 4 w) of features (B, C, h, w) at positions (1, C, h, w)."""
        shape = features.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(len(features), 1, -1, -1)
        tokens, features = self.transformer(tokens, features, positions, attention_similarity=None)
        features = features.transpose(2, 3).reshape(shape)
        features = self.activation(self.upscale_layer_norm(self.upscale_conv1(features)))
        features = self.activation(self.upscale_conv2(features))
        heads = zip(self.output_hypernetworks_mlps, tokens[:, 0, 1:].unbind(1), strict=True)
        weights = torch.stack([head(token) for head, token in heads], dim=1)
        return torch.einsum("bkc, bchw -> bkhw", weights, features)


def _build_sam(config: Any, side: int, num_classes: int, pretrained: str | None) -> Any:
    """SAM for images of this side, its mask decoder with as many masks as classes."""
    config.vision_config.image_size = config.prompt_encoder_config.image_size = side
    config.prompt_encoder_config.image_embedding_size = side // config.vision_config.patch_size
    config.mask_decoder_config.num_multimask_outputs = num_classes - 1  # one more mask token than these
    sam: Any = SamModel(config)
    sam.mask_decoder = ClassDecoder(config.mask_decoder_config)
    if pretrained is not None:
        _load_sam(sam, Path(pretrained) / "model.safetensors")
    positions = sam.shared_image_embedding
    fixed = positions.positional_embedding.detach()
    del positions.positional_embedding  # SAM's random frequencies are constants, which transformers holds as parameters
    positions.register_buffer("positional_embedding", fixed)
    sam.prompt_encoder.shared_embedding = positions
    return sam


def _load_sam(sam: nn.Module, path: Path) -> None:
    """Load all but what depends on the number of masks; position embeddings are resampled."""
    targets = {name: tensor for name, tensor in sam.named_parameters() if not name.startswith(_FRESH)}
    found = {name: tensor for name, tensor in read_state_dict(path).items() if not name.startswith(_FRESH)}
    tied = found.pop(_TIED_POSITIONS, None)
    if tied is not None:
        found.setdefault(_POSITIONS, tied)
    for name in found.keys() & targets.keys():
        if name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")):
            found[name] = _resampled(found[name], targets[name].shape)
    check_state_dict(found, targets, describe(path))
    sam.load_state_dict(found, strict=False)  # strict for all that is not fresh: just checked


def _resampled(table: Tensor, shape: torch.Size) -> Tensor:
    """Positions (1, h, w, C), or relative positions (L, C), linearly resampled to another grid of the same C."""
    if table.ndim == 2:
        return F.interpolate(table.T[None], size=shape[0], mode="linear", align_corners=False)[0].T
    grid = F.interpolate(table.permute(0, 3, 1, 2), size=shape[1:3], mode="bilinear", align_corners=False)
    return grid.permute(0, 2, 3, 1)


def _default_config(overrides: Mapping[str, Mapping[str, Any]]) -> Any:
    """Sizes of ``facebook/sam-vit-base``, which are transformers' defaults, with overrides."""
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    known = {part: values for part, values in SamConfig().to_dict().items() if part in parts}
    unknown = [part for part in overrides if part not in known]
    unknown += [f"{part}.{key}" for part in known for key in overrides.get(part, {}) if key not in known[part]]
    if unknown:
        raise ValueError(f"config has no {', '.join(unknown)}; it takes {', '.join(parts)} of transformers' SamConfig.")
    config: Any = SamConfig.from_dict({part: dict(values) for part, values in overrides.items()})
    # transformers' values are placeholders for weights to be loaded: nothing but a constant would leave the encoder.
    config.vision_config.initializer_range, config.vision_config.scale = config.initializer_range, 1.0
    return config


def _folder_config(pretrained: str, overrides: Mapping[str, Any] | None) -> Any:
    """The configuration in a folder.

    Raises:
        ValueError: when it is no folder with SAM, or sizes are given beside it.
    """
    if overrides is not None:
        raise ValueError("config and pretrained exclude each other: the folder's config.json holds the sizes.")
    folder = Path(pretrained)
    expected = (
        "expected is a folder with config.json of model_type 'sam' and model.safetensors, as transformers' "
        "SamModel.save_pretrained writes it and the hub has it as facebook/sam-vit-base"
    )
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"pretrained='{pretrained}' has no {' and no '.join(missing)}; {expected}.")
    content, _ = SamConfig.get_config_dict(folder)
    if content.get("model_type") != SamConfig.model_type:
        raise ValueError(f"pretrained='{pretrained}' holds model_type {content.get('model_type')!r}; {expected}.")
    return SamConfig.from_dict(content)


def _checked_side(image_size: int | Sequence[int], patch: int) -> int:
    sides = {image_size} if isinstance(image_size, int) else set(image_size)
    count = 2 if isinstance(image_size, int) else len(image_size)
    side = max(sides)
    if count != 2 or len(sides) != 1 or side < patch or side % patch:
        raise ValueError(f"SAMed needs square images whose side is a multiple of {patch}, but image_size={image_size}.")
    return side


def _check_arguments(num_classes: int, in_channels: int, rank: int) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, the background included, but is {num_classes}.")
    if in_channels not in (1, 3):
        raise ValueError(f"in_channels must be 1 (grey) or 3 (RGB), which SAM sees, but is {in_channels}.")
    if rank < 1:
        raise ValueError(f"rank must be positive, but is {rank}.")
