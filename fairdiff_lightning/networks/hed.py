"""Holistically-nested edge detection, the network that draws DiffBoost's edges."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairdiff_lightning.networks.checkpoint import LoadReport, Source, check_state_dict, describe, read_state_dict

WIDTHS = (3, 64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)
MEAN_RGB = (122.67891434, 116.66876762, 104.00698793)
"""Colour that the BSDS500 weights expect to be taken off, of 255."""
SMALLEST = 16
"""Four poolings leave one pixel of it."""


class HED(nn.Module):
    """Edge probability by the five stages of a VGG-16, each with a side output, and the weighted sum of these.

    Xie & Tu, *Holistically-Nested Edge Detection*, ICCV 2015, arXiv:1504.06375. 14,716,171 parameters.

    Args:
        weights: what :meth:`load_reference_weights` reads; None leaves the network untrained.

    Shapes:
        images (B, 1 or 3, H, W), grey or RGB, in [0, 1]; edges (B, 1, H, W) in [0, 1]. H and W are at least 16.

    Differences from the reference (DiffBoost's code):
        ==================  ==================================  ==========================================
        What                Reference code                      Here
        ==================  ==================================  ==========================================
        order of colours    turned to BGR for one image, left   RGB is read as RGB; ``images.flip(1)``
                            RGB for a batch                     restores it. Grey is the same in both
        output              8-bit levels, rounded down          probability; ``data.edges`` makes levels
        device              CUDA only                           any
        ==================  ==================================  ==========================================
    """

    mean: Tensor

    def __init__(self, weights: Source | None = None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            _stage(channels, width, depth, pooled=channels != WIDTHS[0])
            for (channels, width), depth in zip(pairwise(WIDTHS), DEPTHS, strict=True)
        )
        self.scores = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in WIDTHS[1:])
        self.fuse = nn.Conv2d(len(DEPTHS), 1, 1)
        self.register_buffer("mean", torch.tensor(MEAN_RGB).view(1, 3, 1, 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions pass it on
        if weights is not None:
            self.load_reference_weights(weights)

    def forward(self, images: Tensor) -> Tensor:
        """Probability of an edge at each pixel.

        Raises:
            ValueError: for images of another shape, or smaller than 16 pixels.
        """
        _check_shape(images)
        x = images.expand(-1, 3, -1, -1) * 255 - self.mean
        sides = []
        for stage, score in zip(self.stages, self.scores, strict=True):
            x = stage(x)
            sides.append(F.interpolate(score(x), images.shape[-2:], mode="bilinear", align_corners=False))
        return torch.sigmoid(self.fuse(torch.cat(sides, dim=1)).float())

    def load_reference_weights(self, source: Source) -> LoadReport:
        """Load a published edge model.

        Args:
            source: path or state dict of ``network-bsds500.pth``, which DiffBoost uses, or of the later
                ``ControlNetHED.pth``. The latter averages its side outputs and has learned its mean colour, which the
                same network can express; its edges are others.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no checkpoint, or none of HED.
            CheckpointMismatchError: when a tensor is missing, unexpected or misshapen; it names them all.
        """
        found, name = read_state_dict(source), describe(source)
        bsds, controlnet = bsds_tensors(self), controlnet_tensors(self)
        targets = max(bsds, controlnet, key=lambda tensors: len(tensors.keys() & found.keys()))
        if not targets.keys() & found.keys():
            raise ValueError(
                f"{name} is no edge model of HED: it holds {_some(found)}. Expected is network-bsds500.pth, with "
                f"{_some(bsds)}, or ControlNetHED.pth, with {_some(controlnet)}, as published."
            )
        check_state_dict(found, targets, name)
        with torch.no_grad():
            for key, target in targets.items():
                target.copy_(found[key])
            if targets is bsds:
                self._complete_bsds(targets["moduleVggOne.0.weight"])
            else:
                self._complete_controlnet()
        return LoadReport(name, tuple(targets))

    def _complete_bsds(self, first: Tensor) -> None:
        """Turn the first convolution (64, 3, 3, 3) from BGR to RGB; the mean colour is not in the file."""
        first.copy_(first.flip(1))
        self.mean.copy_(torch.tensor(MEAN_RGB).view(1, 3, 1, 1))

    def _complete_controlnet(self) -> None:
        """Weigh all side outputs alike: the sigmoid of their mean."""
        nn.init.constant_(self.fuse.weight, 1 / len(DEPTHS))
        nn.init.zeros_(self.fuse.bias)  # type: ignore[arg-type]


def bsds_tensors(network: HED) -> dict[str, Tensor]:
    """Names in ``network-bsds500.pth`` -> the tensors of a network that they fill."""
    tensors: dict[str, Tensor] = {}
    for word, stage, score in zip(("One", "Two", "Thr", "Fou", "Fiv"), network.stages, network.scores, strict=True):
        tensors |= stage.state_dict(prefix=f"moduleVgg{word}.") | score.state_dict(prefix=f"moduleScore{word}.")
    return tensors | network.fuse.state_dict(prefix="moduleCombine.0.")


def controlnet_tensors(network: HED) -> dict[str, Tensor]:
    """Names in ``ControlNetHED.pth`` -> the tensors of a network that they fill."""
    tensors = {"norm": network.mean}
    for block, (stage, score) in enumerate(zip(network.stages, network.scores, strict=True), start=1):
        convolutions = [layer for layer in stage.children() if isinstance(layer, nn.Conv2d)]
        for index, layer in enumerate(convolutions):
            tensors |= layer.state_dict(prefix=f"block{block}.convs.{index}.")
        tensors |= score.state_dict(prefix=f"block{block}.projection.")
    return tensors


def _stage(channels: int, width: int, depth: int, pooled: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if pooled else []
    for index in range(depth):
        layers += [nn.Conv2d(width if index else channels, width, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _check_shape(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] not in (1, 3) or min(images.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"images of shape {tuple(images.shape)}; HED takes (B, 1 or 3, H, W) with H and W of at least {SMALLEST}."
        )


def _some(names: dict[str, Tensor]) -> str:
    """The first names, and how many there are."""
    return f"{', '.join(list(names)[:3])}, ... ({len(names)} tensors)" if names else "nothing"
