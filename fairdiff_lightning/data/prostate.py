"""Prostate radiotherapy: planning CT with target contours, T stage and centre, listed in a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fairdiff_lightning.data.case_folders import IMAGES, MASKS, Cases, describe, find_pairs
from fairdiff_lightning.data.case_table import check_groups, check_ids
from fairdiff_lightning.data.dbt import read_table
from fairdiff_lightning.data.dicom_exports import find_exports
from fairdiff_lightning.data.dicom_masks import is_dicom, is_structure_set, read_dicom_mask
from fairdiff_lightning.data.dicom_seg import write_segmentation
from fairdiff_lightning.data.dicom_series import read_series
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import Index, Record
from fairdiff_lightning.data.nifti import labels_on
from fairdiff_lightning.data.phantoms import allocate
from fairdiff_lightning.data.phantoms_pelvis import SCANNERS, STAGES, ct, grid_affine, pelvis
from fairdiff_lightning.data.rtstruct import write_structures
from fairdiff_lightning.data.sample import AttributeSpec
from fairdiff_lightning.data.volume_dataset import VolumeDataset, check_id, group_index
from fairdiff_lightning.data.volume_module import VolumeDataModule
from fairdiff_lightning.data.volumes import (
    Volume,
    Window,
    check_hu,
    check_mask,
    read_notes,
    read_volume,
    write_nifti,
)

TABLE = "cases.csv"
COLUMNS: Mapping[str, Sequence[str]] = {"t_stage": STAGES, "centre": ("A", "B")}
TARGETS = ("CTV.*", "PTV.*")
PHANTOM_SIZE, PHANTOM_STAGES = (64, 64, 32), {0: 0.1, 1: 0.5, 2: 0.3, 3: 0.1}
PHANTOM_CASES = (("A", "train", 24), ("A", "test", 8), ("B", "test", 8))
"""Centre, split, and number of cases."""


@dataclass(frozen=True)
class CaseRecord(Record):
    """A case, and the SeriesInstanceUID of its image in a folder that may hold several; None for the only one."""

    series: str | None = None


class Prostate(VolumeDataset):
    """Planning CT of the prostate with a target volume, in the shape of dMoE's private data (ICML 2025, section 4).

    Layout: ``cases.csv`` with ``id``, ``image`` and ``mask`` (paths below its folder), the columns that are
    attributes, by the names of their groups, empty where unknown, and optionally ``patient``, ``split`` (train or test,
    or nothing) and ``series`` (SeriesInstanceUID). An image is a NIfTI file, or a folder of one DICOM series, or of
    several of which one is named; a mask is a NIfTI file, or a DICOM RTSTRUCT or SEG of which the structures or
    segments that match are joined. Without the table, ``images/<id>.nii.gz`` and ``masks/<id>.nii.gz`` are paired, as
    samples are written, and so are ``images/<id>/`` of a DICOM series and ``masks/<id>.dcm``; without these folders,
    those of patients are searched, see :func:`~fairdiff_lightning.data.dicom_exports.find_exports`. A table without
    ``image`` and ``mask`` says the groups of the cases that are found so. An image without a mask is for prediction
    alone.

    Args:
        columns: columns of the table that are attributes -> names of their groups.
        classes: names of the mask's values, background first.
        targets: values of a NIfTI mask that are joined to the one target, as dMoE joins CTV, PTV and GTV; a mask with
            another value above 0 is an error. The first is what masks are written with. None keeps ``classes`` apart.
        structures: regular expressions of the whole names of the structures of an RTSTRUCT, or of the segments of a
            SEG, that are joined to the target, in capitals or not. A segment may have the name of its class instead.
        window: HU that are [0, 1] in a sample, the lower end first; the default is the paper's.
        hu_offset: HU of what is stored as 0, for files whose offset was never applied (-1024, or -1000).
        ignore_mask_affine: take the image's affine for its mask too; the shapes must agree all the same.

    Raises:
        ValueError: for ``targets`` with other than two classes, or that are no values from 1 to 255, or for a window
            of no width or that is upside down.
    """

    name: ClassVar[str] = "Prostate"
    mask_folder: ClassVar[str | None] = MASKS
    expected_tree: ClassVar[str] = (
        f"  {TABLE}    id, image, mask, and the attributes (t_stage, centre); patient and split are optional\n"
        "  <image>      a NIfTI file, or a folder of one DICOM series of CT, for each row\n"
        "  <mask>       a NIfTI file, or a DICOM RTSTRUCT or SEG; nothing in a row that is for prediction alone\n"
        f"or, without the table, {IMAGES}/<id>.nii.gz (or a folder <id>) and {MASKS}/<id>.nii.gz (or <id>.dcm),\n"
        "or a folder for each patient with the DICOM files of CT and RTSTRUCT, as planning systems export them"
    )
    source: ClassVar[str] = (
        "The prostate CT of dMoE is private; give your own in this layout. MR of the prostate is Task05 of the Medical "
        "Segmentation Decathlon, see DecathlonDataModule."
    )

    def __init__(
        self,
        columns: Mapping[str, Sequence[str]] = COLUMNS,
        classes: Sequence[str] = ("background", "target"),
        targets: Sequence[int] | None = (1,),
        structures: Sequence[str] = TARGETS,
        window: tuple[float, float] = (-200, 250),
        hu_offset: float | None = None,
        ignore_mask_affine: bool = False,
    ) -> None:
        if targets is not None and len(classes) != 2:
            raise ValueError(
                f"targets={tuple(targets)} with the classes {list(classes)}; expected are two, or targets=None."
            )
        if targets is not None and not (targets and all(value in range(1, 256) for value in targets)):
            raise ValueError(f"targets={tuple(targets)}; expected are values of a mask from 1 to 255, or None.")
        self.columns = {name: tuple(groups) for name, groups in columns.items()}
        self.classes = tuple(classes)  # type: ignore[misc] # of the reader, not of its class
        self.window = Window(*window)  # type: ignore[misc]
        self.targets = None if targets is None else tuple(targets)
        self.structures, self.hu_offset = tuple(structures), hu_offset
        self.ignore_mask_affine = ignore_mask_affine

    @property
    def attributes(self) -> dict[str, AttributeSpec]:
        """What ``columns`` names."""
        return {name: AttributeSpec(name, groups) for name, groups in self.columns.items()}

    def index(self, root: Path) -> Index:
        """List the rows of the table that have a mask, or the pairs; a row whose file is absent is an error."""
        cases = self._cases(root)
        index = self._records(root, {where: row for where, row in cases.rows.items() if row["mask"]})
        without = len(cases.rows) - len(index.records) - len(index.errors)
        left_out = {"images without a mask, which are for prediction alone": without} if without else {}
        return Index(index.records, left_out | cases.left_out, [*cases.errors, *index.errors])

    def unlabelled(self, root: Path) -> Index:
        """List the rows of the table, or the images, that have no mask."""
        return self._records(root, {where: row for where, row in self._cases(root).rows.items() if not row["mask"]})

    def read_image(self, record: Record) -> Volume:
        """Read the CT in HU, float32, in RAS order."""
        file, series = record.files["image"], getattr(record, "series", None)
        volume = read_series(file, series=series) if series else read_volume(file)
        if record.synthetic:  # a small block may hold neither air nor fat
            return volume.with_array(volume.array.astype(np.float32))
        return volume.with_array(check_hu(volume.array, file, self.hu_offset).astype(np.float32))

    def read_labels(self, record: Record) -> Volume:
        """Read the mask, or join the structures or segments on the grid of the image, in RAS order."""
        file = record.files["mask"]
        if is_dicom(file):
            return self._dicom_mask(file, self.read_image(record))
        mask = self.read_mask_file(record)
        return check_mask(mask, len(self.classes), file) if self.targets is None else _joined(mask, self.targets, file)

    def read_volumes(self, record: Record) -> tuple[Volume, Volume]:
        """Read image and mask, on one grid."""
        if not is_dicom(record.files["mask"]):
            return super().read_volumes(record)
        image = self.read_image(record)
        return image, self._dicom_mask(record.files["mask"], image)

    def write_volumes(self, directory: Path, sample_id: str, image: Volume, mask: Volume, **notes: Any) -> Path:
        """Store a CT (HU, rounded to int16) and its mask as ``images/<id>.nii.gz`` and ``masks/<id>.nii.gz``.

        What a table would say of it stands in the header of the image.
        """
        write_nifti(_place(directory, MASKS, sample_id), mask.with_array(self._values(mask.array)))
        stored = image.with_array(np.round(image.array).astype(np.int16))
        return write_nifti(_place(directory, IMAGES, sample_id), stored, {"id": sample_id, **notes})

    def write_mask(
        self, directory: Path, sample_id: str, mask: NDArray[np.uint8], affine: NDArray[np.float64] | None = None
    ) -> Path:
        """Store a mask (H, W, D) as ``masks/<id>.nii.gz``."""
        volume = Volume(self._values(mask), np.eye(4) if affine is None else affine)
        return write_nifti(_place(directory, MASKS, sample_id), volume)

    def write_prediction(self, directory: Path, record: Record, mask: NDArray[np.uint8]) -> Path:
        """Store a predicted mask (H, W, D) in ``masks``, voxel for voxel on the grid of the image's own file.

        Of a NIfTI file it is one; of a DICOM series an RTSTRUCT where the case has one, else a DICOM SEG.
        """
        path, image = _place(directory, MASKS, record.id), self.read_grid(record)
        if not Path(record.files["image"]).is_dir():
            return write_nifti(path, labels_on(image, self._values(mask)))
        write = write_structures if is_structure_set(record.files.get("mask", "")) else write_segmentation
        names, placed = dict(enumerate(self.classes[1:], 1)), image.with_array(mask.astype(np.uint8))
        return write(path.with_name(f"{record.id}.dcm"), placed, image, names)

    def write_phantom(self, root: Path, seed: int) -> None:
        """Write 24 training cases of centre A and 8 test cases each of A and B; stages 10, 50, 30 and 10 %."""
        rows = []
        for number, (stage, centre, split) in enumerate(_phantom_cases()):
            rng = np.random.default_rng([seed, number])
            scanner = SCANNERS["AB".index(centre)]
            affine = grid_affine(PHANTOM_SIZE, scanner.spacing)
            drawn = pelvis(rng, PHANTOM_SIZE, affine)
            image = Volume(ct(rng, drawn.tissue, scanner), affine).reoriented(scanner.axes)
            mask = Volume(drawn.targets[stage].astype(np.uint8), affine).reoriented(scanner.axes)
            name = f"{centre}{number + 1:03d}"
            self.write_volumes(root, name, image, mask)
            files = {"image": f"{IMAGES}/{name}.nii.gz", "mask": f"{MASKS}/{name}.nii.gz"}
            rows.append({"id": name, **files, "t_stage": STAGES[stage], "centre": centre, "split": split})
        pd.DataFrame(rows).to_csv(root / TABLE, index=False)

    def _values(self, mask: NDArray[Any]) -> NDArray[np.uint8]:
        """A mask of classes in the values of the files."""
        return (
            mask.astype(np.uint8) if self.targets is None else np.where(mask > 0, self.targets[0], 0).astype(np.uint8)
        )

    def _dicom_mask(self, file: str, image: Volume) -> Volume:
        return read_dicom_mask(file, image, self.classes, self.structures, joined=self.targets is not None)

    def _read_table(self, path: Path) -> dict[str, dict[str, str]]:
        """Where each row stands and what it says, of which everything but the files is checked."""
        table = read_table(path, ("id", *self.columns))
        files = [name for name in ("image", "mask") if name in table]
        if len(files) == 1:
            raise InvalidSampleError(f"{path}", f"the column {files[0]} alone", "image and mask, or neither of them")
        for column in ("id", *files[:1]):
            blank = table.index[table[column] == ""]
            if len(blank):
                raise InvalidSampleError(f"{path}[{column}], row {blank[0] + 2}", "nothing", f"an {column} in each row")
        check_ids(table, path)
        for name, groups in {**self.columns, "split": ("train", "test")}.items():
            check_groups(table, name, groups, path)
        rows = ({str(name): value for name, value in row.items()} for row in table.to_dict("records"))
        return {f"{path}, row {number}": row for number, row in enumerate(rows, 2)}

    def _cases(self, root: Path) -> Cases:
        """The rows of the table, or those that it would have for what the folders hold."""
        rows = self._read_table(root / TABLE) if (root / TABLE).is_file() else {}
        if any("image" in row for row in rows.values()):
            return Cases(rows)
        cases = find_pairs(root) if (root / IMAGES).is_dir() else find_exports(root)
        if not (cases.rows or cases.errors):
            counts = ", ".join(f"{count} {reason}" for reason, count in cases.left_out.items())
            found = f"no {TABLE} with images, nothing in {IMAGES}, and no CT in folders of patients"
            found += f" ({counts})" if counts else ""
            raise self.not_found(root, found if root.is_dir() else "no such folder")
        return describe(cases, rows)

    def _records(self, root: Path, rows: Mapping[str, Mapping[str, str]]) -> Index:
        records, errors = [], []
        for where, row in rows.items():
            try:
                records.append(self._record(root, row, where))
            except InvalidSampleError as error:
                errors.append(error)
        return Index(records, {}, errors)

    def _record(self, root: Path, row: Mapping[str, str], where: str) -> Record:
        files = {role: root / row[role] for role in ("image", "mask") if row[role]}
        for role, file in files.items():
            if not file.exists():
                raise InvalidSampleError(f"{where}, {role}", f"no file '{file}'", f"the path below '{root}'")
        notes = {} if files["image"].is_dir() else read_notes(files["image"])
        said = notes | {name: group for name, group in row.items() if group}
        synthetic = bool(notes.get("synthetic", False))
        return CaseRecord(
            id=row["id"],
            files={role: str(file) for role, file in files.items()},
            attributes={name: group_index(spec, said.get(name)) for name, spec in self.attributes.items()},
            unit=row.get("patient") or row["id"],
            split=None if synthetic else row.get("split") or None,
            synthetic=synthetic,
            source=notes.get("source"),
            series=row.get("series") or None,
        )


class ProstateDataModule(VolumeDataModule):
    """Planning CT for segmentation, as dMoE trains on it: 1 x 1 x 3 mm, blocks around the target, by T stage.

    Args:
        root: folder with ``cases.csv``; None writes and uses a phantom.
        attributes: attributes to report and to route by; the first is the one that ``balance`` balances.
        image_size: height, width and depth of a sample, voxels; None keeps each volume's own.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        spacing: of the voxels that volumes are resampled to, mm; None resamples nothing.
        crop_foreground: crop to the box in which the image is above the window's low end first.
        patch_size: height, width and depth of the block that training sees.
        positive: share of these blocks that lie around the target.
        columns: columns of the table that are attributes -> names of their groups.
        classes: names of the mask's values, background first.
        targets: values of a NIfTI mask that are joined to the one target; None keeps ``classes`` apart.
        structures: regular expressions of the names of structures (RTSTRUCT) or segments (SEG) that are joined.
        window: HU that are [0, 1] in a sample.
        hu_offset: HU of what is stored as 0, for files whose offset was never applied.
        ignore_mask_affine: take the image's affine for its mask too.
        **kwargs: arguments of :class:`~fairdiff_lightning.data.volume_module.VolumeDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        attributes: Sequence[str] = ("t_stage",),
        image_size: tuple[int, int, int] | None = None,
        batch_size: int = 4,
        num_workers: int = 0,
        spacing: tuple[float, float, float] | None = (1.0, 1.0, 3.0),
        crop_foreground: bool = True,
        patch_size: tuple[int, int, int] | None = (384, 384, 128),
        positive: float = 10 / 11,
        columns: Mapping[str, Sequence[str]] = COLUMNS,
        classes: Sequence[str] = ("background", "target"),
        targets: Sequence[int] | None = (1,),
        structures: Sequence[str] = TARGETS,
        window: tuple[float, float] = (-200, 250),
        hu_offset: float | None = None,
        ignore_mask_affine: bool = False,
        **kwargs: Any,
    ) -> None:
        dataset = Prostate(columns, classes, targets, structures, window, hu_offset, ignore_mask_affine)
        frame = (image_size, batch_size, num_workers, spacing, crop_foreground, patch_size, positive)
        super().__init__(dataset, root, attributes, *frame, **kwargs)


def _joined(mask: Volume, targets: Sequence[int], where: str) -> Volume:
    values = np.unique(mask.array)
    others = values[~np.isin(values, (0, *targets))]
    if len(others):
        raise InvalidSampleError(
            where,
            f"mask values {others[:8].tolist()}",
            f"0 and the targets {', '.join(map(str, targets))}; give `targets` the values that are joined, or None "
            "for classes apart",
        )
    return mask.with_array((mask.array > 0).astype(np.uint8))


def _place(root: Path, folder: str, name: str) -> Path:
    return root / folder / f"{check_id(name, root / folder)}.nii.gz"


def _phantom_cases() -> Iterator[tuple[int, str, str]]:
    """Stage, centre and split of each case."""
    for centre, split, count in PHANTOM_CASES:
        yield from ((stage, centre, split) for stage in allocate(count, PHANTOM_STAGES))
