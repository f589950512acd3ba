"""Networks that turn images into the features that generation metrics compare; never downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairdiff_lightning.networks.checkpoint import load_strictly, read_state_dict

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LIBRARIES = ("torchvision", "timm")


class FeatureExtractor(nn.Module):
    """A frozen network from images to features, with the name that its values are logged under.

    ======================  ====================================================  =================================
    ``network``             features                                              ``weights``
    ======================  ====================================================  =================================
    ``inception``           the 2,048 pooled ones of FID, by torch-fidelity       default: torch-fidelity's file in
                                                                                  the folder of ``torch.hub``
    ``torchvision/<name>``  the model's output: class logits, as FairDiff has it  needed
    ``timm/<name>``         the pooled ones before the classifier                 needed
    any module              its output (N, D), or (N, D, 1, 1)                    loaded when given
    ======================  ====================================================  =================================

    FairDiff's own features are those of ``torchvision/resnet50`` with ``image_size=512`` and ``mean`` and ``std`` of
    0.5. A module that is passed in is frozen and put into evaluation mode.

    Args:
        network: as in the table.
        weights: local checkpoint, of the network with its classifier.
        name: in log keys; by default what follows the slash, or the module's class.
        image_size: side that images are resized to; 224 for the two libraries, as they are for a module.
        mean: of each channel, taken off; ImageNet's for the two libraries.
        std: of each channel, divided by; ImageNet's for the two libraries.

    Shapes:
        images (N, C, H, W) float in [0, 1]; features (N, D) float32. One channel is repeated for the named networks.

    Raises:
        ValueError: the network is unknown, its weights are not given, or do not fit.
        FileNotFoundError: there is no file of weights; it says where it is expected.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module | str = "inception",
        weights: str | None = None,
        name: str | None = None,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        library = network.split("/")[0] if isinstance(network, str) else None
        given = [n for n, v in (("image_size", image_size), ("mean", mean), ("std", std)) if v is not None]
        if library == "inception" and given:
            raise ValueError(f"extractor 'inception' resizes and scales images itself; leave out {', '.join(given)}.")
        backbone = library in _LIBRARIES
        self.name = name or (network.split("/")[-1] if isinstance(network, str) else type(network).__name__)
        self.library = library
        self.image_size = image_size or (224 if backbone else None)
        self.register_buffer("mean", torch.tensor(mean or (IMAGENET_MEAN if backbone else (0.0,))).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std or (IMAGENET_STD if backbone else (1.0,))).view(-1, 1, 1))
        self.network = _build(network, weights)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (N, D) float32 of images.

        Raises:
            ValueError: the images are not (N, C, H, W) floating point, or the network's output is not (N, D).
        """
        if images.dim() != 4 or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}, expected floating point (N, C, H, W) in "
                "[0, 1]."
            )
        images = images.float()
        if self.library and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self.library == "inception":  # rounding gives back the very bytes of an image that was divided by 255
            return self._checked(self.network((images * 255).round().clamp(0, 255).to(torch.uint8)))
        if self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self._checked(self.network((images - self.mean) / self.std))

    def _checked(self, features: Tensor) -> Tensor:
        if features.dim() < 2 or features.shape[1] != features[0].numel():
            raise ValueError(
                f"extractor '{self.name}' gave features of shape {tuple(features.shape)}, expected (N, D): pool them "
                "inside the network."
            )
        return features.flatten(1).float()


def check_unit_range(images: Tensor, what: str) -> None:
    """Raise ValueError unless images are floating point in [0, 1]; to tell, the host waits for the device."""
    low, high = (float(images.min()), float(images.max())) if images.numel() else (0.0, 0.0)
    if not images.is_floating_point() or not (low >= 0 and high <= 1):
        raise ValueError(
            f"{what}: images are {images.dtype} in [{low:.3g}, {high:.3g}], expected floating point in [0, 1] "
            "without NaN. Rescale them, e.g. (x + 1) / 2 from [-1, 1]."
        )


def _build(network: nn.Module | str, weights: str | None) -> nn.Module:
    if isinstance(network, nn.Module):
        if weights is not None:
            load_strictly(weights, network.state_dict())
        return network
    library, _, model = network.partition("/")
    if network == "inception":
        return _inception(weights)
    if library not in _LIBRARIES or not model:
        raise ValueError(
            f"extractor {network!r} is unknown, expected 'inception', 'torchvision/<model>', 'timm/<model>' or a "
            "module."
        )
    if weights is None:
        raise ValueError(
            f"extractor {network!r} has no weights, and nothing is downloaded: give weights='<path of its checkpoint>'."
        )
    return _torchvision(model, weights) if library == "torchvision" else _timm(model, weights)


def _torchvision(model: str, weights: str) -> nn.Module:
    import torchvision

    built: nn.Module = torchvision.models.get_model(model, weights=None)
    load_strictly(weights, built.state_dict())
    return built


def _timm(model: str, weights: str) -> nn.Module:
    import timm

    built = timm.create_model(model, pretrained=False)
    load_strictly(weights, built.state_dict())
    built.reset_classifier(0)
    return cast(nn.Module, built)


def _inception(weights: str | None) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3  # type: ignore[import-untyped]
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if not path.is_file():
        raise FileNotFoundError(
            f"no Inception weights at '{path}', and nothing is downloaded. Get {URL_INCEPTION_V3} and put it there, or "
            "name its place with `weights`; or choose another extractor."
        )
    read_state_dict(path)  # torch-fidelity would run what a pickle says: refuse anything but tensors first
    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
