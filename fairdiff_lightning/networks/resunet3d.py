"""Residual U-Net for volumes, with a mixture of experts behind every encoder stage when there are groups."""

from __future__ import annotations

from typing import Any, Literal

import torch
from monai.networks.blocks.dynunet_block import UnetResBlock
from monai.networks.blocks.unetr_block import UnetrUpBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairdiff_lightning.networks.checkpoint import LoadReport, Source, load_strictly
from fairdiff_lightning.networks.moe import DistributionAwareMoE, UnknownGroup

_STAGES = 5
_REDUCTION = 2**_STAGES
_REFERENCE_ENCODERS = ("encoder1", "encoder2", "encoder3", "encoder4", "encoder10")
_REFERENCE_DECODERS = ("decoder4", "decoder3", "decoder2", "decoder1")


class ResUNet3D(nn.Module):
    """Residual U-Net whose encoder stages halve the volume, optionally with group-routed experts behind each.

    The 3-D network of Oh et al., ICML 2025, arXiv:2502.00619. With ``num_groups``, after each encoder stage
    h = h + MoE(h, group) for every voxel; the next stage and the skip connection both take the result.

    Args:
        in_channels: channels of the image.
        num_classes: K, the background included.
        feature_size: channels f of the first stage; the stages have f, f, 2f, 4f, 8f.
        num_groups: groups, each with its own router; None for the plain network without experts.
        num_experts: experts of a stage, shared by all groups.
        top_k: experts per voxel.
        noise_in_eval: router noise in evaluation too, as the authors' code does.
        unknown_group: what routes a sample of group -1; see :class:`~fairdiff_lightning.networks.GroupRouter`.
        moe_sharing: ``per_block`` only: the stages differ in channels, so each has a mixture of its own.
        dropout: of the experts; the convolutions have none.
        chunk_tokens: voxels of a batch that go through a mixture at once. A stage with more is mixed chunk by chunk,
            and each chunk is computed again in the backward pass, which bounds its memory. None never does. The
            default makes eight chunks of the first stage of 128 x 128 x 128 voxels; ``benchmarks/volume_mixture.py``
            measures others. The result is the same; only the draws of noise and dropout, one chunk after another,
            fall differently.
        gradient_checkpointing: compute the encoder and decoder blocks again in the backward pass, to save memory.

    Shapes:
        image (B, C, H, W, D), each side a multiple of 32, not all of them 32; group (B,) integers;
        logits (B, K, H, W, D).

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        feature_size: int = 48,
        num_groups: int | None = None,
        num_experts: int = 8,
        top_k: int = 2,
        noise_in_eval: bool = False,
        unknown_group: UnknownGroup = "error",
        moe_sharing: Literal["per_block"] = "per_block",
        dropout: float = 0.1,
        chunk_tokens: int | None = 2**15,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_arguments(in_channels, num_classes, feature_size, moe_sharing, chunk_tokens)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.chunk_tokens, self.gradient_checkpointing = chunk_tokens, gradient_checkpointing
        channels = [feature_size * ratio for ratio in (1, 1, 2, 4, 8)]
        self.encoders = nn.ModuleList(
            UnetResBlock(3, fine, coarse, kernel_size=3, stride=2, norm_name="instance")
            for fine, coarse in zip([in_channels, *channels], channels, strict=False)
        )
        self.mixtures = nn.ModuleList()
        if num_groups is not None:
            self.mixtures.extend(
                DistributionAwareMoE(
                    width,
                    num_experts,
                    top_k,
                    num_groups,
                    dropout=dropout,
                    noise_in_eval=noise_in_eval,
                    unknown_group=unknown_group,
                )
                for width in channels
            )
        self.decoders = nn.ModuleList(
            UnetrUpBlock(3, coarse, fine, kernel_size=3, upsample_kernel_size=2, norm_name="instance", res_block=True)
            for coarse, fine in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.head = nn.ConvTranspose3d(feature_size, num_classes, kernel_size=2, stride=2, bias=False)

    def forward(
        self, image: Tensor, group: Tensor | None = None, return_gates: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, K, H, W, D), with ``return_gates`` also the gates (5, B, 1, E), means over a stage's voxels.

        Args:
            image: (B, C, H, W, D).
            group: (B,); None leaves the experts out. Ignored by a network without experts.
            return_gates: also return the gates.

        Raises:
            ValueError: for a wrong shape, a group without router, or gates asked of a network that made none.
        """
        self._check_image(image)
        features, skips, gates = image, [], []
        mixtures: Any = self.mixtures
        for i, encoder in enumerate(self.encoders):
            features = self._run(encoder, features)
            if group is not None and len(mixtures):
                features, mean_gates = mix_voxels(mixtures[i], features, group, self.chunk_tokens)
                gates.append(mean_gates)
            skips.append(features)
        for decoder, skip in zip(self.decoders, skips[-2::-1], strict=True):
            features = self._run(decoder, features, skip)
        logits: Tensor = self.head(features)
        if not return_gates:
            return logits
        if not gates:
            raise ValueError("no gates to return: build with num_groups, and give the samples' groups.")
        return logits, torch.stack(gates)

    def set_group_prior(self, counts: Tensor) -> None:
        """Give all routers the groups' sample counts (G,); see :meth:`GroupRouter.set_group_prior`."""
        mixtures: Any = self.mixtures
        for mixture in mixtures:
            mixture.router.set_group_prior(counts)

    def reference_tensors(self) -> dict[str, Tensor]:
        """Name in the authors' checkpoint -> the part of this network that it fills."""
        names: dict[str, Tensor] = {"out.transp_conv.conv.weight": self.head.weight.detach()}
        for prefix, encoder in zip(_REFERENCE_ENCODERS, self.encoders, strict=True):
            names |= {f"{prefix}.layer.{name}": tensor for name, tensor in encoder.state_dict().items()}
        for prefix, decoder in zip(_REFERENCE_DECODERS, self.decoders, strict=True):
            names |= {f"{prefix}.{name}": tensor for name, tensor in decoder.state_dict().items()}
        mixtures: Any = self.mixtures
        for i, mixture in enumerate(mixtures):
            names |= {f"sparseMoE.{i}.{name}": tensor for name, tensor in mixture.reference_tensors().items()}
        return names

    def load_reference_weights(self, source: Source) -> LoadReport:
        """Load a checkpoint of the authors' 3-D network (which has five routers), strictly.

        Raises:
            CheckpointMismatchError: naming every tensor that does not fit.
        """
        return load_strictly(source, self.reference_tensors())

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        out: Tensor = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return out

    def _check_image(self, image: Tensor) -> None:
        if image.dim() != 5:
            raise ValueError(f"image must have shape (B, C, H, W, D), but has {tuple(image.shape)}.")
        channels, *sides = image.shape[1:]
        if channels != self.in_channels:
            raise ValueError(f"the image has {channels} channels, but the network's in_channels is {self.in_channels}.")
        if any(side < _REDUCTION or side % _REDUCTION for side in sides) or max(sides) == _REDUCTION:
            raise ValueError(
                f"the image has {' x '.join(map(str, sides))} voxels, but each side must be a multiple of {_REDUCTION} "
                f"and one of them more than {_REDUCTION}, since the bottleneck normalizes over several voxels: pad it, "
                "or use a sliding window whose roi_size has such sides."
            )


def mix_voxels(
    mixture: DistributionAwareMoE, features: Tensor, group: Tensor, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Add to every voxel its mixture of experts, chunk by chunk where there are many.

    A chunk is computed again in the backward pass, so that what its experts hold lives for one chunk only. The state of
    the random generators is kept for that, so noise and dropout are those of the first time.

    Args:
        mixture: of the features' channels.
        features: (B, C, ...).
        group: (B,).
        chunk_tokens: voxels of the batch in a chunk; None for all at once.

    Returns:
        Features (B, C, ...) and, of each sample, the mean gates (B, 1, E) of its voxels.
    """
    voxels = features.flatten(2)
    count = voxels.shape[2]
    length = count if chunk_tokens is None else max(1, chunk_tokens // len(voxels))
    if count <= length:
        mixed, gates = _mix(mixture, voxels, group)
    else:  # the gradient of a split is one concatenation, where slices would add up whole volumes
        chunks = [
            checkpoint(_mix, mixture, chunk, group, use_reentrant=False) for chunk in torch.split(voxels, length, dim=2)
        ]
        mixed = torch.cat([chunk for chunk, _ in chunks], dim=2)
        gates = torch.stack([total for _, total in chunks]).sum(0)
    return mixed.view_as(features), gates / count


def _mix(mixture: DistributionAwareMoE, voxels: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Voxels (B, C, N) with their mixture added, and the sum (B, 1, E) of their gates."""
    tokens = voxels.mT
    gates, indices = mixture.route(tokens, group)
    return voxels + mixture.mix(tokens, gates, indices).mT, gates.sum(1, keepdim=True)


def _check_arguments(
    in_channels: int, num_classes: int, feature_size: int, moe_sharing: str, chunk_tokens: int | None
) -> None:
    if min(in_channels, num_classes, feature_size) < 1:
        raise ValueError(
            "in_channels, num_classes and feature_size must be positive, "
            f"but are {in_channels}, {num_classes} and {feature_size}."
        )
    if moe_sharing != "per_block":
        raise ValueError(
            f"moe_sharing is {moe_sharing!r}, but the stages differ in channels and can share no mixture: "
            "set moe_sharing='per_block'."
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be positive, or None for no chunks, but is {chunk_tokens}.")
