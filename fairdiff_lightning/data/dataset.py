"""Records of a native data set as samples of the contract."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fairdiff_lightning.data.cache import Arrays, Layout, NoCache, SampleCache, Storage, fingerprint, open_cache
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import NativeDataset, Record, check_classes
from fairdiff_lightning.data.resize import Region, Resize, centre_region, crop_to, resize_image, resize_mask
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.geometry import StructureSpec, mask_to_points


class SegmentationDataset(Dataset[Sample]):
    """Records of a native data set as samples of the contract: cropped, resized and cached.

    Args:
        dataset: reads a record.
        records: which ones, in this order; a repeated record is decoded once.
        attributes: names of the attributes that a sample carries.
        size: height and width of a sample, pixels; None keeps the crop as it is.
        crop: side of the centre crop taken first.
        resize: how, see :func:`~fairdiff_lightning.data.resize.resize_image`.
        native_mask: also give the mask at the file's own size, under ``native_mask``.
        num_points: also give so many outline points of the mask, under ``points``, see
            :func:`~fairdiff_lightning.geometry.mask_to_points`.
        cache: where decoded samples are kept; with ``size=None`` nothing is.
    """

    def __init__(
        self,
        dataset: NativeDataset,
        records: Sequence[Record],
        attributes: Sequence[str],
        size: tuple[int, int] | None = None,
        crop: int | None = None,
        resize: Resize = "area",
        native_mask: bool = False,
        cache: Storage = "none",
        num_points: int | None = None,
    ) -> None:
        self.num_points = num_points
        self.dataset, self.attributes, self.size, self.crop, self.resize = dataset, attributes, size, crop, resize
        self.native_mask, self.records = native_mask, list(records)
        distinct = {record.id: record for record in records}
        self._distinct = list(distinct.values())
        rows = {name: row for row, name in enumerate(distinct)}
        self._rows = [rows[record.id] for record in records]
        self._cache = self._open_cache(cache)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record, row = self.records[index], self._rows[index]
        image, mask, *points = self._cache.get(row, lambda i: self.decode(self._distinct[i]))
        pixels = torch.from_numpy(np.array(image))
        sample: Sample = {
            "image": pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels,
            "mask": torch.from_numpy(mask.astype(np.int64))[None],
            "attributes": {name: torch.tensor(record.attributes[name]) for name in self.attributes},
            "id": record.id,
            "synthetic": torch.tensor(record.synthetic),
        }
        if points:
            sample["points"] = torch.from_numpy(np.array(points[0]))
        if self.native_mask:
            native = self.dataset.read_mask(record)
            sample["native_mask"] = torch.from_numpy(native.astype(np.int64))[None]
            sample["region"] = torch.tensor(centre_region(native.shape, self.crop))
            sample["native_size"] = torch.tensor(native.shape)
        return sample

    def groups(self, attribute: str) -> list[int]:
        """Group index of every record."""
        return [record.attributes[attribute] for record in self.records]

    def decode(self, record: Record) -> Arrays:
        """Image, mask and, when asked for, outline points of a record, cropped and resized.

        Raises:
            InvalidSampleError: naming the file and what is wrong with it.
        """
        image, mask = self.dataset.read_arrays(record)
        check_classes(mask, len(self.dataset.classes), str(record.files))
        region: Region = centre_region(mask.shape, self.crop)
        image = resize_image(crop_to(image, region), self.size, self.resize)
        mask = resize_mask(crop_to(mask, region), self.size, self.resize)
        return (image, mask) if self.num_points is None else (image, mask, self._outline(mask, record))

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
        if storage == "none" or self.size is None or not self._distinct:
            return NoCache()
        files = [file for record in self._distinct for file in record.files.values()]
        reader = (type(self.dataset).__module__, type(self.dataset).__qualname__, self.dataset.version)
        settings = (sorted(vars(self.dataset).items()), self.size, self.crop, self.resize, self.num_points)
        key = fingerprint(files, reader, settings)
        dtype = np.dtype(np.uint8 if self.resize == "area" else np.float32)
        layout: Layout = {"images": ((self.dataset.channels, *self.size), dtype), "masks": (self.size, np.uint8)}
        if self.num_points is not None:
            layout = {**layout, "points": ((self.num_points, 3), np.float32)}
        return open_cache(storage, key, len(self._distinct), layout)
