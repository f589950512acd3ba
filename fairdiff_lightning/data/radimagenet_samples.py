"""Samples of RadImageNet's encoded pictures: their prompts, by the folder, and their edges."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fairdiff_lightning.data.edges import Detector, edges_of
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import to_image_tensor, to_uint8_image
from fairdiff_lightning.data.pictures import opened
from fairdiff_lightning.data.resize import resize_image
from fairdiff_lightning.data.sample import Sample

ABBREVIATIONS = {
    "abd": "abdomen",
    "af": "ankle",
    "cbd": "common bile duct",
    "gb": "gallbladder",
    "ivc": "inferior vena cava",
}
GREY_OR_COLOUR = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Modes of pictures of 8 bits."""


def prompt_of(folder: str, reference_behaviour: bool = False) -> str:
    """``modality,organ,category`` of a folder below the root, abbreviations of organs written out.

    DiffBoost (IEEE TMI 2025), stage 1. Names that are not known are used as they are.

    Args:
        folder: path with ``/``, ``MR/af/osseous_disruption`` for example.
        reference_behaviour: write out only what stands between two others, as the paper's code does: the organ of
            ``US/gb`` stays ``gb``.
    """
    words = folder.replace("_", " ").split("/")
    last = len(words) - 1
    inner = range(1, last) if reference_behaviour else range(len(words))
    return ",".join(ABBREVIATIONS.get(word, word) if i in inner else word for i, word in enumerate(words))


@dataclass(frozen=True)
class SampleMaker:
    """Makes samples of the contract of encoded pictures; ``mask`` is background all over.

    Args:
        size: height and width of a sample, pixels.
        colour: three channels instead of one.
        detector: draws edges that do not come along; None takes Scharr's and says so.
        reference_behaviour: of :func:`prompt_of`.
    """

    size: tuple[int, int]
    colour: bool = False
    detector: Detector | None = None
    reference_behaviour: bool = False

    def __call__(self, item: dict[str, Any], folder: Path) -> Sample:
        """The sample of ``id`` (path below the folder), ``image`` and perhaps ``edge`` of that size (both encoded)."""
        where = folder / item["id"]
        image = self.decode(item["image"], where)
        levels = _decode(item["edge"], "L", where) if "edge" in item else self._levels(to_image_tensor(image)[None])[0]
        return {
            "image": torch.from_numpy(resize_image(image, self.size, "area")).float().div_(255),
            "edge": torch.from_numpy(resize_image(levels, self.size, "area")).float().div_(255),
            "mask": torch.zeros(1, *self.size, dtype=torch.int64),
            "attributes": {},
            "id": item["id"],
            "prompt": prompt_of(item["id"].rpartition("/")[0], self.reference_behaviour),
        }

    def decode(self, encoded: bytes, where: Path) -> NDArray[np.uint8]:
        """Decode a picture to (H, W), or (H, W, 3) in colour.

        Raises:
            InvalidSampleError: for what is no picture, or one of more than 8 bits.
        """
        return _decode(encoded, "RGB" if self.colour else "L", where)

    def with_edges(self, items: Sequence[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
        """The items (``id``, ``image``) and ``edge``, drawn for images of one size at once.

        Edges are of the picture's own size, in levels of 8 bits.
        """
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda item: self.decode(item["image"], folder / item["id"]), items))
            edges: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(items)
            alike = defaultdict(list)
            for number, image in enumerate(images):
                alike[image.shape].append(number)
            for numbers in alike.values():
                drawn = self._levels(torch.stack([to_image_tensor(images[number]) for number in numbers]))
                for number, levels in zip(numbers, drawn, strict=True):
                    edges[number] = levels
            yield from ({**item, "edge": edge} for item, edge in zip(items, pool.map(encode, edges), strict=True))

    def _levels(self, images: Tensor) -> list[NDArray[np.uint8]]:
        return [to_uint8_image(edge) for edge in edges_of(images, detector=self.detector)]


def encode(image: NDArray[np.uint8]) -> bytes:
    """A picture (H, W) or (H, W, 3) as PNG."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return stream.getvalue()


def _decode(encoded: bytes, mode: Literal["L", "RGB"], where: Path) -> NDArray[np.uint8]:
    with opened(io.BytesIO(encoded), where) as image:
        if image.mode not in GREY_OR_COLOUR:
            raise InvalidSampleError(
                where, f"pixels of mode {image.mode!r}", "a picture of 8 bits; put one there under the same name"
            )
        return np.array(image.convert(mode))
