"""LIDC-IDRI: blocks of chest CT around lung nodules, as LeFusion lays them out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fairdiff_lightning.data.dbt import read_table
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import Index, Record, visible_files
from fairdiff_lightning.data.nifti import nifti_grid
from fairdiff_lightning.data.phantoms import allocate
from fairdiff_lightning.data.phantoms_3d import TEXTURES, Labelled, lung_roi
from fairdiff_lightning.data.sample import UNKNOWN, AttributeSpec
from fairdiff_lightning.data.scan_list import PATIENT
from fairdiff_lightning.data.volume_dataset import VolumeDataset, check_id, depth_first, depth_last, group_index
from fairdiff_lightning.data.volume_module import VolumeDataModule
from fairdiff_lightning.data.volumes import (
    NIFTI,
    Volume,
    Window,
    check_hu,
    check_mask,
    read_nifti,
    read_notes,
    write_nifti,
)

PATHOLOGICAL, NORMAL, TEST, TABLE = "Pathological", "Normal", "test.txt", "nodules.csv"
NAME = re.compile(r"(?P<case>.+)_(?P<kind>C?)Vol_(?P<number>[^_]+)")
GENERATED = re.compile(r"Image_(?P<row>\d+)")
PHANTOM_SIZE = (64, 64, 32)
PHANTOM_CASES, PHANTOM_HEALTHY, PHANTOM_TEST = 24, 6, 5


class LIDC(VolumeDataset):
    """Lung nodules of LIDC-IDRI as blocks of CT (Armato et al. 2011; CC BY 3.0), in the layout of LeFusion.

    Layout: ``Pathological/Image/<case>_Vol_<n>.nii.gz`` in HU and ``Pathological/Mask/<case>_Mask_<n>.nii.gz`` of
    {0, 1}, both depth first; ``Pathological/test.txt`` names the test images. ``Normal/Image/<case>_CVol_<n>.nii.gz``
    are healthy blocks, with ``Normal/Mask/<case>_CMask_<n>.nii.gz`` for the lesions to come; they are
    :meth:`backgrounds`, no samples. ``Pathological/nodules.csv`` is optional: ``image`` (stem) and ``texture``, its
    name or LIDC's rating of 1 (ground-glass) to 5 (solid). A folder ``gen`` as the authors' inference script writes it
    (``Image/Image_<k>``, ``Mask/Mask_<k>``, values in [-1, 1]) is read as synthetic, and turned into HU.

    The axes are the layout's: what an affine says of them turns or flips nothing.

    Args:
        hu_offset: HU of what is stored as 0, for files whose offset was never applied (-1024, or -1000).
        ignore_mask_affine: take the image's affine for its mask too; the shapes must agree all the same.
    """

    name: ClassVar[str] = "LIDC"
    classes: ClassVar[tuple[str, ...]] = ("background", "nodule")
    window: ClassVar[Window] = Window(-1000, 400)
    lesions: ClassVar[tuple[int, ...]] = (1,)
    lesion_attributes: ClassVar[tuple[str, ...]] = ("texture",)
    axes: ClassVar[tuple[str, str, str]] = ("P", "L", "S")
    expected_tree: ClassVar[str] = (
        f"  {PATHOLOGICAL}/Image/<case>_Vol_<n>.nii.gz    depth first, HU\n"
        f"  {PATHOLOGICAL}/Mask/<case>_Mask_<n>.nii.gz    0 and 1\n"
        f"  {PATHOLOGICAL}/{TEST}                       (optional) images of the test split, without .nii.gz\n"
        f"  {PATHOLOGICAL}/{TABLE}                    (optional) image, texture\n"
        f"  {NORMAL}/Image/<case>_CVol_<n>.nii.gz         (optional) healthy blocks, Mask/<case>_CMask_<n>.nii.gz"
    )
    source: ClassVar[str] = (
        "LIDC-IDRI is at TCIA (CC BY 3.0); the blocks are LeFusion's, "
        "huggingface.co/datasets/YuheLiuu/LeFusion_Preprocessed_Data."
    )

    def __init__(self, hu_offset: float | None = None, ignore_mask_affine: bool = False) -> None:
        self.hu_offset, self.ignore_mask_affine = hu_offset, ignore_mask_affine

    @property
    def attributes(self) -> dict[str, AttributeSpec]:
        """Texture, where a table or the file itself says it."""
        return {"texture": AttributeSpec("texture", TEXTURES)}

    def index(self, root: Path) -> Index:
        """List the pairs, or the authors' generated ones; a file without its partner is an error of that file."""
        if _nifti(root / "Image", "Image_*/*"):
            return self._index_generated(root)
        folder = root / PATHOLOGICAL
        images, masks = _nifti(folder / "Image"), _nifti(folder / "Mask")
        if not images:
            raise self.not_found(root, f"no {PATHOLOGICAL}/Image" if root.is_dir() else "no such folder")
        test = _listed(folder / TEST)
        textures = _textures(folder / TABLE) if (folder / TABLE).is_file() else {}
        records, errors, left_out = [], [], Counter[str]()
        for stem, image in images.items():
            mask = masks.pop(_mask_stem(stem), None)
            try:
                records.append(self._record(stem, image, mask, test, textures))
            except InvalidSampleError as error:
                errors.append(error)
        errors += [
            InvalidSampleError(m, "a mask without its image", f"it under {folder / 'Image'}") for m in masks.values()
        ]
        for name, listed in ((TEST, test or ()), (TABLE, textures)):
            if absent := len(set(listed) - images.keys()):
                left_out[f"lines of {name} without an image"] = absent
        return Index(records, dict(left_out), errors)

    def backgrounds(self, root: Path) -> list[Record]:
        """List the healthy blocks; ``mask`` is among the files of one that has a lesion to come."""
        images, masks = _nifti(root / NORMAL / "Image"), _nifti(root / NORMAL / "Mask")
        return [
            Record(
                id=stem,
                files={"image": str(image)} | ({"mask": str(masks[m])} if (m := _mask_stem(stem)) in masks else {}),
                attributes={"texture": UNKNOWN},
                unit=self.case_key(stem),
            )
            for stem, image in images.items()
        ]

    def case_key(self, record_id: str) -> str:
        """The patient of a block, or of a whole scan whose path tells one of LIDC's."""
        match = NAME.fullmatch(record_id)
        patient = PATIENT.search(record_id)
        return patient[0] if patient else match["case"] if match else record_id

    def read_image(self, record: Record) -> Volume:
        """Read the block in HU, float32."""
        file = record.files["image"]
        volume = depth_last(read_nifti(file, axes=None))
        if GENERATED.fullmatch(Path(file).parent.name):
            return volume.with_array(_from_generated(volume.array, file))
        offset = None if record.synthetic else self.hu_offset
        return volume.with_array(check_hu(volume.array, file, offset).astype(np.float32))

    def read_scan(self, file: str) -> Volume:
        """Read a whole CT in HU, in RAS order."""
        scan = super().read_scan(file)
        return scan.with_array(check_hu(scan.array, file, self.hu_offset).astype(np.float32))

    def read_labels(self, record: Record) -> Volume:
        """Read the block's mask {0, 1}."""
        mask = depth_last(self.read_mask_file(record, None))
        return check_mask(mask, len(self.classes), record.files["mask"])

    def read_grid(self, record: Record) -> Volume:
        """The grid of the block, from its file's header alone."""
        return depth_last(nifti_grid(record.files["image"], None))

    def write_volumes(self, directory: Path, sample_id: str, image: Volume, mask: Volume, **notes: Any) -> Path:
        """Store a block (HU, rounded to int16) and its mask below ``Pathological``.

        An id that is not of the form ``<case>_Vol_<n>`` gets a file name that is.
        """
        stem = _stem(sample_id)
        self._write_mask(directory, stem, mask)
        stored = depth_first(image)
        stored = stored.with_array(np.round(stored.array).astype(np.int16))
        path = directory / PATHOLOGICAL / "Image" / f"{stem}.nii.gz"
        return write_nifti(path, stored, {"id": sample_id, **notes})

    def write_mask(
        self, directory: Path, sample_id: str, mask: NDArray[np.uint8], affine: NDArray[np.float64] | None = None
    ) -> Path:
        """Store a mask (H, W, D) as ``Pathological/Mask/<case>_Mask_<n>.nii.gz``."""
        return self._write_mask(directory, _stem(sample_id), Volume(mask, np.eye(4) if affine is None else affine))

    def mask_file(self, written: Path) -> Path:
        """The mask beside an image; a mask itself."""
        folder = written.parents[1] / "Mask"
        stem = written.name.removesuffix(".nii.gz")
        return written if written.parent == folder else folder / f"{_mask_stem(stem)}.nii.gz"

    def write_phantom(self, root: Path, seed: int) -> None:
        """Write 24 cases of a nodule or two, 15 % ground-glass, 25 % part-solid, 60 % solid, and 6 healthy ones."""
        affine = np.diag([0.7, 0.7, 1.25, 1.0])
        rows, test = ["image,texture"], []
        for i, texture in enumerate(allocate(PHANTOM_CASES, {0: 0.15, 1: 0.25, 2: 0.60})):
            rng = np.random.default_rng([seed, i])
            for n in range(1 + int(rng.random() < 0.3)):
                stem = f"LIDC-IDRI-{i + 1:04d}_Vol_{n + 1}"
                roi = lung_roi(rng, PHANTOM_SIZE, texture)
                self.write_volumes(root, stem, *_placed(roi, affine))
                rows.append(f"{stem},{TEXTURES[texture]}")
                if i >= PHANTOM_CASES - PHANTOM_TEST:
                    test.append(stem)
        for i in range(PHANTOM_HEALTHY):
            rng = np.random.default_rng([seed, PHANTOM_CASES + i])
            image = lung_roi(rng, PHANTOM_SIZE, None).image
            to_come = lung_roi(rng, PHANTOM_SIZE, 2).mask
            folder, case = root / NORMAL, f"LIDC-IDRI-{PHANTOM_CASES + i + 1:04d}"
            block, mask = _placed(Labelled(image, to_come), affine)
            write_nifti(
                folder / "Image" / f"{case}_CVol_1.nii.gz", depth_first(block.with_array(image.astype(np.int16)))
            )
            write_nifti(folder / "Mask" / f"{case}_CMask_1.nii.gz", depth_first(mask))
        (root / PATHOLOGICAL / TEST).write_text("\n".join(test) + "\n")
        (root / PATHOLOGICAL / TABLE).write_text("\n".join(rows) + "\n")

    def _record(
        self, stem: str, image: Path, mask: Path | None, test: frozenset[str] | None, textures: Mapping[str, int]
    ) -> Record:
        if not _is_pathological(stem):
            raise InvalidSampleError(image, f"the name '{stem}'", "<case>_Vol_<n>.nii.gz")
        if mask is None:
            raise InvalidSampleError(image, f"no mask '{_mask_stem(stem)}.nii.gz'", "one under Mask for each image")
        notes = read_notes(image)
        synthetic = bool(notes.get("synthetic", False))
        texture = group_index(self.attributes["texture"], notes.get("texture"))
        record_id = check_id(str(notes.get("id", stem)), image)
        return Record(
            id=record_id,
            files={"image": str(image), "mask": str(mask)},
            attributes={"texture": texture if texture != UNKNOWN else textures.get(stem, UNKNOWN)},
            unit=self.case_key(record_id),
            split=None if test is None or synthetic else "test" if stem in test else "train",
            synthetic=synthetic,
            source=notes.get("source"),
        )

    def _index_generated(self, root: Path) -> Index:
        """The authors' output: texture row k under ``Image/Image_k``; the background's stem is the source."""
        records, errors = [], []
        for image in visible_files(root, "Image/Image_*/*.nii.gz"):
            match = GENERATED.fullmatch(image.parent.name)
            row = int(match["row"]) if match else 0
            stem = image.name.removesuffix(".nii.gz")
            folder = root / "Mask" / f"Mask_{row}"
            names = (_mask_stem(stem), _mask_stem(stem).replace("_CMask_", "_Mask_"))
            mask = next((m for name in names if (m := folder / f"{name}.nii.gz").is_file()), None)
            if mask is None:
                errors.append(InvalidSampleError(image, f"no mask under '{folder}'", f"{names[-1]}.nii.gz"))
                continue
            texture = row - 1 if 1 <= row <= len(TEXTURES) else UNKNOWN
            files = {"image": str(image), "mask": str(mask)}
            records.append(
                Record(f"{stem}-{row}", files, {"texture": texture}, self.case_key(stem), synthetic=True, source=stem)
            )
        return Index(records, {}, errors)

    def _write_mask(self, directory: Path, stem: str, mask: Volume) -> Path:
        stored = depth_first(mask.with_array(mask.array.astype(np.uint8)))
        return write_nifti(directory / PATHOLOGICAL / "Mask" / f"{_mask_stem(stem)}.nii.gz", stored)


class LIDCDataModule(VolumeDataModule):
    """LIDC nodules as blocks, for generators of lesions and for segmentation; LeFusion's test set where it is listed.

    Args:
        root: folder in LeFusion's layout; None writes and uses a phantom.
        attributes: attributes to report and to route by; the first is the one that ``balance`` balances.
        image_size: height, width and depth of a block, voxels, cropped or padded with air about its centre.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        hu_offset: HU of what is stored as 0, for files whose offset was never applied.
        ignore_mask_affine: take the image's affine for its mask too.
        **kwargs: arguments of :class:`~fairdiff_lightning.data.volume_module.VolumeDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        attributes: Sequence[str] = ("texture",),
        image_size: tuple[int, int, int] | None = (64, 64, 32),
        batch_size: int = 20,
        num_workers: int = 0,
        hu_offset: float | None = None,
        ignore_mask_affine: bool = False,
        **kwargs: Any,
    ) -> None:
        dataset = LIDC(hu_offset, ignore_mask_affine)
        super().__init__(dataset, root, attributes, image_size, batch_size, num_workers, **kwargs)


def _nifti(folder: Path, pattern: str = "*") -> dict[str, Path]:
    """Stem -> file, in order."""
    return {p.name.split(".nii")[0]: p for p in visible_files(folder, pattern) if p.name.endswith(NIFTI)}


def _mask_stem(stem: str) -> str:
    head, sep, number = stem.rpartition("Vol_")
    return f"{head}Mask_{number}" if sep else stem


def _stem(sample_id: str) -> str:
    """Name of the file of a sample's image."""
    stem = check_id(sample_id, "a sample to write")
    return stem if _is_pathological(stem) else f"{stem}_Vol_1"


def _is_pathological(stem: str) -> bool:
    match = NAME.fullmatch(stem)
    return match is not None and not match["kind"]


def _listed(path: Path) -> frozenset[str] | None:
    """Names in ``test.txt``; None without one."""
    if not path.is_file():
        return None
    return frozenset(line.strip().removesuffix(".nii.gz") for line in path.read_text().splitlines() if line.strip())


def _textures(path: Path) -> dict[str, int]:
    """Stem -> texture; ratings 1 and 2 are ground-glass, 3 part-solid, 4 and 5 solid."""
    table = read_table(path, ("image", "texture"))
    named = {name: k for k, name in enumerate(TEXTURES)} | {"1": 0, "2": 0, "3": 1, "4": 2, "5": 2, "": UNKNOWN}
    for number, texture in enumerate(table["texture"]):
        if texture not in named:
            raise InvalidSampleError(
                f"{path}[texture], row {number + 2}", f"{texture!r}", f"{', '.join(TEXTURES)}, 1 to 5, or nothing"
            )
    return {row["image"].removesuffix(".nii.gz"): named[row["texture"]] for row in table.to_dict("records")}


def _from_generated(values: NDArray[Any], file: str) -> NDArray[np.float32]:
    """HU of the authors' output, HU = 700 (x + 1) - 1000; a sampler leaves [-1, 1] a little."""
    low, high = float(values.min()), float(values.max())
    if not (low > -2 and high < 2):
        raise InvalidSampleError(
            file, f"values from {low:g} to {high:g}", "[-1, 1], as the authors' script writes them"
        )
    return LIDC.window.from_unit((values + 1) / 2)


def _placed(roi: Labelled, affine: NDArray[np.float64]) -> tuple[Volume, Volume]:
    return Volume(roi.image, affine), Volume(roi.mask, affine)
