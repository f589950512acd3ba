"""Breast tomosynthesis slices with lesion masks, in the folders of the PIG paper."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fairdiff_lightning.data.dicom import read_frame, read_stored
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import (
    Index,
    NativeDataset,
    Record,
    check_same_size,
    to_uint8_image,
    visible_files,
)
from fairdiff_lightning.data.patient_table import rows_by_stem, rows_without_file, unsure_patients
from fairdiff_lightning.data.phantoms import allocate
from fairdiff_lightning.data.phantoms_dbt import BREAST_LOOKS, View, breast_slice
from fairdiff_lightning.data.pictures import decode, notes, save_png
from fairdiff_lightning.data.sample import UNKNOWN, AttributeSpec, Sample
from fairdiff_lightning.data.segmentation import SegmentationDataModule

IMAGES, MASKS = ("img", "images"), ("mask", "masks")
"""Names of the folders: the paper's, which are the ones we write, and CDD-CESM's."""
DICOM = (".dcm", ".dicom")
SUFFIXES = (".png", ".jpg", ".jpeg", *DICOM)
TABLE = "patients.csv"
PATIENT = r"(?<![A-Za-z0-9])(?:DBT-)?P\d+(?![A-Za-z0-9])"
VIEW_NAME = re.compile(r"(?<![A-Z0-9])([LR]?)(CC|MLO)\d?(?![A-Z0-9])")
SIDE_NAME = re.compile(r"(?<![A-Z0-9])([LR])(?![A-Z0-9])")
DENSITY: Mapping[str, Sequence[str]] = {"density": ("A", "B", "C", "D")}
UNSAID = "unknown"
THRESHOLD, GREY, UNEXPLAINED = 128, (64, 191), 0.05
PHANTOM_SIZE, PHANTOM_PATIENTS, PHANTOM_SLICES = (96, 96), 40, 3


class DBT(NativeDataset):
    """Breast slices beside lesion masks, as the PIG paper lays out its private DBTMassSeg (MICCAI 2025).

    Layout: ``img/`` and ``mask/`` (or ``images/`` and ``masks/``) with PNG, JPEG or single-frame DICOM files, paired by
    stem. Masks hold {0, 255}, cut at 128 since JPEG blurs them, or {0, 1}. The paper's ``masked/`` and ``multi_mask/``
    may lie beside them and are not read. ``patients.csv`` is optional: ``file`` (stem), ``patient``, and attributes by
    the names of their groups, empty where unknown. What it leaves open is taken from the file's name, but for the
    patient of a file without a row where the table names patients otherwise than the files' names do.

    Args:
        patient_pattern: regular expression of the patient within a file's stem: its first group, or all of it. The
            default finds ``P207`` in ``flipped_P207_L_CM_CC`` and ``DBT-P00013`` in ``DBT-P00013_rmlo``. A stem
            without a match is a patient of its own, which is counted and reported.
        columns: further columns of ``patients.csv`` that are attributes -> names of their groups.
        fold: number of the fold of patients that is the test split; None holds out no fold.
        num_folds: folds that the patients are divided into.
        split_seed: of the division into folds.

    Raises:
        ValueError: for a fold that is not one of ``num_folds``.
    """

    name: ClassVar[str] = "DBT"
    classes: ClassVar[tuple[str, ...]] = ("background", "lesion")
    channels: ClassVar[int] = 1
    mask_folder: ClassVar[str | None] = MASKS[0]
    expected_tree: ClassVar[str] = (
        "  img/<stem>.png|jpg|dcm    (or images/)\n"
        "  mask/<stem>.png|jpg|dcm   (or masks/), the lesion 255, the rest 0\n"
        f"  {TABLE}              (optional) file, patient, view, laterality, density"
    )
    source: ClassVar[str] = (
        "DBTMassSeg of the PIG paper is private. CDD-CESM (TCIA, CC BY 4.0) has masks and fits into this layout; for "
        "BCS-DBT use BCSDBTDataModule."
    )

    def __init__(
        self,
        patient_pattern: str = PATIENT,
        columns: Mapping[str, Sequence[str]] = DENSITY,
        fold: int | None = None,
        num_folds: int = 5,
        split_seed: int = 0,
    ) -> None:
        if fold is not None and not 0 <= fold < num_folds:
            raise ValueError(f"fold={fold} with num_folds={num_folds}; expected a fold of 0 to {num_folds - 1}.")
        self.patient_pattern = patient_pattern
        self.columns = {name: tuple(groups) for name, groups in columns.items()}
        self.fold, self.num_folds, self.split_seed = fold, num_folds, split_seed

    @property
    def attributes(self) -> dict[str, AttributeSpec]:
        """View, laterality, and what ``columns`` names."""
        groups = {"view": ("CC", "MLO"), "laterality": ("L", "R"), **self.columns}
        return {name: AttributeSpec(name, names) for name, names in groups.items()}

    def index(self, root: Path) -> Index:
        """List the pairs; a file without its partner or a sure patient, or a row without a file, is an error of it."""
        images, repeated_images = _by_stem(root, IMAGES)
        masks, repeated_masks = _by_stem(root, MASKS)
        if not images and not masks:
            raise self.not_found(root, "no image and no mask" if root.is_dir() else "no such folder")
        path, stems = root / TABLE, sorted(images.keys() | masks.keys())
        table = self._read_table(path) if path.is_file() else {}
        errors = [*repeated_images, *repeated_masks, *rows_without_file(path, table, set(stems))]
        unsure = unsure_patients(path, table, stems, self._named)
        records, left_out = [], Counter[str]()
        for stem in stems:
            if stem not in images or stem not in masks:
                errors.append(_unpaired(stem, images, masks))
                continue
            try:
                record, named = self._record(stem, images[stem], masks[stem], table.get(stem, {}))
            except InvalidSampleError as error:
                errors.append(error)
                continue
            if stem in unsure and not record.synthetic:
                errors.append(unsure[stem])
                continue
            records.append(record)
            if not named and not record.synthetic:
                left_out["names in which no patient is found, each taken for a patient (see patient_pattern)"] += 1
        return Index(self._hold_out(records), dict(left_out), errors)

    def read_arrays(self, record: Record) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Decode one image (H, W) uint8 and its mask (H, W) in {0, 1}."""
        file = record.files["image"]
        image = read_frame(file) if _is_dicom(file) else decode(file, "L")
        mask = self.read_mask(record)
        check_same_size(image, mask, record.files["mask"])
        return image, mask

    def read_mask(self, record: Record) -> NDArray[np.uint8]:
        """Decode the mask (H, W) alone."""
        file = record.files["mask"]
        return cut(read_stored(file) if _is_dicom(file) else decode(file, "L"), file)

    def write(self, directory: Path, sample: Sample) -> Path:
        """Store a sample as ``img/<id>.png`` and ``mask/<id>.png``; the image's text chunks hold all else."""
        said = {name: self._group_name(name, int(group)) for name, group in sample["attributes"].items()}
        if bool(sample.get("synthetic", False)):
            said["synthetic"] = "1"
        if sample.get("source"):
            said["source_id"] = sample["source"]
        self.write_mask(directory, sample["id"], sample["mask"][0].numpy().astype(np.uint8))
        return save_png(directory / IMAGES[0] / f"{sample['id']}.png", to_uint8_image(sample["image"]), said)

    def write_mask(self, directory: Path, sample_id: str, mask: NDArray[np.uint8]) -> Path:
        """Store a mask as ``mask/<id>.png`` of {0, 255}."""
        return save_png(directory / MASKS[0] / f"{sample_id}.png", mask * np.uint8(255))

    def write_phantom(self, root: Path, seed: int) -> None:
        """Write 3 slices of each of 40 breasts, CC and MLO; densities A to D 10, 40, 40 and 10 %."""
        rows = []
        for i, density in enumerate(allocate(PHANTOM_PATIENTS, {0: 0.1, 1: 0.4, 2: 0.4, 3: 0.1})):
            view: View = "CC" if i % 2 == 0 else "MLO"
            side = "LR"[i // 2 % 2]
            for k, depth in enumerate(np.linspace(-0.6, 0.6, PHANTOM_SLICES)):
                rng = np.random.default_rng([seed, i])
                image, mask = breast_slice(rng, PHANTOM_SIZE, BREAST_LOOKS[density], view, depth)
                stem = f"P{i + 1:03d}_{side}_{view}_{k:02d}"
                save_png(root / IMAGES[0] / f"{stem}.png", image)
                self.write_mask(root, stem, mask)
                rows.append({"file": stem, "patient": f"P{i + 1:03d}", "density": "ABCD"[density]})
        pd.DataFrame(rows).to_csv(root / TABLE, index=False)

    def _record(self, stem: str, image: Path, mask: Path, row: Mapping[str, str]) -> tuple[Record, bool]:
        """The record of a pair, and whether its patient is known."""
        text = notes(image) if image.suffix.lower() == ".png" else {}  # what write noted
        said = name_attributes(stem) | {name: text[name] for name in self.attributes if name in text} | dict(row)
        patient = row.get("patient") or self._named(stem)
        record = Record(
            id=stem,
            files={"image": str(image), "mask": str(mask)},
            attributes={name: self._group(name, said.get(name, UNSAID), image) for name in self.attributes},
            unit=patient or stem,
            synthetic=text.get("synthetic") == "1",
            source=text.get("source_id"),
        )
        return record, patient is not None

    def _named(self, stem: str) -> str | None:
        """The patient within a file's stem."""
        found = re.search(self.patient_pattern, stem)
        return found and (found[1] if found.re.groups else found[0])

    def _read_table(self, path: Path) -> dict[str, dict[str, str]]:
        """Stem -> what ``patients.csv`` says of it, empty cells left out."""
        rows = rows_by_stem(read_table(path, ("file", "patient")), path, SUFFIXES)
        for number, row in enumerate(rows.values(), start=2):
            for name in self.attributes.keys() & row.keys():
                self._group(name, row[name], f"{path}[{name}], row {number}")
        return rows

    def _group(self, name: str, group: str, where: str | Path) -> int:
        groups = self.attributes[name].groups
        if group != UNSAID and group not in groups:
            raise InvalidSampleError(where, f"{name} {group!r}", f"one of {', '.join(groups)}, or {UNSAID}")
        return UNKNOWN if group == UNSAID else groups.index(group)

    def _group_name(self, name: str, group: int) -> str:
        return UNSAID if group == UNKNOWN else self.attributes[name].groups[group]

    def _hold_out(self, records: Sequence[Record]) -> list[Record]:
        """Mark the slices of the fold's patients as the test split, which every split then respects."""
        patients = [record.unit for record in records if not record.synthetic]
        if self.fold is None or not patients:
            return list(records)
        folds = patient_folds(patients, self.num_folds, self.split_seed)
        held_out = {patient for patient, fold in folds.items() if fold == self.fold}
        return [replace(r, split="test") if r.unit in held_out and not r.synthetic else r for r in records]


class DBTDataModule(SegmentationDataModule):
    """Breast slices for segmentation and for generators of pairs: squeezed to a square, split or folded by patient.

    Args:
        root: folder in the paper's layout; None writes and uses a phantom.
        attributes: attributes to report and to route by; the first is the one that ``balance`` balances.
        image_size: side, or height and width, that the network sees, pixels; None keeps the crop as it is.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        patient_pattern: regular expression of the patient within a file's stem.
        columns: further columns of ``patients.csv`` that are attributes -> names of their groups.
        fold: number of the fold of patients that is the test split; None splits by ``fractions``.
        num_folds: folds that the patients are divided into.
        split_seed: of the division into folds and of the split.
        **kwargs: arguments of :class:`SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        attributes: Sequence[str] = ("view",),
        image_size: int | tuple[int, int] | None = 512,
        batch_size: int = 6,
        num_workers: int = 0,
        patient_pattern: str = PATIENT,
        columns: Mapping[str, Sequence[str]] = DENSITY,
        fold: int | None = None,
        num_folds: int = 5,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        dataset = DBT(patient_pattern, columns, fold, num_folds, split_seed)
        frame = (image_size, batch_size, num_workers)
        super().__init__(dataset, root, attributes, *frame, num_folds=num_folds, split_seed=split_seed, **kwargs)


def patient_folds(patients: Iterable[str], num_folds: int, seed: int) -> dict[str, int]:
    """Divide patients into folds whose numbers of patients differ by one at most.

    Args:
        patients: patient of every slice, repeats allowed; their order does not matter.
        num_folds: how many.
        seed: of the permutation.

    Returns:
        Patient -> number of its fold.

    Raises:
        ValueError: for fewer patients than folds.
    """
    names = sorted(set(patients))
    if len(names) < num_folds:
        raise ValueError(f"num_folds={num_folds} for {len(names)} patients; every fold needs one.")
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[patient]: place % num_folds for place, patient in enumerate(order)}


def cut(levels: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Cut a grey mask (H, W) at 128, or take {0, 1} as it is.

    Compression and resizing leave grey levels beside the outline; grey anywhere else means that the file is no mask
    of two classes.

    Raises:
        InvalidSampleError: with the share of grey pixels that the cut does not explain, or the values found.
    """
    low, high = int(levels.min()), int(levels.max())
    if low >= 0 and high <= 1:
        return levels.astype(np.uint8)
    if low < 0 or high > 255 or high < GREY[0]:
        raise InvalidSampleError(where, f"mask values from {low} to {high}", "0 and 255, or 0 and 1")
    drawn = levels >= GREY[0]
    lesion = (levels >= THRESHOLD).astype(np.uint8)
    outline = cv2.morphologyEx(lesion, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
    share = np.count_nonzero(drawn & (levels <= GREY[1]) & ~outline) / np.count_nonzero(drawn)
    if share > UNEXPLAINED:
        raise InvalidSampleError(
            where,
            f"{share:.0%} of the pixels from {GREY[0]} are grey ({GREY[0]} to {GREY[1]}) away from any outline",
            "a mask of two classes, 0 and 255, in which grey is only where compression blurred the outline",
        )
    return lesion


def name_attributes(stem: str) -> dict[str, str]:
    """View and laterality from a file's name: ``P207_L_CM_CC`` is CC and L, ``rmlo1`` is MLO and R."""
    view, side = VIEW_NAME.search(stem.upper()), SIDE_NAME.search(stem.upper())
    laterality = (view[1] if view else "") or (side[1] if side else "")
    return ({"view": view[2]} if view else {}) | ({"laterality": laterality} if laterality else {})


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a table as text.

    Raises:
        InvalidSampleError: when it is no table, or a column is missing.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InvalidSampleError(path, f"unreadable ({error})", "a table with commas") from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InvalidSampleError(path, f"columns {list(table.columns)}", f"the columns {', '.join(missing)} too")
    return table


def _by_stem(root: Path, folders: Sequence[str]) -> tuple[dict[str, Path], list[InvalidSampleError]]:
    """The files of whichever folder is there, by stem, and an error for each stem that several files have."""
    found = [p for name in folders for p in visible_files(root, f"{name}/*") if p.suffix.lower() in SUFFIXES]
    files = {file.stem: file for file in found}
    doubled = [file for file in found if files[file.stem] != file]
    errors = [InvalidSampleError(f, f"'{files[f.stem]}' has this stem too", "one file of each stem") for f in doubled]
    return files, errors


def _unpaired(stem: str, images: Mapping[str, Path], masks: Mapping[str, Path]) -> InvalidSampleError:
    lone, lacking = (images[stem], "mask") if stem in images else (masks[stem], "image")
    return InvalidSampleError(
        lone, f"no {lacking} of the stem '{stem}'", f"an image and a mask of each stem ({len(images)}, {len(masks)})"
    )


def _is_dicom(file: str) -> bool:
    return Path(file).suffix.lower() in DICOM
