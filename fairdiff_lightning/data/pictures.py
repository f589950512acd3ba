"""Picture files: read with errors that name them, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import atomic_path


@contextmanager
def opened(source: str | Path | BinaryIO, where: str | Path) -> Iterator[Image.Image]:
    """Open a picture; what is wrong with it, also while it is decoded, is an error that names ``where``."""
    try:
        with Image.open(source) as image:
            yield image
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InvalidSampleError(
            where, f"unreadable ({error})", "a whole image file; fetch or write it again"
        ) from error


def decode(file: str | Path, mode: Literal["L", "RGB", "RGBA"]) -> NDArray[np.uint8]:
    """Pixels of a picture of 8 bits, (H, W) or (H, W, channels).

    Raises:
        InvalidSampleError: for a file that is no picture, or one of more than 8 bits.
    """
    with opened(file, file) as image:
        if image.mode.startswith(("I", "F")):
            raise InvalidSampleError(file, f"pixels of more than 8 bits ({image.mode})", "8 bits")
        return np.array(image.convert(mode))


def notes(file: str | Path) -> dict[str, str]:
    """The texts that were written into a picture."""
    with opened(file, file) as image:
        return {str(key): value for key, value in image.info.items() if isinstance(value, str)}


def save_png(path: Path, image: Image.Image | NDArray[np.uint8], texts: Mapping[str, str] | None = None) -> Path:
    """Store a picture without loss, with texts that :func:`notes` reads."""
    chunks = PngInfo()
    for key, value in (texts or {}).items():
        chunks.add_text(key, value)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)
    return path
