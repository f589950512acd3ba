"""Edges of images, contours of labels, and the map of both that conditions a generator."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor, nn

from fairdiff_lightning.data.accelerator import on_accelerator
from fairdiff_lightning.data.cache import cache_root
from fairdiff_lightning.data.native import atomic_path
from fairdiff_lightning.data.sample import Sample

VERSION = 1
"""Part of every key: raised when the same image, mask and detector give another edge."""
UNREADABLE = (OSError, ValueError, LookupError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for an archive that is missing, cut off or changed."""
Detector = Callable[[Tensor], Tensor]
"""Turns images (B, C, H, W) in [0, 1] into edges (B, 1, H, W) in [0, 1]; ``networks.hed.HED`` is one."""


@dataclass(frozen=True)
class ScharrEdges:
    """Gradient magnitude by Scharr's kernel, of each image's strongest edge.

    An image whose edges are all weaker than one grey level of 255 stays that dark: noise is not blown up.
    """

    def __call__(self, images: Tensor) -> Tensor:
        """Edges (B, 1, H, W) in [0, 1] of images (B, C, H, W), on their device."""
        magnitude = scharr(images.float().mean(1, keepdim=True))
        return magnitude / magnitude.amax((-2, -1), keepdim=True).clamp_min(16 / 255)


@dataclass(frozen=True)
class CannyEdges:
    """Canny's thin edges, 0 or 1, by scikit-image on the CPU.

    Args:
        sigma: of the Gaussian that smooths the image first, pixels.
        low: gradient that continues an edge, for images in [0, 1].
        high: gradient that begins one.
    """

    sigma: float = 1.0
    low: float = 0.1
    high: float = 0.2

    def __call__(self, images: Tensor) -> Tensor:
        """Edges (B, 1, H, W) of images (B, C, H, W)."""
        from skimage.feature import canny

        grey = images.float().mean(1).cpu().numpy()
        thin = (canny(image, self.sigma, self.low, self.high) for image in grey)  # type: ignore[no-untyped-call]
        return torch.from_numpy(np.stack(list(thin)))[:, None].to(images.device, torch.float32)


DetectorArgument = Literal["scharr"] | ScharrEdges | CannyEdges | nn.Module
"""What data modules take; the command line tries them in this order."""


class EdgeCache:
    """Edges on disk under the hash of what they are drawn of; processes may share it.

    Args:
        folder: where they lie, one compressed archive of 8-bit levels each; None takes the user's cache folder.

    Attributes:
        hits: edges that were found by this process.
        misses: edges that were not there, or not whole.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_root() / "edges" if folder is None else folder
        self.hits = self.misses = 0

    def get(self, key: str, shape: tuple[int, ...]) -> Tensor | None:
        """The edge of this shape, float32 in [0, 1]; None when there is none that is whole."""
        try:
            with np.load(self._path(key), allow_pickle=False) as archive:
                levels: NDArray[np.uint8] = archive["edge"]
            if levels.shape != shape or levels.dtype != np.uint8:
                raise ValueError(f"{levels.dtype} {levels.shape}")
        except UNREADABLE:
            self.misses += 1
            return None
        self.hits += 1
        return torch.from_numpy(levels).float() / 255

    def put(self, key: str, edge: Tensor) -> None:
        """Store an edge in [0, 1]; when there is no room for it, say so and go on."""
        levels = (edge * 255).round().to(torch.uint8).cpu().numpy()
        try:
            with atomic_path(self._path(key)) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(stream, edge=levels)
        except OSError as error:
            self._say_no_room(error)

    def has_listed(self, name: str) -> bool:
        """Whether a list of this name was kept and all of its edges are there."""
        path = self._list(name)
        return path.is_file() and all(self._path(key).is_file() for key in path.read_text().split())

    def put_list(self, name: str, keys: Iterable[str]) -> None:
        """Keep which edges belong to a name, a set of records for example."""
        try:
            with atomic_path(self._list(name)) as temporary:
                temporary.write_text("\n".join(keys))
        except OSError as error:
            self._say_no_room(error)

    def _say_no_room(self, error: OSError) -> None:
        rank_zero_warn(
            f"cannot store edges in '{self.folder}' ({error}); they are drawn each time. Free some room, or set "
            "FAIRDIFF_CACHE or the folder of the cache to another place."
        )

    def _list(self, name: str) -> Path:
        return self.folder / "lists" / f"{name}.txt"

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"


class EdgeReader:
    """:func:`edges_of`, drawn once for each content of image and mask and kept on disk.

    Args:
        detector: see :func:`edges_of`; an ``nn.Module`` or a dataclass, whose weights or fields do not change any more.
        folder: see :class:`EdgeCache`.
        batch_size: images that the detector sees at once.

    Attributes:
        description: :func:`describe_detector` of what draws.
    """

    def __init__(self, detector: Detector | None = None, folder: Path | None = None, batch_size: int = 32) -> None:
        self.detector, self.batch_size, self.cache = detector, batch_size, EdgeCache(folder)
        self.description = describe_detector(ScharrEdges() if detector is None else detector)
        self._settings = repr((VERSION, self.description))

    def __call__(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """The ``edge`` of :func:`edges_of`, with its shapes and errors; what is not stored is drawn in one go."""
        check_pair(image, mask)
        shape = (1, *image.shape[-2:])
        images, masks = image.reshape(-1, *image.shape[-3:]), None if mask is None else mask.reshape(-1, *shape)
        keys, edges = self._look_up(images, masks)
        return torch.stack([edges[key].to(image.device) for key in keys]).view(*image.shape[:-3], *shape)

    def prepare(self, samples: Iterable[Sample]) -> list[str]:
        """Draw and store the edges of samples (image in [0, 1]) in batches, so that loader processes find them.

        A network draws on the accelerator, where there is one, and is on the CPU afterwards.

        Returns:
            The distinct :meth:`key` of all samples.
        """
        pending: dict[tuple[int, ...], list[Sample]] = {}
        keys: list[str] = []
        with on_accelerator(self.detector):
            for sample in samples:
                batch = pending.setdefault(tuple(sample["image"].shape), [])
                batch.append(sample)
                if len(batch) == self.batch_size:
                    keys += self._draw(pending.pop(tuple(sample["image"].shape)))
            for batch in pending.values():
                keys += self._draw(batch)
        return list(dict.fromkeys(keys))

    def _draw(self, batch: list[Sample]) -> list[str]:
        images, masks = torch.stack([s["image"] for s in batch]), torch.stack([s["mask"] for s in batch])
        check_pair(images, masks)
        return self._look_up(images, masks)[0]

    def _look_up(self, images: Tensor, masks: Tensor | None) -> tuple[list[str], dict[str, Tensor]]:
        """The key of each image (B, C, H, W), and the edges by key; what is not stored is drawn and stored."""
        shape = (1, *images.shape[-2:])
        keys = [self.key(images[i], None if masks is None else masks[i]) for i in range(len(images))]
        found = {key: self.cache.get(key, shape) for key in dict.fromkeys(keys)}
        edges = {key: edge for key, edge in found.items() if edge is not None}
        missing = {key: i for i, key in enumerate(keys) if key not in edges}
        if missing:
            rows = list(missing.values())
            drawn = edges_of(images[rows], None if masks is None else masks[rows], self.detector, self.batch_size)
            for key, edge in zip(missing, drawn, strict=True):
                self.cache.put(key, edge)
                edges[key] = edge
        return keys, edges

    def key(self, image: Tensor, mask: Tensor | None) -> str:
        """Hash of an image, its mask, and the detector with its settings and weights."""
        return hashlib.sha256(self._settings.encode() + _content(image) + _content(mask)).hexdigest()[:32]


def describe_detector(detector: object) -> str:
    """What tells detectors apart: of a network its layers and a hash of its weights, of a dataclass its fields.

    Raises:
        ValueError: for anything else, a function for example, the settings of which cannot be seen.
    """
    if isinstance(detector, nn.Module):
        digest = hashlib.sha256()
        for name, tensor in detector.state_dict().items():
            digest.update(name.encode() + _content(tensor))
        return f"{detector!r} {digest.hexdigest()}"
    if not is_dataclass(detector):
        raise ValueError(
            f"detector {detector!r} shows no settings by which its edges could be kept. Make it an nn.Module or a "
            "dataclass with __call__, or draw without a cache by edges_of."
        )
    return f"{type(detector).__module__}.{detector!r}"


def scharr(images: Tensor) -> Tensor:
    """Gradient magnitude by Scharr's kernel (3, 10, 3; not normalized), border mirrored.

    Args:
        images: float (B, C, H, W).

    Returns:
        (B, C, H, W); a step of 1 gives 16.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")  # one pixel mirrored is that pixel again
    rows = 3 * padded[..., :-2, :] + 10 * padded[..., 1:-1, :] + 3 * padded[..., 2:, :]
    columns = 3 * padded[..., :-2] + 10 * padded[..., 1:-1] + 3 * padded[..., 2:]
    return torch.hypot(rows[..., 2:] - rows[..., :-2], columns[..., 2:, :] - columns[..., :-2, :])


def label_contour(mask: Tensor) -> Tensor:
    """Where labels meet: one pixel on either side, also between touching classes; none along the image's border.

    Zhang et al., *DiffBoost*, IEEE TMI 2025, arXiv:2310.12868, as its code draws it: a single pixel of a class is a
    ring.

    Args:
        mask: class indices (1, H, W) or (B, 1, H, W).

    Returns:
        float32 of the same shape, 0 or 1.

    Raises:
        ValueError: for another shape or type.
    """
    if mask.dim() not in (3, 4) or mask.shape[-3] != 1 or mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"mask of shape {tuple(mask.shape)}, {mask.dtype}; expected are class indices, integers (1, H, W) or "
            "(B, 1, H, W)."
        )
    magnitude = scharr(mask.float().reshape(-1, 1, *mask.shape[-2:]))  # 0, or at least 3 * sqrt(2)
    return magnitude.clamp_max(1).view(mask.shape)


def edges_of(
    image: Tensor, mask: Tensor | None = None, detector: Detector | None = None, batch_size: int = 32
) -> Tensor:
    """Edges of images joined with the contours of their labels, in steps of 1/255.

    DiffBoost (arXiv:2310.12868): edges are 8-bit levels, rounded down; a contour is drawn at full strength.

    Args:
        image: (C, H, W) or (B, C, H, W) in [0, 1]; the slices of a volume are a batch.
        mask: class indices (1, H, W) or (B, 1, H, W); None draws no contour.
        detector: ``HED`` with its weights, :class:`CannyEdges` or another; None takes :class:`ScharrEdges` and says so.
        batch_size: images that the detector sees at once, on its own device.

    Returns:
        The contract's ``edge``: float32 (1, H, W) or (B, 1, H, W) in [0, 1], on the image's device.

    Raises:
        ValueError: for another shape or range of the image, or a mask of another size.
    """
    check_pair(image, mask)
    if detector is None:
        say_no_weights()
        detector = ScharrEdges()
    device = _device_of(detector, image)
    with torch.inference_mode():
        chunks = torch.split(image.reshape(-1, *image.shape[-3:]), batch_size)
        levels = torch.cat([_levels(detector(chunk.to(device))).to(image.device) for chunk in chunks])
    edge = levels.clone().view(*image.shape[:-3], 1, *image.shape[-2:])
    if mask is not None:
        edge = (edge + 255 * label_contour(mask.to(edge.device))).clamp_max(255)
    return edge / 255


def check_pair(image: Tensor, mask: Tensor | None) -> None:
    """Check an image, or a batch of them, in [0, 1] and its mask; this reads them from their device.

    Raises:
        ValueError: saying what was found and what is expected.
    """
    if image.dim() not in (3, 4) or not image.is_floating_point() or image.numel() == 0:
        raise ValueError(
            f"image of shape {tuple(image.shape)}, {image.dtype}; edges are drawn of floats (C, H, W) or (B, C, H, W). "
            "Make the slices of a volume a batch."
        )
    low, high = float(image.min()), float(image.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # written so that NaN fails too
        raise ValueError(
            f"image with values in [{low:.4g}, {high:.4g}]; edges are drawn of images in [0, 1]. "
            "Bring one in [-1, 1] there by (image + 1) / 2."
        )
    expected = (*image.shape[:-3], 1, *image.shape[-2:])
    if mask is not None and tuple(mask.shape) != expected:
        raise ValueError(f"mask of shape {tuple(mask.shape)} for images {tuple(image.shape)}; expected is {expected}.")


@cache
def say_no_weights() -> None:
    """Warn, once in a process, that edges are gradients."""
    rank_zero_warn(
        "no edge model is given: edges are image gradients (Scharr). DiffBoost draws them by HED: give a detector "
        "HED(weights='network-bsds500.pth') to follow it."
    )


def _levels(probability: Tensor) -> Tensor:
    """Edges in [0, 1] as whole numbers 0 to 255, rounded down as the reference does."""
    return (probability.float() * 255).clamp(0, 255).floor()


def _device_of(detector: Detector, image: Tensor) -> torch.device:
    parameter = next(detector.parameters(), None) if isinstance(detector, nn.Module) else None
    return image.device if parameter is None else parameter.device


def _content(tensor: Tensor | None) -> bytes:
    """Type, shape and bytes of a tensor."""
    if tensor is None:
        return b"none"
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data
