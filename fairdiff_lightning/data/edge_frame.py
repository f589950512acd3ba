"""The frame of pictures and slices whose samples carry their edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fairdiff_lightning.data.cache import Arrays, Layout, fingerprint
from fairdiff_lightning.data.edges import EdgeReader
from fairdiff_lightning.data.frames import Frame, Tensors
from fairdiff_lightning.data.native import NativeDataset, Record
from fairdiff_lightning.data.sample import Sample

PLACE = 2
"""Of the edge among the arrays, after image and mask."""
MOST_SHOWN = 80
"""Characters of a detector's description in a message."""


@dataclass(frozen=True)
class EdgeFrame:
    """Another frame, and ``edge``: edges of what it shows, joined with the contours of the labels.

    Args:
        frame: of pictures, or of slices.
        edges: draws the edges and keeps them.
    """

    frame: Frame
    edges: EdgeReader

    def __repr__(self) -> str:
        """Settings of frame and detector, for the caches' keys."""
        return f"EdgeFrame({self.frame!r}, {self.edges.key(torch.empty(0), None)})"

    @property
    def size(self) -> tuple[int, ...] | None:
        """Sides of every sample; None where each has its own."""
        return self.frame.size

    def decode(self, dataset: NativeDataset, record: Record) -> Arrays:
        """Image (C, H, W), mask (H, W), edge (1, H, W) in levels of 8 bits, and what else the frame has."""
        arrays = self.frame.decode(dataset, record)
        edge = self.edges(*self._picture(arrays))
        return (*arrays[:PLACE], (edge * 255).round().to(torch.uint8).numpy(), *arrays[PLACE:])

    def layout(self, channels: int) -> Layout | None:
        """That of the frame, and the edge's."""
        layout = self.frame.layout(channels)
        if layout is None or self.size is None:
            return None
        items = list(layout.items())
        return dict([*items[:PLACE], ("edges", ((1, *self.size), np.uint8)), *items[PLACE:]])

    def tensors(self, arrays: Arrays) -> Tensors:
        """What the frame gives, and ``edge``."""
        edge = torch.from_numpy(np.array(arrays[PLACE])).float().div_(255)
        return {**self.frame.tensors(_without_edge(arrays)), "edge": edge}

    def native(self, dataset: NativeDataset, record: Record, arrays: Arrays) -> Tensors:
        """The mask at the file's own size, and where in the file the sample lies."""
        return self.frame.native(dataset, record, _without_edge(arrays))

    def condition(self, dataset: NativeDataset, record: Record) -> Tensors:
        """What the frame gives of a real image's mask, and the image's ``edge``.

        Raises:
            ValueError: for a generated mask, which no image belongs to.
        """
        if record.synthetic:
            raise ValueError(
                f"generate: '{record.id}' is a generated mask, but edges are drawn of real images. Give masks='train'."
            )
        found = self.tensors(self.decode(dataset, record))
        return {name: value for name, value in found.items() if name != "image"}

    def prepare(self, dataset: NativeDataset, records: Sequence[Record]) -> None:
        """Draw the edges of records in batches, for loader processes to find; not where samples differ in size.

        Nothing is decoded where files and settings are those of an earlier run, all edges of which are stored.
        """
        if self.size is None:
            return
        files = sorted({file for record in records for file in record.files.values()})
        reader = (type(dataset).__module__, type(dataset).__qualname__, dataset.version, sorted(vars(dataset).items()))
        name = fingerprint(files, reader, self, [record.id for record in records])
        if self.edges.cache.has_listed(name):
            return
        pictures = (self._picture(self.frame.decode(dataset, record)) for record in records)
        keys = self.edges.prepare(cast(Sample, {"image": image, "mask": mask}) for image, mask in pictures)
        self.edges.cache.put_list(name, keys)

    def _picture(self, arrays: Arrays) -> tuple[Tensor, Tensor]:
        """Image in [0, 1], which the reference's spline leaves a little, and mask."""
        found = self.frame.tensors(arrays)
        return found["image"].clamp(0, 1), found["mask"]


def _without_edge(arrays: Arrays) -> Arrays:
    return (*arrays[:PLACE], *arrays[PLACE + 1 :])


def prepare_edges(frame: Frame, dataset: NativeDataset, records: Sequence[Record]) -> None:
    """:meth:`EdgeFrame.prepare` of real records where samples carry edges."""
    if isinstance(frame, EdgeFrame):
        frame.prepare(dataset, [record for record in records if not record.synthetic])


def detector_of(frame: Frame) -> str | None:
    """What draws the edges of a frame's samples, by :func:`describe_detector`; None where they carry none."""
    return frame.edges.description if isinstance(frame, EdgeFrame) else None


def refuse_other_detector(trained: str | None, frame: Frame) -> None:
    """Check that edges are drawn as a checkpoint's training saw them.

    Args:
        trained: :func:`detector_of` then; None where that is not known, or samples carried no edges.
        frame: of the samples here.

    Raises:
        ValueError: naming both detectors when they differ.
    """
    own = detector_of(frame)
    if trained is not None and own is not None and trained != own:
        raise ValueError(
            f"edges: the checkpoint was trained on those of {_short(trained)}; here they are drawn by {_short(own)}, "
            "whose edges it does not know. Give the data module the detector of the training in `edges`, with its "
            "weights or settings, or train a generator on these."
        )


def _short(description: str) -> str:
    """One line of a description, with the end of a network's hash."""
    line = " ".join(description.split())
    return line if len(line) <= MOST_SHOWN else f"{line[: MOST_SHOWN - 20]} ... {line[-12:]}"
