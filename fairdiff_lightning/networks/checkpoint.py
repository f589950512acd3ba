"""The strict loader of published weights: every tensor is found, wanted and of the right shape."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Source = str | Path | Mapping[str, Any]

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DataParallel and torch.compile


class CheckpointMismatchError(ValueError):
    """A checkpoint that does not fit the network.

    Args:
        source: what was read.
        missing: names that the network needs and the checkpoint lacks.
        unexpected: names that the checkpoint holds and the network has no place for.
        misshapen: name -> (shape found, shape expected).
    """

    def __init__(
        self,
        source: str,
        missing: list[str],
        unexpected: list[str],
        misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen
        lines = [f"{source} does not fit this network; nothing was loaded."]
        lines += [f"  missing: {name}" for name in missing]
        lines += [f"  unexpected: {name}" for name in unexpected]
        lines += [f"  shape of {name}: found {found}, expected {wanted}" for name, (found, wanted) in misshapen.items()]
        lines.append("Build the network with the variant, classes, groups and experts of the checkpoint.")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class LoadReport:
    """What a strict load did.

    Attributes:
        source: the file, or ``state dict``.
        loaded: names, as the checkpoint has them, of the tensors that were copied.
        ignored: names that have no counterpart by design, such as a classifier's head.
    """

    source: str
    loaded: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        ignored = f", {len(self.ignored)} ignored ({', '.join(self.ignored)})" if self.ignored else ""
        return f"{len(self.loaded)} tensors from {self.source}{ignored}"


def describe(source: Source) -> str:
    """A source's name for messages."""
    return "the state dict" if isinstance(source, Mapping) else f"'{source}'"


def read_state_dict(source: Source) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, without the prefixes that DataParallel and ``torch.compile`` add.

    Args:
        source: path of a PyTorch or safetensors file, or a mapping; both may wrap the tensors in ``state_dict``, and a
            file may be a list that begins with them.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no checkpoint that can be read safely, or holds other things than tensors.
    """
    content: Any = source if isinstance(source, Mapping) else read_checkpoint(Path(source))
    if isinstance(content, list) and content and isinstance(content[0], Mapping):
        content = content[0]
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{describe(source)} holds a {type(content).__name__}; expected is a dictionary of tensors.")
    foreign = [f"{name} ({type(value).__name__})" for name, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(
            f"{describe(source)} holds {', '.join(foreign)}; expected are tensors only, or 'state_dict' with them."
        )
    return {_WRAPPERS.sub("", name): value for name, value in content.items()}


def check_state_dict(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes of two sets of tensors.

    Args:
        found: of the checkpoint.
        expected: of the network.
        source: the checkpoint's name for the message.

    Raises:
        CheckpointMismatchError: when a name is missing or unexpected, or a shape differs; it names them all.
    """
    misshapen = {
        name: (tuple(found[name].shape), tuple(tensor.shape))
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    }
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected or misshapen:
        raise CheckpointMismatchError(source, missing, unexpected, misshapen)


def load_strictly(source: Source, targets: Mapping[str, Tensor]) -> LoadReport:
    """Copy a checkpoint into tensors, all of them or none.

    Args:
        source: path or state dict, as :func:`read_state_dict` takes it.
        targets: name in the checkpoint -> tensor (or view of one) to fill in place.

    Raises:
        CheckpointMismatchError: when a name is missing or unexpected, or a shape differs; it names them all.
    """
    found = read_state_dict(source)
    check_state_dict(found, targets, describe(source))
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(found[name])
    return LoadReport(describe(source), tuple(targets))


def read_checkpoint(path: Path) -> Any:
    """What a PyTorch or safetensors file holds; nothing in it is run.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no checkpoint that can be read safely.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at '{path}'.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"'{path}' cannot be read as a PyTorch checkpoint of plain tensors: it is truncated, of another format, or "
            f"holds pickled objects, which are not run. Save its state dict alone and load that. ({error})"
        ) from error
