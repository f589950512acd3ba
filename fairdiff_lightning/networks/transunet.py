"""TransUNet on timm's vision transformer, with a mixture of experts behind every block when there are groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from timm.layers import GroupNormAct, StdConv2dSame, resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import Tensor, nn

from fairdiff_lightning.networks.checkpoint import LoadReport, Source, describe, load_strictly, read_state_dict
from fairdiff_lightning.networks.moe import DistributionAwareMoE, GroupRouter, UnknownGroup

VariantName = Literal["vit_b16", "r50_vit_b16", "tiny"]
_PATCH = 16


@dataclass(frozen=True)
class _Variant:
    """Sizes of a network: transformer, decoder channels from coarse to fine, and the ResNet that feeds both."""

    embed_dim: int
    depth: int
    num_heads: int
    decoder: tuple[int, int, int, int, int]
    resnet_layers: tuple[int, ...] = ()
    resnet_channels: tuple[int, ...] = (256, 512, 1024)
    resnet_stem: int = 64
    resnet_groups: int = 32
    pretrained: str | None = None


_VARIANTS: dict[str, _Variant] = {
    "vit_b16": _Variant(768, 12, 12, (512, 256, 128, 64, 16), pretrained="vit_base_patch16_224.augreg_in21k"),
    "r50_vit_b16": _Variant(
        768, 12, 12, (512, 256, 128, 64, 16), (3, 4, 9), pretrained="vit_base_r50_s16_224.orig_in21k"
    ),
    "tiny": _Variant(128, 4, 4, (64, 48, 32, 16, 16), (1, 1, 1), (32, 64, 128), 16, 8),
}


class TransUNet(nn.Module):
    """Vision transformer, cascaded upsampling decoder and segmentation head, optionally with group-routed experts.

    Chen et al., *TransUNet*, arXiv:2102.04306; with ``num_groups``, the network of Oh et al., ICML 2025,
    arXiv:2502.00619: after each transformer block, h = h + MoE(h, group).

    Args:
        variant: ``vit_b16``, ViT-B/16 without skip connections, which the authors of dMoE run; ``r50_vit_b16``,
            ResNet-50 and ViT-B/16 with skips from the ResNet; ``tiny``, the same with 1 M parameters (experts: 2 M).
        in_channels: channels of the image; a single one is repeated to three inside.
        num_classes: K, the background included.
        image_size: side, or height and width, in pixels, multiples of 16; the position embedding has this size.
        num_groups: groups, each with its own router; None for a network without experts.
        num_experts: experts, shared by all groups.
        top_k: experts per token.
        noise_in_eval: router noise in evaluation too, as the authors' code does.
        unknown_group: what routes a sample of group -1; see :class:`~fairdiff_lightning.networks.GroupRouter`.
        moe_sharing: one mixture for all blocks (the paper's 2-D setting) or one per block.
        dropout: of the embedding, the blocks' MLPs and the experts; attention has none.
        pretrained: start from timm's ImageNet-21k weights, which are downloaded.

    Shapes:
        image (B, C, H, W), intensity in [0, 1]; group (B,) integers; logits (B, K, H, W).

    Raises:
        ValueError: for an argument out of its range, or ``pretrained`` where there are no weights.
    """

    def __init__(
        self,
        variant: VariantName = "vit_b16",
        in_channels: int = 3,
        num_classes: int = 2,
        image_size: int | Sequence[int] = 224,
        num_groups: int | None = None,
        num_experts: int = 8,
        top_k: int = 2,
        noise_in_eval: bool = False,
        unknown_group: UnknownGroup = "error",
        moe_sharing: Literal["shared", "per_block"] = "shared",
        dropout: float = 0.1,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        size = _checked_size(image_size)
        _check_arguments(variant, in_channels, num_classes, moe_sharing)
        spec = _VARIANTS[variant]
        self.variant, self.in_channels, self.num_classes = variant, in_channels, num_classes
        self.moe_sharing = moe_sharing
        self.encoder: Any = _vision_transformer(spec, size, 3 if in_channels == 1 else in_channels, dropout)
        self.mixtures = nn.ModuleList()
        if num_groups is not None:
            self.mixtures.extend(
                DistributionAwareMoE(
                    spec.embed_dim,
                    num_experts,
                    top_k,
                    num_groups,
                    dropout=dropout,
                    noise_in_eval=noise_in_eval,
                    unknown_group=unknown_group,
                )
                for _ in range(1 if moe_sharing == "shared" else spec.depth)
            )
        self.decoder = CascadedDecoder(spec.embed_dim, spec.decoder, self._skip_channels())
        self.segmentation_head = nn.Sequential(nn.Conv2d(spec.decoder[-1], num_classes, kernel_size=3, padding=1))
        if pretrained:
            if spec.pretrained is None:
                raise ValueError(f"there are no published weights for variant {variant!r}: leave pretrained=False.")
            self.load_pretrained(timm.create_model(spec.pretrained, pretrained=True, num_classes=0).state_dict())

    def forward(
        self, image: Tensor, group: Tensor | None = None, return_gates: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, K, H, W), with ``return_gates`` also the gates (L, B, N, E) of the L blocks.

        Args:
            image: (B, C, H, W), height and width multiples of 16; where they differ from ``image_size``, the position
                embedding is interpolated.
            group: (B,); None leaves the experts out, as in the authors' code. Ignored by a network without experts.
            return_gates: also return the gates.

        Raises:
            ValueError: for a wrong shape, a group without router, or gates asked of a network that made none.
        """
        features, skips, gates = self._encode(self._checked(image), group)
        logits: Tensor = self.segmentation_head(self.decoder(features, skips))
        if not return_gates:
            return logits
        if not gates:
            raise ValueError("no gates to return: build with num_groups, and give the samples' groups.")
        return logits, torch.stack(gates)

    def set_group_prior(self, counts: Tensor) -> None:
        """Give all routers the groups' sample counts (G,); see :meth:`GroupRouter.set_group_prior`."""
        for module in self.modules():
            if isinstance(module, GroupRouter):
                module.set_group_prior(counts)

    def load_pretrained(self, source: Source) -> LoadReport:
        """Load an ImageNet encoder; decoder, head and experts stay as they are.

        Args:
            source: Google's ``.npz`` file, or a file or state dict of the timm model of the same variant. The class
                token, its position and the classifier are left out; the position grid is resampled where sizes differ.

        Raises:
            CheckpointMismatchError: naming every tensor that does not fit.
        """
        is_npz = not isinstance(source, dict) and str(source).endswith(".npz")
        found = self._read_npz(str(source)) if is_npz else read_state_dict(source)
        ignored = tuple(name for name in found if name == "cls_token" or name.startswith(("head.", "fc_norm.")))
        adapted = {name: tensor for name, tensor in found.items() if name not in ignored}
        targets = self.encoder.state_dict()
        if "pos_embed" in adapted:
            adapted["pos_embed"] = self._fitted_positions(adapted["pos_embed"], int("cls_token" in found))
        first = "patch_embed.backbone.stem.conv.weight" if self._hybrid else "patch_embed.proj.weight"
        if first in adapted and self.in_channels not in (1, 3):
            adapted[first] = adapt_input_conv(self.in_channels, adapted[first])
        report = load_strictly(adapted, targets)
        return LoadReport(describe(source), report.loaded, ignored)

    def reference_tensors(self) -> dict[str, Tensor]:
        """Name in the authors' checkpoint -> the part of this network that it fills.

        Raises:
            ValueError: for a network that the authors' code does not have.
        """
        if self.variant != "vit_b16" or self.moe_sharing != "shared":
            raise ValueError(
                "the authors' checkpoints are of variant='vit_b16' with moe_sharing='shared', but this network has "
                f"{self.variant!r} and {self.moe_sharing!r}."
            )
        vit = self.encoder
        names = {"transformer.embeddings.position_embeddings": vit.pos_embed.detach()}
        names |= _named("transformer.embeddings.patch_embeddings", vit.patch_embed.proj)
        names |= _named("transformer.encoder.encoder_norm", vit.norm)
        for i, block in enumerate(vit.blocks):
            layer = f"transformer.encoder.layer.{i}"
            names |= _named(f"{layer}.attention_norm", block.norm1) | _named(f"{layer}.ffn_norm", block.norm2)
            names |= _named(f"{layer}.ffn.fc1", block.mlp.fc1) | _named(f"{layer}.ffn.fc2", block.mlp.fc2)
            names |= _named(f"{layer}.attn.out", block.attn.proj)
            for kind, fused in block.attn.qkv.state_dict().items():
                for part, tensor in zip(("query", "key", "value"), fused.chunk(3), strict=True):
                    names[f"{layer}.attn.{part}.{kind}"] = tensor
        for mixture in self.mixtures:
            parts = mixture.reference_tensors()  # type: ignore[operator]
            names |= {f"transformer.encoder.sparseMoE.{name}": tensor for name, tensor in parts.items()}
        return names | _named("decoder", self.decoder) | _named("segmentation_head", self.segmentation_head)

    def load_reference_weights(self, source: Source) -> LoadReport:
        """Load the checkpoint that the authors of dMoE publish (2-D), strictly.

        Raises:
            CheckpointMismatchError: naming every tensor that does not fit.
            ValueError: for a network that the authors' code does not have.
        """
        return load_strictly(source, self.reference_tensors())

    @property
    def _hybrid(self) -> bool:
        return isinstance(self.encoder.patch_embed, HybridEmbed)

    def _skip_channels(self) -> tuple[int, ...]:
        """Channels of the skips at 1/8, 1/4, 1/2 and full size."""
        if not self._hybrid:
            return (0, 0, 0, 0)
        stem, first, second = (info["num_chs"] for info in self.encoder.patch_embed.backbone.feature_info[:3])
        return (second, first, stem, 0)

    def _checked(self, image: Tensor) -> Tensor:
        channels, height, width = image.shape[1:]
        if channels != self.in_channels:
            raise ValueError(f"the image has {channels} channels, but the network's in_channels is {self.in_channels}.")
        if height % _PATCH or width % _PATCH:
            raise ValueError(
                f"the image has {height} x {width} pixels, but both must be multiples of {_PATCH}: resize or pad it."
            )
        return image.expand(-1, 3, -1, -1) if channels == 1 else image

    def _encode(self, image: Tensor, group: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Features (B, D, H/16, W/16), skips from coarse to fine, and the gates (B, N, E) of each block."""
        vit, skips, gates = self.encoder, [], []
        if self._hybrid:
            image, skips = vit.patch_embed.backbone.forward_intermediates(image, indices=[0, 1, 2])
        patches = vit.patch_embed.proj(image)
        grid = patches.shape[-2:]
        position = resample_abs_pos_embed(vit.pos_embed, grid, vit.patch_embed.grid_size, num_prefix_tokens=0)
        tokens = vit.pos_drop(patches.flatten(2).mT + position)
        mixtures: Any = self.mixtures if group is not None else []
        shared = mixtures[0].prepare(tokens) if len(mixtures) == 1 else None
        for i, block in enumerate(vit.blocks):
            tokens = block(tokens)
            if len(mixtures):
                mixture = mixtures[i % len(mixtures)]
                block_gates, indices = mixture.route(tokens, group)
                tokens = tokens + mixture.mix(tokens, block_gates, indices, shared)
                gates.append(block_gates)
        return vit.norm(tokens).mT.unflatten(2, grid), skips[::-1], gates

    def _read_npz(self, path: str) -> dict[str, Tensor]:
        """State dict of the timm model that reads Google's file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no checkpoint at '{path}'.")
        channels = 3 if self.in_channels == 1 else self.in_channels
        size = tuple(_PATCH * n for n in self.encoder.patch_embed.grid_size)
        model = _vision_transformer(_VARIANTS[self.variant], size, channels, 0.0, class_token=True)
        model.load_pretrained(path)
        state: dict[str, Tensor] = model.state_dict()
        return state

    def _fitted_positions(self, table: Tensor, prefix: int) -> Tensor:
        """Position embedding (1, N, D) on this network's grid from one of a square grid, or of this very grid."""
        grid = self.encoder.patch_embed.grid_size
        if table.shape[1] - prefix != grid[0] * grid[1]:
            table = resample_abs_pos_embed(table, grid, num_prefix_tokens=prefix)
        return table[:, prefix:]


class CascadedDecoder(nn.Module):
    """TransUNet's cascaded upsampler: four times double the size, join the skip, two convolutions.

    Args:
        in_channels: of the encoder's features.
        channels: after the first convolution, then after each of the four steps.
        skip_channels: of the skip that each step joins, 0 for none.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], skip_channels: Sequence[int]) -> None:
        super().__init__()
        self.conv_more = _conv_bn_relu(in_channels, channels[0])
        steps = zip(channels[:-1], channels[1:], skip_channels, strict=True)
        self.blocks = nn.ModuleList(_DecoderBlock(coarse, fine, skip) for coarse, fine, skip in steps)

    def forward(self, features: Tensor, skips: Sequence[Tensor] = ()) -> Tensor:
        """Features (B, C, h, w) and skips from coarse to fine -> (B, C', 16 h, 16 w)."""
        x: Tensor = self.conv_more(features)
        for i, block in enumerate(self.blocks):
            x = block(x, skips[i] if i < len(skips) else None)
        return x


class _DecoderBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, skip_channels: int) -> None:
        super().__init__()
        self.up = nn.UpsamplingBilinear2d(scale_factor=2)  # corners aligned, as in the reference
        self.conv1 = _conv_bn_relu(in_channels + skip_channels, out_channels)
        self.conv2 = _conv_bn_relu(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = self.up(x)
        out: Tensor = self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], dim=1)))
        return out


def _conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _vision_transformer(
    spec: _Variant, size: tuple[int, ...], in_channels: int, dropout: float, class_token: bool = False
) -> Any:
    """Transformer of timm; without class token it is our encoder, with one it reads published weights."""
    embed: dict[str, Any] = {"patch_size": _PATCH}
    if spec.resnet_layers:
        backbone = ResNetV2(
            layers=spec.resnet_layers,
            channels=spec.resnet_channels,
            stem_chs=spec.resnet_stem,
            in_chans=in_channels,
            num_classes=0,
            global_pool="",
            preact=False,
            stem_type="same",
            conv_layer=partial(StdConv2dSame, eps=1e-8),
            norm_layer=partial(GroupNormAct, num_groups=spec.resnet_groups),
        )
        embed = {"patch_size": 1, "embed_layer": partial(HybridEmbed, backbone=backbone)}
    vit = VisionTransformer(
        img_size=size,
        in_chans=in_channels,
        num_classes=0,
        global_pool="token" if class_token else "",
        class_token=class_token,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
        weight_init="jax",
        **embed,
    )
    for block in vit.blocks:
        block.attn.proj_drop = nn.Identity()  # timm has one rate for both; the reference drops in the MLP only
    return vit


def _named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def _checked_size(image_size: int | Sequence[int]) -> tuple[int, ...]:
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or any(side < _PATCH or side % _PATCH for side in size):
        raise ValueError(f"image_size must be one or two positive multiples of {_PATCH}, but is {image_size!r}.")
    return size


def _check_arguments(variant: str, in_channels: int, num_classes: int, moe_sharing: str) -> None:
    if variant not in get_args(VariantName):
        raise ValueError(f"variant must be one of {get_args(VariantName)}, but is {variant!r}.")
    if moe_sharing not in ("shared", "per_block"):
        raise ValueError(f"moe_sharing must be 'shared' or 'per_block', but is {moe_sharing!r}.")
    if in_channels < 1 or num_classes < 1:
        raise ValueError(f"in_channels and num_classes must be positive, but are {in_channels} and {num_classes}.")
