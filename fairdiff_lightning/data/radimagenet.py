"""RadImageNet: 1.35 million radiological images in folders that name them, for learning to draw from text and edges."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fairdiff_lightning.data.accelerator import on_accelerator
from fairdiff_lightning.data.cache import cache_root
from fairdiff_lightning.data.edges import DetectorArgument, ScharrEdges, describe_detector
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.image_index import ImageIndex, build_index, hold_out, index_name
from fairdiff_lightning.data.native import make_directory_once
from fairdiff_lightning.data.phantoms import phantom_folder
from fairdiff_lightning.data.phantoms_radimagenet import write_phantom
from fairdiff_lightning.data.radimagenet_samples import SampleMaker, prompt_of
from fairdiff_lightning.data.radimagenet_shards import RadImageNetShards, read_facts, write_shards
from fairdiff_lightning.data.resumable_sampler import ResumableLoader, ResumableSampler
from fairdiff_lightning.data.sample import Sample, collate
from fairdiff_lightning.data.seeding import derive_seed, generator

TOP = "radiology_ai"
EXPECTED_TREE = (
    f"  {TOP}/<modality>/<region>/<pathology>/*.png    e.g. {TOP}/MR/af/plantar_fascia/plantar_fascia001.png"
)
SOURCE = "RadImageNet (Mei et al., Radiology: AI 2022) is released on request, for research only (radimagenet.com)."
"""The dataclasses first: jsonargparse makes of the name of one that has no fields what stands first."""


class RadImageNet(Dataset[Sample]):
    """Rows of an index as samples of the contract.

    Args:
        index: of the folder tree.
        rows: which ones.
        maker: makes samples of pictures.
    """

    def __init__(self, index: ImageIndex, rows: Sequence[int], maker: SampleMaker) -> None:
        self.index, self.rows, self.maker = index, rows, maker

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Sample:
        """The sample at a place.

        Raises:
            InvalidSampleError: for a picture that is gone, saying how many are, or one that cannot be decoded.
        """
        return self.maker(self._encoded(place), self.index.root)

    def with_edges(self, places: list[int]) -> Iterator[dict[str, Any]]:
        """What shards hold of the samples at some places: the files' bytes, and their edges, drawn in batches."""
        return self.maker.with_edges([self._encoded(place) for place in places], self.index.root)

    def _encoded(self, place: int) -> dict[str, Any]:
        """``id`` and ``image``, the bytes of the file, at a place."""
        path = self.index.path(int(self.rows[place]))
        try:
            return {"id": path, "image": (self.index.root / path).read_bytes()}
        except OSError as error:
            self.index.check()
            raise InvalidSampleError(self.index.root / path, f"unreadable ({error})", "a whole image file") from error


class RadImageNetDataModule(LightningDataModule):
    """RadImageNet for training a generator on text and edges, DiffBoost's stage 1 (IEEE TMI 2025, arXiv:2310.12868).

    The tree is listed once, see :mod:`~fairdiff_lightning.data.image_index`; the list is kept in the cache folder.
    Edges are drawn at the size of the file and resized with the image: gradients whenever an image is read, those of a
    network once, into shards. The order of training is that of the seed and the epoch, and a checkpoint taken in the
    middle of an epoch resumes there. There are no test and predict loaders.

    File names tell no patients. Held out is therefore a run of consecutive names in each folder; where a study's images
    are numbered one after another, it is cut at the ends of the run only.

    Args:
        root: folder that holds the modalities, or ``radiology_ai``; None writes a phantom into the cache folder.
        image_size: side, or height and width, of a sample, pixels.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        val_fraction: share of the images held out; DiffBoost trained on nearly all.
        colour: three channels; else one, which a base of three repeats.
        edges: ``scharr``, gradients; Canny's; a network, ``HED`` with its weights, which needs ``shards``. None takes
            ``scharr`` and says so, or the edges that shards have.
        shards: folder that :meth:`write_shards` wrote, read instead of the tree, few files at a time; needs
            ``litdata``.
        seed: of split and order; that of ``seed_everything`` when None.
        reference_behaviour: leave abbreviations at either end of a prompt, see
            :func:`~fairdiff_lightning.data.radimagenet_samples.prompt_of`.

    Raises:
        ValueError: for a ``val_fraction`` outside [0, 1), or ``edges`` that nobody draws; in ``prepare_data``, for a
            network that would draw edges image by image.
        DatasetNotFoundError: in ``prepare_data``, when the tree is missing or another one.
    """

    classes: ClassVar[tuple[str, ...]] = ("background",)
    num_classes: ClassVar[int] = 1
    intensity_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(
        self,
        root: str | None = None,
        image_size: int | tuple[int, int] = 256,
        batch_size: int = 48,
        num_workers: int = 0,
        val_fraction: float = 0.02,
        colour: bool = False,
        edges: DetectorArgument | None = None,
        shards: str | None = None,
        seed: int | None = None,
        reference_behaviour: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction}; expected is a share of the images, at least 0 and below 1.")
        given: Any = edges
        if given not in (None, "scharr") and (not callable(given) or type(given) is nn.Module):
            raise ValueError(
                f"edges={edges!r} draws nothing; expected is 'scharr', CannyEdges, or a network by its full name, as "
                "fairdiff_lightning.networks.hed.HED."
            )
        self.root, self.batch_size, self.num_workers = root, batch_size, num_workers
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.val_fraction, self.shards = val_fraction, None if shards is None else Path(shards)
        self.detector: Any = ScharrEdges() if given == "scharr" else given
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.in_channels = 3 if colour else 1
        self.attribute_groups: dict[str, list[str]] = {}
        self.num_groups: dict[str, int] = {}
        drawing = self.detector if shards is None else None
        self.maker = SampleMaker(self.image_size, colour, drawing, reference_behaviour)
        self.splits: dict[str, RadImageNet | RadImageNetShards] = {}
        self._folders: list[str] = []
        self._block = 1

    @property
    def folder(self) -> Path:
        """The folder that holds the modalities: below the root, or the phantom's."""
        root = phantom_folder("RadImageNet") if self.root is None else Path(self.root)
        return root / TOP if (root / TOP).is_dir() else root

    @property
    def prompts(self) -> list[str]:
        """The distinct prompts, some hundreds: a text encoder has to see no more; known after ``setup``."""
        return sorted({prompt_of(folder, self.maker.reference_behaviour) for folder in self._folders})

    def prepare_data(self) -> None:
        """Write the phantom when there is no root, and list the tree."""
        if self.shards is not None:
            return
        if isinstance(self.detector, nn.Module):
            name = type(self.detector).__name__
            raise ValueError(
                f"edges={name} without shards: a network would draw the edges of one image at a time, in every epoch "
                f"anew. Draw them once, in batches: python examples/write_shards.py <folder> --data.root={self.root} "
                f"--data.edges={type(self.detector).__module__}.{name} and its arguments, then train with "
                "--data.shards=<folder>. Or take --data.edges=scharr."
            )
        self._list()

    def setup(self, stage: str | None = None) -> None:
        """Open the list, compare it with the tree, and split it; a second call does nothing.

        Raises:
            InvalidSampleError: when images of the list, or shards, are gone.
            ValueError: when a split is empty, or the edges of the shards are another detector's, or drawn of another
                ``colour``.
        """
        if not self._folders:
            self._open_tree() if self.shards is None else self._open_shards(self.shards)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, the same for a seed and an epoch, resumable in the middle of it."""
        data = self.splits["train"]
        sampler = ResumableSampler(len(data), self.seed, *self._ranks(), self._block)
        return ResumableLoader(data, sampler=sampler, **self._loading())

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """In order; none when nothing is held out."""
        if "val" not in self.splits:
            return []
        data = self.splits["val"]
        sampler: DistributedSampler[Any] = DistributedSampler(data, *self._ranks(), shuffle=False)
        return DataLoader(data, sampler=sampler, **self._loading())

    def write_shards(self, directory: str | Path, samples_per_shard: int = 1000) -> None:
        """Write the splits, with edges, in a random order into shards; after a kill, a second call goes on.

        Needs twice their room while it writes. What the edges are drawn of is this module's ``colour``; a network draws
        them on the accelerator, where there is one.

        Args:
            directory: gets the folders ``train`` and ``val``, in the format of ``litdata``.
            samples_per_shard: images in a file; training mixes those of some files, see
                :class:`~fairdiff_lightning.data.resumable_sampler.ResumableSampler`.

        Raises:
            ImportError: without ``litdata``.
            ValueError: when the folder has shards, or parts of others; when this module reads shards itself.
        """
        if self.shards is not None:
            raise ValueError(f"shards='{self.shards}' is read; shards are written of a folder tree, with shards=None.")
        self._list()
        self.setup()
        data = {part: cast(RadImageNet, split) for part, split in self.splits.items()}
        facts = {
            "root": str(self.folder.resolve()),
            "folders": self._folders,
            "rows": {part: len(split) for part, split in data.items()},
            "samples_per_shard": samples_per_shard,
            "edges": describe_detector(ScharrEdges() if self.detector is None else self.detector),
            "colour": self.maker.colour,
        }
        with on_accelerator(self.detector):
            write_shards(Path(directory), {part: split.with_edges for part, split in data.items()}, facts, self.seed)

    def _list(self) -> None:
        if self.root is None:
            rank_zero_info(f"root is empty: the RadImageNet phantom in '{phantom_folder('RadImageNet')}' is used.")
            make_directory_once(phantom_folder("RadImageNet"), lambda path: write_phantom(path / TOP))
        if not self.folder.is_dir():
            raise DatasetNotFoundError("RadImageNet", self.folder, EXPECTED_TREE, SOURCE, "no such folder")
        index = build_index(self.folder, self._index_folder())
        if not len(index) or "" in index.folders:
            shutil.rmtree(index.folder)
            found = "images outside of folders that name them" if len(index) else "no images"
            raise DatasetNotFoundError("RadImageNet", self.folder, EXPECTED_TREE, SOURCE, found)

    def _open_tree(self) -> None:
        index = ImageIndex(self._index_folder())
        index.check()
        rows = hold_out(index.starts, self.val_fraction, derive_seed(self.seed, "split"))
        for part, held in zip(("train", "val"), rows, strict=True):
            if not held and (part == "train" or self.val_fraction):
                raise ValueError(
                    f"the {part} split of '{self.folder}' is empty: val_fraction={self.val_fraction} of {len(index)} "
                    "images. Change it, or give more images."
                )
            if held:
                self.splits[part] = RadImageNet(index, held, self.maker)
        self._folders = index.folders
        rank_zero_info(f"RadImageNet under '{self.folder}': train {len(rows[0])}, val {len(rows[1])}.")

    def _open_shards(self, shards: Path) -> None:
        facts = read_facts(shards)
        if self.detector is not None and describe_detector(self.detector) != facts["edges"]:
            raise ValueError(
                f"the edges in '{shards}' were drawn by another detector: {facts['edges'][:80]}. Leave edges empty to "
                "take them, or write the shards anew."
            )
        if self.maker.colour != facts["colour"]:
            raise ValueError(
                f"the edges in '{shards}' were drawn with colour={facts['colour']}, and here it is "
                f"{self.maker.colour}: set --data.colour={str(facts['colour']).lower()}, or write the shards anew."
            )
        self.splits = {part: RadImageNetShards(shards / part, self.maker) for part in facts["rows"]}
        self._folders, self._block = facts["folders"], facts["samples_per_shard"]

    def _index_folder(self) -> Path:
        return cache_root() / "index" / f"radimagenet-{index_name(self.folder)}"

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "collate_fn": collate,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            "generator": generator(self.seed, "loader"),
        }
