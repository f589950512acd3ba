"""BUSI: breast ultrasound images with lesion masks, benign, malignant and normal."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image

from fairdiff_lightning.data.cache import Arrays, Layout
from fairdiff_lightning.data.dbt import cut
from fairdiff_lightning.data.edge_frame import EdgeFrame
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.frames import Frame, PictureFrame
from fairdiff_lightning.data.native import (
    Index,
    NativeDataset,
    Record,
    check_classes,
    check_same_size,
    to_uint8_image,
    visible_files,
)
from fairdiff_lightning.data.phantoms import allocate
from fairdiff_lightning.data.phantoms_busi import BENIGN, MALIGNANT, breast_ultrasound
from fairdiff_lightning.data.pictures import decode, notes, opened, save_png
from fairdiff_lightning.data.resize import centre_region, crop_to, resize_image
from fairdiff_lightning.data.sample import UNKNOWN, AttributeSpec, Sample
from fairdiff_lightning.data.segmentation import SegmentationDataModule
from fairdiff_lightning.data.slice_stack import slice_window, spline
from fairdiff_lightning.data.volumes import Window

Percentiles = Literal["native", "input"]
FOLDER = "Dataset_BUSI_with_GT"
DIAGNOSES = ("benign", "malignant", "normal")
UNSAID = "unknown"
"""Folder of samples whose diagnosis is not known; the release has none."""
MASK_NAME = re.compile(r"(.+)_mask(?:_(\d+))?")
DIAGNOSIS_NAME = re.compile(rf"(?<![a-z])({'|'.join(DIAGNOSES)})(?![a-z])")
MASK_MODES = ("1", "L", "RGB", "RGBA")
"""Of the release's masks, and so of the phantom's."""
BRIGHTEST = OPAQUE = 255
PHANTOM_COUNT, PHANTOM_SHARES, PHANTOM_LOOKS = 60, {0: 0.55, 1: 0.28, 2: 0.17}, (BENIGN, MALIGNANT, None)
PHANTOM_SIZES, PHANTOM_PAIRED = ((72, 96), (97, 129)), 8


class BUSI(NativeDataset):
    """Breast ultrasound images with lesion masks (Al-Dhabyani et al., Data in Brief 28, 2020).

    Layout: folders ``benign``, ``malignant`` and ``normal`` with ``<id>.png`` (grey content, RGB or grey, each of its
    own size) and ``<id>_mask.png``, ``<id>_mask_1.png`` ... (modes 1, L, RGB, RGBA or P; white is the lesion). Several
    masks are united, and a normal image without one has an empty one. What is written without a diagnosis goes into
    ``unknown``, which the release does not have.

    The 780 images are of 600 women, but the release does not say which are of one woman: a split is by image, and
    images of one woman may stand on both sides of it. Files of equal bytes are kept together, also where their
    diagnoses differ; images that show the same thing in other bytes are not found, and the release has many (Pawłowska
    et al., Data in Brief 48, 2023).
    """

    name: ClassVar[str] = "BUSI"
    classes: ClassVar[tuple[str, ...]] = ("background", "lesion")
    channels: ClassVar[int] = 1
    unit: ClassVar[str] = "image"
    expected_tree: ClassVar[str] = (
        f"  benign/benign (1).png, benign (1)_mask.png, benign (1)_mask_1.png ...  (here or in {FOLDER}/)\n"
        "  malignant/malignant (1).png, malignant (1)_mask.png ...\n"
        "  normal/normal (1).png, normal (1)_mask.png ..."
    )
    source: ClassVar[str] = (
        "BUSI is at https://scholar.cu.edu.eg/?q=afahmy/pages/dataset; see there for its terms, and cite "
        "doi:10.1016/j.dib.2019.104863."
    )

    @property
    def attributes(self) -> dict[str, AttributeSpec]:
        """The diagnosis, by the folder."""
        return {"diagnosis": AttributeSpec("diagnosis", DIAGNOSES)}

    def index(self, root: Path) -> Index:
        """List the images; one that lacks its mask, or a mask that lacks its image, is an error of that file."""
        if not root.is_dir():
            raise self.not_found(root, "no such folder")
        folders = (*DIAGNOSES, UNSAID)
        tree = root if any((root / name).is_dir() for name in folders) else root / FOLDER
        files = {name: [p for p in visible_files(tree, f"{name}/*") if p.suffix.lower() == ".png"] for name in folders}
        if not any(files.values()):
            raise self.not_found(root, f"no PNG file in a folder {', '.join(DIAGNOSES)}")
        records, errors = [], []
        for name in folders:
            images, masks = _images_and_masks(files[name])
            for image in images:
                try:
                    records.append(_record(image, masks.pop(image.stem, [])))
                except InvalidSampleError as error:
                    errors.append(error)
            for stem, lone in masks.items():
                errors += [InvalidSampleError(mask, f"no image '{stem}.png'", "one beside it") for mask in lone]
        return Index(join_duplicates(records), {}, errors)

    def read_arrays(self, record: Record) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Decode one image, its luminance (H, W) uint8, and its mask (H, W) in {0, 1}."""
        return decode(record.files["image"], "L"), self.read_mask(record)

    def read_mask(self, record: Record) -> NDArray[np.uint8]:
        """Decode and unite the masks (H, W); without any, nothing is a lesion."""
        with opened(record.files["image"], record.files["image"]) as image:
            united = np.zeros((image.height, image.width), np.uint8)
        for role, file in record.files.items():
            if role != "image":
                mask = decode_mask(file)
                check_same_size(united, mask, file)
                united |= mask
        return united

    def write(self, directory: Path, sample: Sample) -> Path:
        """Store a sample as ``<diagnosis>/<id>.png`` and ``<id>_mask.png``; the image's text chunks hold all else.

        Raises:
            ValueError: for an id that ends as the name of a mask does.
        """
        name, group = sample["id"], sample["attributes"].get("diagnosis")
        folder = directory / (_named_diagnosis(name) if group is None else _folder_name(int(group)))
        texts = {"synthetic": "1"} if bool(sample.get("synthetic", False)) else {}
        if sample.get("source"):
            texts["source_id"] = sample["source"]
        _save_mask(folder, name, sample["mask"][0].numpy().astype(np.uint8))
        return save_png(folder / f"{name}.png", to_uint8_image(sample["image"]), texts)

    def write_mask(self, directory: Path, sample_id: str, mask: NDArray[np.uint8]) -> Path:
        """Store a mask as ``<diagnosis>/<id>_mask.png`` of {0, 255}, by the diagnosis that the id names.

        Raises:
            ValueError: for an id that ends as the name of a mask does.
        """
        return _save_mask(directory / _named_diagnosis(sample_id), sample_id, mask)

    def mask_file(self, written: Path) -> Path:
        """The mask beside an image; a mask itself."""
        return written if MASK_NAME.fullmatch(written.stem) else written.with_name(f"{written.stem}_mask.png")

    def write_phantom(self, root: Path, seed: int) -> None:
        """Write 60 images of unequal sizes (55 % benign, 28 % malignant, 17 % normal) in the release's modes."""
        numbers = dict.fromkeys(DIAGNOSES, 0)
        for i, group in enumerate(allocate(PHANTOM_COUNT, PHANTOM_SHARES)):
            rng = np.random.default_rng([seed, i])
            diagnosis = DIAGNOSES[group]
            numbers[diagnosis] += 1
            height, width = (int(side) for side in rng.integers(*PHANTOM_SIZES))
            lesions = 2 if numbers[diagnosis] % PHANTOM_PAIRED == 0 else 1
            image, masks = breast_ultrasound(rng, (height, width), PHANTOM_LOOKS[group], lesions)
            stem = root / FOLDER / diagnosis / f"{diagnosis} ({numbers[diagnosis]})"
            save_png(stem.with_name(f"{stem.name}.png"), Image.fromarray(image).convert("RGB"))
            for number, mask in enumerate(masks or [np.zeros_like(image)]):
                ending = f"_{number}" if number else ""
                drawn = Image.fromarray(mask * np.uint8(255)).convert(MASK_MODES[i % len(MASK_MODES)])
                save_png(stem.with_name(f"{stem.name}_mask{ending}.png"), drawn)


@dataclass(frozen=True)
class PercentileFrame(PictureFrame):
    """A grey picture scaled to [0, 1] by its own percentiles, cropped and resized.

    What was generated is in [0, 1] of such pictures already, and is not scaled again.

    Args:
        percentiles: of which picture, see :class:`BUSIDataModule`.
    """

    percentiles: Percentiles = "native"

    def decode(self, dataset: NativeDataset, record: Record) -> Arrays:
        """Image (1, H, W), 8 bits or, by the percentiles of the sample, float32 in [0, 1], and mask (H, W)."""
        image, mask = dataset.read_arrays(record)
        check_classes(mask, len(dataset.classes), str(record.files))
        if self.percentiles == "native" and not record.synthetic:
            image = (slice_window(image).to_unit(image) * BRIGHTEST).round().astype(np.uint8)
        shown = crop_to(image, centre_region(mask.shape, self.crop))
        if self.percentiles == "native":
            return resize_image(shown, self.size, self.resize), self._framed(mask)
        resized = spline(shown[None].astype(np.float32), self.size)
        window = Window(0, BRIGHTEST) if record.synthetic else slice_window(resized)
        return window.to_unit(resized), self._framed(mask)

    def layout(self, channels: int) -> Layout | None:
        """As its base, or float32 where the resized image is scaled."""
        layout = super().layout(channels)
        if layout is None or self.percentiles == "native":
            return layout
        return {**layout, "images": (layout["images"][0], np.float32)}


class BUSIDataModule(SegmentationDataModule):
    """BUSI for segmentation and for generators: grey images squeezed to the asked size, split by image.

    Args:
        root: the folder ``Dataset_BUSI_with_GT`` or the one that holds it; None writes and uses a phantom.
        attributes: attributes to report and to route by; the first is the one that ``balance`` balances.
        image_size: side, or height and width, that the network sees, pixels; None keeps the crop as it is.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        percentiles: scale each real image to [0, 1] between its 0.5 and 99.5 percentiles, as DiffBoost does (IEEE TMI
            2025): those of the file's own picture (``native``), or, as its code, those of the sample, resized by
            scikit-image's smoothed spline of first order (``input``). None divides the levels by 255.
        **kwargs: arguments of :class:`SegmentationDataModule`.

    Raises:
        ValueError: for other percentiles, or another way to resize than theirs.
    """

    def __init__(
        self,
        root: str | None = None,
        attributes: Sequence[str] = ("diagnosis",),
        image_size: int | tuple[int, int] | None = 384,
        batch_size: int = 8,
        num_workers: int = 0,
        percentiles: Percentiles | None = "native",
        **kwargs: Any,
    ) -> None:
        super().__init__(BUSI(), root, attributes, image_size, batch_size, num_workers, **kwargs)
        if percentiles not in (*get_args(Percentiles), None):
            raise ValueError(f"percentiles={percentiles!r}: expected one of {list(get_args(Percentiles))}, or None.")
        if percentiles == "input" and self.resize != "area":
            raise ValueError(
                f"percentiles='input' with resize={self.resize!r}: it resizes as DiffBoost's code does. Leave resize "
                "out, or take percentiles='native'."
            )
        self.percentiles = percentiles
        if percentiles is not None:
            self.frame = _scaled(self.frame, percentiles)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint was trained on, and how its images were scaled."""
        return {**super().state_dict(), "percentiles": self.percentiles}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn of a checkpoint that was trained on images of another scale; see also the base."""
        super().load_state_dict(state_dict)
        found = state_dict.get("percentiles")
        if found != self.percentiles:
            rank_zero_warn(
                f"the checkpoint was trained with percentiles={found!r}, here it is {self.percentiles!r}: set "
                f"--data.percentiles={'null' if found is None else found}, or train anew."
            )


def _scaled(frame: Frame, percentiles: Percentiles) -> Frame:
    """The same frame, which scales its pictures by their percentiles."""
    if isinstance(frame, EdgeFrame):
        return replace(frame, frame=_scaled(frame.frame, percentiles))
    picture = cast(PictureFrame, frame)
    return PercentileFrame(picture.size, picture.crop, picture.resize, percentiles)


def decode_mask(file: str) -> NDArray[np.uint8]:
    """Decode a mask of mode 1, L, LA, RGB, RGBA or P as (H, W) in {0, 1}.

    A pixel is as bright as its brightest colour. An alpha channel counts where it varies, over black; one that is the
    same everywhere says nothing, also when it is 0.

    Raises:
        InvalidSampleError: for grey that no outline explains, and for black that only an alpha channel gives a shape.
    """
    pixels = decode(file, "RGBA")
    levels, alpha = pixels[..., :3].max(axis=-1), pixels[..., 3]
    if alpha.min() == alpha.max():
        return cut(levels, file)
    if not levels.any():
        raise InvalidSampleError(file, "black everywhere below an alpha channel that varies", "a lesion that is white")
    return cut((levels * (alpha / OPAQUE)).round().astype(np.uint8), file)


def join_duplicates(records: Sequence[Record]) -> list[Record]:
    """Give real images whose files hold the same bytes one unit; only files of equal size are read."""
    by_size: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if not record.synthetic:
            by_size[Path(record.files["image"]).stat().st_size].append(record)
    first: dict[str, str] = {}
    units: dict[str, str] = {}
    for alike in by_size.values():
        for record in alike if len(alike) > 1 else ():
            with open(record.files["image"], "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            units[record.files["image"]] = first.setdefault(digest, record.unit)
    return [replace(record, unit=units.get(record.files["image"], record.unit)) for record in records]


def _images_and_masks(files: Sequence[Path]) -> tuple[list[Path], dict[str, list[Path]]]:
    """The images, and the masks of each image's stem in the order of their numbers."""
    images, numbered = [], defaultdict(list)
    for file in files:
        named = MASK_NAME.fullmatch(file.stem)
        if named:
            numbered[named[1]].append((int(named[2] or 0), file))
        else:
            images.append(file)
    return images, {stem: [file for _, file in sorted(found)] for stem, found in numbered.items()}


def _record(image: Path, masks: Sequence[Path]) -> Record:
    diagnosis = image.parent.name
    if not masks and diagnosis != "normal":
        raise InvalidSampleError(image, "no mask", f"'{image.stem}_mask.png' beside it; only normal ones may lack it")
    texts = notes(image)
    return Record(
        id=image.stem,
        files={"image": str(image)} | {f"mask_{i}" if i else "mask": str(mask) for i, mask in enumerate(masks)},
        attributes={"diagnosis": UNKNOWN if diagnosis == UNSAID else DIAGNOSES.index(diagnosis)},
        unit=image.stem,
        synthetic=texts.get("synthetic") == "1",
        source=texts.get("source_id"),
    )


def _folder_name(group: int) -> str:
    return UNSAID if group == UNKNOWN else DIAGNOSES[group]


def _named_diagnosis(sample_id: str) -> str:
    """The folder that an id names: ``benign (1)`` and ``synthetic_benign_00001`` are benign."""
    named = DIAGNOSIS_NAME.search(sample_id)
    return named[1] if named else UNSAID


def _save_mask(folder: Path, sample_id: str, mask: NDArray[np.uint8]) -> Path:
    if MASK_NAME.fullmatch(sample_id):
        raise ValueError(f"id '{sample_id}' ends as the name of a mask does; choose one that does not end in '_mask'.")
    return save_png(folder / f"{sample_id}_mask.png", mask * np.uint8(255))
