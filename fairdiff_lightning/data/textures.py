"""Textures that a plan asks for, by name or as histograms: each lesion is then painted once in every one of them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairdiff_lightning.data.errors import InvalidSampleError

TextureArgument = str | Sequence[float]
NAMED = re.compile(r"(?:cluster|exemplar):\d+|random|empirical|group")
"""Names that a generator of lesions knows."""


@dataclass(frozen=True)
class Texture:
    """One texture of a plan.

    Args:
        label: part of the ids; of a histogram with a digest of its numbers, so that an id means one texture.
        asked: a name, or the histogram of each class, one after the other.
    """

    label: str
    asked: str | tuple[float, ...]


def read_textures(given: Sequence[TextureArgument], bins: int) -> list[Texture]:
    """The textures of a plan.

    Args:
        given: names as ``cluster:2``; paths of ``.npy`` files of a histogram, (bins,) or (K, bins) for K lesion
            classes; or the numbers themselves, class after class.
        bins: of each histogram.

    Raises:
        InvalidSampleError: for a file or numbers that are no histogram, naming it and the sum; for histograms of other
            numbers of classes.
        ValueError: for something else than a list, an unknown name, and a texture that is given twice.
    """
    if isinstance(given, str):
        raise ValueError(f"generate: textures={given!r}; expected is a list, as [{given}].")
    found = [_texture(entry, bins, number) for number, entry in enumerate(given)]
    twice = [label for label, count in Counter(texture.label for texture in found).items() if count > 1]
    if twice:
        raise ValueError(f"generate: textures has '{twice[0]}' twice; each lesion comes once in each texture.")
    lengths = {_name(given[k], k): len(one.asked) for k, one in enumerate(found) if not isinstance(one.asked, str)}
    _refuse_unequal(lengths, bins)
    return found


def texture_batch(textures: Sequence[Texture]) -> Tensor | list[str | Tensor]:
    """What a generator gets for a batch: histograms (B, K * bins) float32, or a list where some are names."""
    asked: list[str | Tensor] = [t.asked if isinstance(t.asked, str) else torch.tensor(t.asked) for t in textures]
    histograms = [one for one in asked if isinstance(one, Tensor)]
    return torch.stack(histograms) if len(histograms) == len(asked) else asked


def _name(entry: TextureArgument, number: int) -> str:
    return entry if isinstance(entry, str) else f"generate.textures[{number}]"


def _refuse_unequal(lengths: Mapping[str, int], bins: int) -> None:
    first, expected = next(iter(lengths.items()), ("", 0))
    for name, length in lengths.items():
        if length != expected:
            raise InvalidSampleError(
                name, f"{length} numbers, and {expected} in {first}", f"one length: {bins} for each lesion class"
            )


def _texture(entry: TextureArgument, bins: int, number: int) -> Texture:
    if not isinstance(entry, str):
        return _histogram(entry, bins, _name(entry, number), "histogram")
    if entry.endswith(".npy"):
        return _histogram(_load(entry), bins, entry, re.sub(r"[^A-Za-z0-9-]", "-", Path(entry).stem))
    if not NAMED.fullmatch(entry):
        raise ValueError(
            f"generate: textures[{number}]={entry!r}; expected is 'cluster:<k>', 'exemplar:<k>', 'random', "
            "'empirical', 'group', the path of a .npy file, or a list of numbers."
        )
    return Texture(entry.replace(":", "-"), entry)


def _load(file: str) -> NDArray[np.generic]:
    try:
        loaded = np.load(file, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise InvalidSampleError(file, f"unreadable ({error})", "a .npy file of one histogram") from error
    return np.asarray(loaded)


def _histogram(given: Sequence[float] | NDArray[np.generic], bins: int, where: str, label: str) -> Texture:
    expected = f"shares of {bins} bins, from 0 on and of sum 1, for each lesion class"
    try:
        values = np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidSampleError(where, f"no numbers ({error})", expected) from error
    if values.ndim not in (1, 2) or not values.size or values.size % bins or values.shape[-1] % bins:
        raise InvalidSampleError(where, f"numbers of shape {values.shape}", expected)
    rows = values.reshape(-1, bins)
    sums, painted = rows.sum(1), rows.any(1)  # zeros stand for a class that is not painted
    shares = np.isfinite(rows).all() and (rows >= 0).all() and painted.any()
    if not (shares and np.allclose(sums[painted], 1, atol=1e-3)):
        found = f"numbers from {rows.min():g} to {rows.max():g}, sum {', '.join(f'{one:g}' for one in sums)}"
        raise InvalidSampleError(where, found, f"{expected}; divide by the sum")
    numbers = rows.astype(np.float32).ravel()
    digest = hashlib.sha256(numbers.tobytes()).hexdigest()[:8]
    return Texture(f"{label}-{digest}", tuple(numbers.tolist()))
