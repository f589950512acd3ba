"""Records of a native data set as samples of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fairdiff_lightning.data.cache import (
    Arrays,
    NoCache,
    SampleCache,
    Storage,
    fingerprint,
    open_cache,
    open_file_cache,
)
from fairdiff_lightning.data.captions import Caption
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.frames import Frame, PictureFrame, VolumeFrame
from fairdiff_lightning.data.native import NativeDataset, Record
from fairdiff_lightning.data.partners import read_partner
from fairdiff_lightning.data.patch_merge import PartnerIndex
from fairdiff_lightning.data.patches import PatchSampler
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.geometry import StructureSpec, mask_to_points


class SegmentationDataset(Dataset[Sample]):
    """Records of a native data set as samples of the contract: framed and cached.

    Args:
        dataset: reads a record.
        records: which ones, in this order; a repeated record is decoded once.
        attributes: names of the attributes that a sample carries.
        frame: what part of a file a sample shows, and at what size.
        native_mask: also give the mask at the file's own size, under ``native_mask``, and where in it the sample lies.
        cache: where decoded samples are kept; pictures without a size are not.
        num_points: also give so many outline points of the mask, under ``points``, see
            :func:`~fairdiff_lightning.geometry.mask_to_points`.
        patch: give a block of each volume, another one in each epoch, instead of the volume.
        partners: also give a synthetic image of the same mask, under ``partner``, read from its file each time; which
            one, the index tells: a place, an epoch, and how often the epoch has shown the sample before.
        caption: also give a text, under ``prompt``.
    """

    def __init__(
        self,
        dataset: NativeDataset,
        records: Sequence[Record],
        attributes: Sequence[str],
        frame: Frame = PictureFrame(),  # noqa: B008 - frozen
        native_mask: bool = False,
        cache: Storage = "none",
        num_points: int | None = None,
        patch: PatchSampler | None = None,
        partners: PartnerIndex | None = None,
        caption: Caption | None = None,
    ) -> None:
        self.dataset, self.records, self.attributes, self.frame = dataset, list(records), attributes, frame
        self.native_mask, self.num_points, self.patch = native_mask, num_points, patch
        self.partners, self.caption = partners, caption
        distinct = {record.id: record for record in records}
        self._distinct = list(distinct.values())
        rows = {name: row for row, name in enumerate(distinct)}
        self._rows = [rows[record.id] for record in records]
        self._cache = self._open_cache(cache)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int, int]) -> Sample:
        place, epoch, visit = index if isinstance(index, tuple) else (index, 0, 0)
        turn = (epoch, visit) if visit else (epoch,)
        record, row = self.records[place], self._rows[place]
        arrays = self._cache.get(row, lambda i: self.decode(self._distinct[i]))
        partner = self._partner(record, turn, arrays)
        if self.patch is not None:
            block, frame = self.patch.draw(arrays[1], *turn, place), cast(VolumeFrame, self.frame)
            arrays, partner = frame.cut(arrays, block), frame.cut(partner, block) if partner else None
        sample = {
            **self.frame.tensors(arrays),
            "attributes": {name: torch.tensor(record.attributes[name]) for name in self.attributes},
            "id": record.id,
            "synthetic": torch.tensor(record.synthetic),
        }
        if self.num_points is not None:
            sample["points"] = torch.tensor(arrays[-1])
        if partner is not None:
            sample["partner"] = self.frame.tensors(partner)["image"]
        if self.caption is not None:
            sample["prompt"] = self.caption.of(record.attributes)
        if self.native_mask:
            sample |= self.frame.native(self.dataset, record, arrays)
        return cast(Sample, sample)

    def groups(self, attribute: str) -> list[int]:
        """Group index of every record."""
        return [record.attributes[attribute] for record in self.records]

    def decode(self, record: Record) -> Arrays:
        """The frame's arrays of a record and, when asked for, outline points.

        Raises:
            InvalidSampleError: naming the file and what is wrong with it.
        """
        arrays = self.frame.decode(self.dataset, record)
        return arrays if self.num_points is None else (*arrays, self._outline(arrays[1], record))

    def _partner(self, record: Record, turn: Sequence[int], arrays: Arrays) -> Arrays | None:
        if self.partners is None:
            return None
        return read_partner(self.partners, record, turn, arrays, self.dataset, self.frame)

    def _outline(self, mask: NDArray[np.uint8], record: Record) -> NDArray[np.float32]:
        structures = StructureSpec(self.dataset.classes[1:])
        try:
            points = mask_to_points(torch.from_numpy(mask), int(self.num_points or 0), structures=structures)
        except ValueError as error:
            raise InvalidSampleError(
                f"{record.files}", f"{error}", "a mask that has every structure; on_error='skip' leaves others out"
            ) from error
        return points.numpy()

    def _open_cache(self, storage: Storage) -> SampleCache:
        layout = self.frame.layout(self.dataset.channels)
        if storage == "none" or not self._distinct or (layout is None and self.dataset.ndim == 2):
            return NoCache()
        files = [file for record in self._distinct for file in record.files.values()]
        reader = (type(self.dataset).__module__, type(self.dataset).__qualname__, self.dataset.version)
        settings = (sorted(vars(self.dataset).items()), self.frame, self.num_points)
        if layout is None:
            keyed = self._distinct if storage == "disk" else ()  # keys read from every file
            return open_file_cache(storage, [_key(record, reader, settings, _reading(record)) for record in keyed])
        if self.num_points is not None:
            layout = {**layout, "points": ((self.num_points, 3), np.float32)}
        read = [_reading(record) for record in self._distinct]
        key = fingerprint(files, reader, settings, read) if storage == "disk" else ""
        return open_cache(storage, key, len(read), layout)


def _reading(record: Record) -> tuple[object, ...]:
    """What beside the files says what is read: the id, since slices of a volume share a file, and a subclass's own."""
    known = {field.name for field in fields(Record)}
    return record.id, *((f.name, getattr(record, f.name)) for f in fields(record) if f.name not in known)


def _key(record: Record, *settings: object) -> str:
    return fingerprint(sorted(record.files.values()), *settings)
