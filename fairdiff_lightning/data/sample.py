"""The sample contract: what every data set yields and every module accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict

import torch
from torch import Tensor
from torch.utils.data import default_collate

UNKNOWN = -1
"""Group index of a sample whose attribute is not known."""


class Sample(TypedDict, total=False):
    """One sample, or a batch of them with a leading dimension B (``id`` and ``prompt`` are then lists).

    Keys:
        image: float32 (C, H, W[, D]); its range is the data module's ``intensity_range``.
        mask: int64 (1, H, W[, D]) class indices.
        attributes: name -> int64 scalar group index, -1 when unknown.
        id: unique within the data set.
        native_mask: int64 (1, H0, W0[, D0]), the mask at the file's own size, when it is asked for.
        region: int64 (4,), top, left, height and width of what ``image`` shows, in pixels of the file.
        native_size: int64 (2,) or (3,), height, width and depth of the file.
        native_affine: float64 (4, 4) voxel to patient coordinates of the file, mm.
        points: float32 (N, 3) outline points (row, col, z).
        edge: float32 (1, H, W) in [0, 1].
        partner: float32 like ``image``, a synthetic image of the same mask, to be merged with it.
        keep_real: bool (1, H, W[, D]), where logits of ``image`` count, and not those of ``partner``.
        prompt: text that describes the image.
        affine: float64 (4, 4) voxel to patient coordinates, mm.
        spacing: float32 (3,) voxel size, mm.
        seed: int64 scalar from which a generator draws everything random of this sample.
        round: int64 scalar, which sample of its condition a request is, from 0.
        synthetic: bool scalar, True when a generator made it.
        source: id of the real case that a synthetic sample was derived from, empty when there is none.
        condition: id of what a synthetic sample was made to follow, a mask for example.
    """

    image: Required[Tensor]
    mask: Required[Tensor]
    attributes: Required[dict[str, Tensor]]
    id: Required[Any]
    native_mask: Any
    region: Tensor
    native_size: Tensor
    native_affine: Tensor
    points: Tensor
    edge: Tensor
    partner: Tensor
    keep_real: Tensor
    prompt: Any
    affine: Tensor
    spacing: Tensor
    seed: Tensor
    round: Tensor
    synthetic: Tensor
    source: Any
    condition: Any


@dataclass(frozen=True)
class AttributeSpec:
    """An attribute (race) and the names of its groups, in the order of their indices."""

    name: str
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.groups)


class SampleError(ValueError):
    """A sample or batch does not follow the contract."""


def validate(
    sample: Mapping[str, Any],
    *,
    num_classes: int | None = None,
    attributes: Sequence[AttributeSpec] = (),
    intensity_range: tuple[float, float] | None = None,
    batched: bool = False,
) -> None:
    """Check a sample, or a collated batch, against the contract.

    Args:
        sample: what a data set or a loader yields.
        num_classes: upper bound of the mask's indices, not checked when None.
        attributes: the attributes that must be there, with their groups.
        intensity_range: smallest and largest value that the image may hold, not checked when None.
        batched: whether tensors carry a leading batch dimension and ``id`` is a list.

    Raises:
        SampleError: naming the sample, the key, the value found and what was expected.
    """
    where = f"sample {sample.get('id', '?')!r}"

    def fail(key: str, found: object, expected: str) -> None:
        raise SampleError(f"{where}, key '{key}': found {found}; expected {expected}.")

    for key in ("image", "mask", "attributes", "id"):
        if key not in sample:
            fail(key, f"only {sorted(sample)}", "the keys image, mask, attributes and id")
    lead = 1 if batched else 0
    image, mask = sample["image"], sample["mask"]
    if type(image) is not Tensor or image.dtype != torch.float32 or image.dim() - lead not in (3, 4):
        fail("image", _describe(image), "a plain float32 tensor (C, H, W[, D])")
    if not bool(torch.isfinite(image).all()):
        fail("image", "NaN or infinite values", "finite values")
    if intensity_range is not None:
        low, high = float(image.min()), float(image.max())
        if low < intensity_range[0] - 1e-6 or high > intensity_range[1] + 1e-6:
            fail("image", f"values in [{low:.4g}, {high:.4g}]", f"values in {list(intensity_range)}")
    if type(mask) is not Tensor or mask.dtype != torch.int64 or mask.shape[lead : lead + 1] != (1,):
        fail("mask", _describe(mask), "a plain int64 tensor (1, H, W[, D])")
    if mask.shape[lead + 1 :] != image.shape[lead + 1 :] or mask.shape[:lead] != image.shape[:lead]:
        fail("mask", _describe(mask), f"the size of the image, {tuple(image.shape)}")
    if num_classes is not None and (int(mask.min()) < 0 or int(mask.max()) >= num_classes):
        fail("mask", f"classes {sorted(mask.unique().tolist())}", f"classes 0 to {num_classes - 1}")
    for spec in attributes:
        group = sample["attributes"].get(spec.name)
        if not isinstance(group, Tensor) or group.dtype != torch.int64 or group.dim() != lead:
            fail(f"attributes[{spec.name}]", _describe(group), "an int64 group index for each sample")
        elif int(group.min()) < UNKNOWN or int(group.max()) >= len(spec):
            fail(f"attributes[{spec.name}]", group.tolist(), f"-1 (unknown) or 0 to {len(spec) - 1}, {spec.groups}")
    ids = sample["id"] if batched else [sample["id"]]
    if not all(isinstance(i, str) for i in ids):
        fail("id", ids, "strings")


def collate(samples: Sequence[Sample]) -> Sample:
    """Stack samples into a batch; native masks of unequal size stay a list."""
    sizes = {s["native_mask"].shape for s in samples if "native_mask" in s}
    if len(sizes) <= 1:
        return default_collate(list(samples))  # type: ignore[no-any-return]
    batch: Sample = default_collate([{k: v for k, v in s.items() if k != "native_mask"} for s in samples])
    batch["native_mask"] = [s["native_mask"] for s in samples]
    return batch


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)}"
    return repr(value)
