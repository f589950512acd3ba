"""RadImageNet: 1.35 million radiological images in folders that name them, for learning to draw from text and edges."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fairdiff_lightning.data.cache import cache_root
from fairdiff_lightning.data.edges import CannyEdges, EdgeReader, ScharrEdges, describe_detector, edges_of
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.image_index import ImageIndex, build_index, hold_out, index_name
from fairdiff_lightning.data.native import atomic_path, make_directory_once, to_image_tensor, to_uint8_image
from fairdiff_lightning.data.phantoms import expose, phantom_folder, smooth_noise, soften
from fairdiff_lightning.data.pictures import opened
from fairdiff_lightning.data.resize import resize_image
from fairdiff_lightning.data.resumable_sampler import ResumableLoader, ResumableSampler
from fairdiff_lightning.data.sample import Sample, collate
from fairdiff_lightning.data.seeding import derive_seed, generator

ABBREVIATIONS = {
    "abd": "abdomen",
    "af": "ankle",
    "cbd": "common bile duct",
    "gb": "gallbladder",
    "ivc": "inferior vena cava",
}
TOP, FACTS = "radiology_ai", "shards.json"
EXPECTED_TREE = (
    f"  {TOP}/<modality>/<region>/<pathology>/*.png    e.g. {TOP}/MR/af/plantar_fascia/plantar_fascia001.png"
)
SOURCE = "RadImageNet (Mei et al., Radiology: AI 2022) is released on request, for research only (radimagenet.com)."
GREY_OR_COLOUR = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Modes of pictures of 8 bits."""
SECTION = 64
"""Shards that are written at a time: what a killed process has to repeat."""
EDGES_AT_ONCE = 256
PHANTOM_FOLDERS = ("CT/abd/normal", "CT/lung/nodule", "MR/af/plantar_fascia", "MR/hip/normal", "US/gb")
PHANTOM_SIZE, PHANTOM_COUNT = (56, 48), 12


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
    """Makes samples of the contract of encoded pictures.

    Args:
        size: height and width of a sample, pixels.
        colour: three channels instead of one.
        detector: draws edges that do not come along; None takes Scharr's.
        reference_behaviour: of :func:`prompt_of`.
    """

    size: tuple[int, int]
    colour: bool = False
    detector: EdgeReader | None = None
    reference_behaviour: bool = False

    def __call__(self, item: dict[str, Any], folder: Path) -> Sample:
        """The sample of ``id`` (path below the folder), ``image`` and perhaps ``edge`` of that size (both encoded)."""
        where = folder / item["id"]
        image = self.decode(item["image"], where)
        levels = _decode(item["edge"], "L", where) if "edge" in item else to_uint8_image(self.edge(image))
        return {
            "image": torch.from_numpy(resize_image(image, self.size, "area")).float().div_(255),
            "edge": torch.from_numpy(resize_image(levels, self.size, "area")).float().div_(255),
            "mask": torch.zeros(1, *self.size, dtype=torch.int64),
            "attributes": {},
            "id": item["id"],
            "prompt": prompt_of(item["id"].rpartition("/")[0], self.reference_behaviour),
        }

    def decode(self, encoded: bytes, where: Path) -> NDArray[np.uint8]:
        """Decode a picture to (H, W), or (H, W, 3) in colour, uint8."""
        return _decode(encoded, "RGB" if self.colour else "L", where)

    def edge(self, image: NDArray[np.uint8]) -> Tensor:
        """Edges (1, H, W) at the picture's own size, in steps of 1/255."""
        tensor = to_image_tensor(image)
        return edges_of(tensor) if self.detector is None else self.detector(tensor)


class RadImageNet(Dataset[Sample]):
    """Rows of an index as samples of the contract, in which ``mask`` is background all over.

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
        return self.maker(self.encoded(place), self.index.root)

    def encoded(self, place: int) -> dict[str, Any]:
        """``id`` and ``image``, the bytes of the file, at a place."""
        path = self.index.path(int(self.rows[place]))
        try:
            return {"id": path, "image": (self.index.root / path).read_bytes()}
        except OSError as error:
            self.index.check()
            raise InvalidSampleError(self.index.root / path, f"unreadable ({error})", "a whole image file") from error


class RadImageNetShards(Dataset[Sample]):
    """Shards that :meth:`RadImageNetDataModule.write_shards` wrote, read by ``litdata``.

    Args:
        folder: of one split.
        maker: makes samples of pictures.
    """

    def __init__(self, folder: Path, maker: SampleMaker) -> None:
        self.folder, self.maker, self._rows = folder, maker, _litdata().StreamingDataset(str(folder))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Sample:
        """The sample at a place; neighbours lie in one file."""
        return self.maker(self._rows[int(place)], self.folder)


class RadImageNetDataModule(LightningDataModule):
    """RadImageNet for training a generator on text and edges, DiffBoost's stage 1 (IEEE TMI 2025, arXiv:2310.12868).

    The tree is listed once, see :mod:`~fairdiff_lightning.data.image_index`; the list is kept in the cache folder.
    Edges are drawn at the size of the file and resized with the image. The order of training is that of the seed and
    the epoch, and a checkpoint taken in the middle of an epoch resumes there. There are no test and predict loaders.

    File names tell no patients. Held out is therefore a run of consecutive names in each folder; where a study's images
    are numbered one after another, it is cut at the ends of the run only.

    Args:
        root: folder that holds the modalities, or ``radiology_ai``; None writes a phantom into the cache folder.
        image_size: side, or height and width, of a sample, pixels.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        val_fraction: share of the images held out; DiffBoost trained on nearly all.
        colour: three channels; else one, which a base of three repeats.
        edges: detector, see :func:`~fairdiff_lightning.data.edges.edges_of`, whose edges are kept in the cache folder;
            None takes Scharr's gradients and says so, or the edges that shards have.
        shards: folder that :meth:`write_shards` wrote, read instead of the tree, few files at a time; needs
            ``litdata``.
        seed: of split and order; that of ``seed_everything`` when None.
        reference_behaviour: leave abbreviations at either end of a prompt, see :func:`prompt_of`.

    Raises:
        ValueError: for a ``val_fraction`` outside [0, 1).
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
        edges: nn.Module | ScharrEdges | CannyEdges | None = None,
        shards: str | None = None,
        seed: int | None = None,
        reference_behaviour: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction}; expected is a share of the images, at least 0 and below 1.")
        self.root, self.batch_size, self.num_workers = root, batch_size, num_workers
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.val_fraction, self.detector, self.shards = val_fraction, edges, None if shards is None else Path(shards)
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.in_channels = 3 if colour else 1
        self.attribute_groups: dict[str, list[str]] = {}
        self.num_groups: dict[str, int] = {}
        reader = None if edges is None or shards is not None else EdgeReader(edges)
        self.maker = SampleMaker(self.image_size, colour, reader, reference_behaviour)
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
        if self.root is None:
            rank_zero_info(f"root is empty: the RadImageNet phantom in '{phantom_folder('RadImageNet')}' is used.")
            make_directory_once(phantom_folder("RadImageNet"), _write_phantom)
        if not self.folder.is_dir():
            raise DatasetNotFoundError("RadImageNet", self.folder, EXPECTED_TREE, SOURCE, "no such folder")
        index = build_index(self.folder, self._index_folder())
        if not len(index) or "" in index.folders:
            shutil.rmtree(index.folder)
            found = "images outside of folders that name them" if len(index) else "no images"
            raise DatasetNotFoundError("RadImageNet", self.folder, EXPECTED_TREE, SOURCE, found)

    def setup(self, stage: str | None = None) -> None:
        """Open the list, compare it with the tree, and split it; a second call does nothing.

        Raises:
            InvalidSampleError: when images of the list are gone.
            ValueError: when a split is empty.
        """
        if self._folders:
            return
        if self.shards is not None:
            facts = self._read_facts(self.shards)
            self.splits = {part: RadImageNetShards(self.shards / part, self.maker) for part in facts["rows"]}
            self._folders, self._block = facts["folders"], facts["samples_per_shard"]
            return
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

        Needs twice their room while it writes. What the edges are drawn of is this module's ``colour``.

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
        _litdata()
        self.prepare_data()
        self.setup()
        directory, parts = Path(directory), list(self.splits)
        if (directory / FACTS).exists():
            raise ValueError(f"'{directory}' has shards already; delete it, or choose another folder.")
        facts = {
            "folders": self._folders,
            "rows": {part: len(data) for part, data in self.splits.items()},
            "samples_per_shard": samples_per_shard,
            "edges": describe_detector(ScharrEdges() if self.detector is None else self.detector),
            "colour": self.maker.colour,
        }
        work = directory / f".{derive_seed(json.dumps(facts), self.folder, self.seed):016x}"
        if not work.exists() and any((directory / part).exists() for part in parts):
            raise ValueError(f"'{directory}' has parts of other data or settings; delete it, or choose another folder.")
        for part in parts:
            self._write_part(directory / part, work / part, samples_per_shard)
        with atomic_path(directory / FACTS) as temporary:
            temporary.write_text(json.dumps(facts))
        shutil.rmtree(work)

    def _write_part(self, target: Path, work: Path, samples_per_shard: int) -> None:
        """Write a split section by section, each whole or not at all, and join them."""
        data = cast(RadImageNet, self.splits[target.name])
        order = torch.randperm(len(data), generator=generator(self.seed, "shards", target.name))
        sections = {work / f"{i:05d}": rows for i, rows in enumerate(torch.split(order, SECTION * samples_per_shard))}
        for section, places in sections.items():
            items = self._with_edges(data, places)
            make_directory_once(section, partial(_write_section, items=items, samples_per_shard=samples_per_shard))
        make_directory_once(target, partial(_join, list(sections)))

    def _with_edges(self, data: RadImageNet, places: Tensor) -> Iterator[dict[str, Any]]:
        """Files and their edges, drawn for images of one size at once, on the detector's device."""
        for chunk in torch.split(places, EDGES_AT_ONCE):
            items = [data.encoded(place) for place in chunk.tolist()]
            images = [to_image_tensor(self.maker.decode(item["image"], data.index.root / item["id"])) for item in items]
            alike = defaultdict(list)
            for number, image in enumerate(images):
                alike[image.shape].append(number)
            for numbers in alike.values():
                drawn = edges_of(torch.stack([images[i] for i in numbers]), detector=self.detector)
                for number, edge in zip(numbers, drawn, strict=True):
                    items[number]["edge"] = _encode(to_uint8_image(edge))
            yield from items

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

    def _read_facts(self, shards: Path) -> dict[str, Any]:
        """What is known of shards, all files of which are there.

        Raises:
            InvalidSampleError: when they are not whole.
            ValueError: when their edges are another detector's.
        """
        if not (shards / FACTS).is_file():
            raise InvalidSampleError(shards, f"no {FACTS}", "whole shards; let write_shards go on, or name its folder")
        facts: dict[str, Any] = json.loads((shards / FACTS).read_text())
        for part in facts["rows"]:
            chunks = json.loads((shards / part / "index.json").read_text())["chunks"]
            files = [shards / part / chunk["filename"] for chunk in chunks]
            gone = [file for file in files if not file.is_file()]
            if gone:
                found = f"gone, and it is the first of {len(gone)} such shards of {len(files)}"
                raise InvalidSampleError(gone[0], found, "every shard; put them back, or write the shards anew")
        if self.detector is not None and describe_detector(self.detector) != facts["edges"]:
            raise ValueError(
                f"the edges in '{shards}' were drawn by another detector: {facts['edges'][:80]}. Leave edges empty to "
                "take them, or write the shards anew."
            )
        return facts


def _decode(encoded: bytes, mode: Literal["L", "RGB"], where: Path) -> NDArray[np.uint8]:
    with opened(io.BytesIO(encoded), where) as image:
        if image.mode not in GREY_OR_COLOUR:
            raise InvalidSampleError(where, f"pixels of mode {image.mode!r}", "a picture of 8 bits")
        return np.array(image.convert(mode))


def _encode(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return stream.getvalue()


def _litdata() -> Any:
    try:
        importlib.import_module("litdata.streaming")
        return importlib.import_module("litdata")
    except ImportError as error:
        raise ImportError(
            f"shards are written and read by litdata ({error}): pip install 'fairdiff_lightning[shards]', or leave "
            "shards empty to read the folder tree."
        ) from error


def _write_section(target: Path, items: Iterator[dict[str, Any]], samples_per_shard: int) -> None:
    writer = _litdata().streaming.Cache(str(target), chunk_size=samples_per_shard)
    for number, item in enumerate(items):
        writer[number] = item
    writer.done()
    writer.merge()


def _join(sections: list[Path], target: Path) -> None:
    if len(sections) == 1:
        shutil.copytree(sections[0], target, dirs_exist_ok=True)
    else:
        _litdata().merge_datasets([str(section) for section in sections], str(target))


def _write_phantom(root: Path) -> None:
    """Write a few folders of textured slices; what is not normal has a bright spot."""
    height, width = PHANTOM_SIZE
    row, column = np.mgrid[:height, :width].astype(np.float32)
    for number, folder in enumerate(PHANTOM_FOLDERS):
        for i in range(PHANTOM_COUNT):
            rng = np.random.default_rng([number, i])
            y, x = np.array([height, width]) * rng.uniform(0.45, 0.55, 2)
            body = ((row - y) / (0.4 * height)) ** 2 + ((column - x) / (0.42 * width)) ** 2 <= 1
            image = soften(body, 1.0) * (0.35 + 0.05 * number + 0.08 * smooth_noise(rng, PHANTOM_SIZE, 4))
            if not folder.endswith("normal"):
                spot = np.hypot(row - y - rng.uniform(-9, 9), column - x - rng.uniform(-7, 7)) <= rng.uniform(2, 5)
                image += 0.35 * soften(spot, 0.8)
            path = root / TOP / folder / f"{folder.rpartition('/')[2]}{i + 1:03d}.png"
            with atomic_path(path) as temporary:
                temporary.write_bytes(_encode(expose(rng, image.astype(np.float32), 0.5, 0.03)))
