"""BCS-DBT: public breast tomosynthesis volumes with boxes around lesions, as weak masks on the slices beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fairdiff_lightning.data.dbt import DBT, name_attributes, read_table
from fairdiff_lightning.data.dicom import read_frame, volume_size, write_volume
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import Index, Record, visible_files
from fairdiff_lightning.data.phantoms import allocate
from fairdiff_lightning.data.phantoms_dbt import BREAST_LOOKS, View, breast_slice
from fairdiff_lightning.data.segmentation import SegmentationDataModule
from fairdiff_lightning.data.splits import Splits, split_records

VOLUME = ["PatientID", "StudyUID", "View"]
BOX = ["X", "Y", "Width", "Height"]
NUMBERS = ("Slice", *BOX, "AD", "VolumeSlices")
PATHS = ("descriptive_path", "classic_path")
OWNER_SPLITS = {"validation": "val", "test": "test"}
"""What a table is named after -> the split that its cases are."""
DIAGNOSES = ("Normal", "Actionable", "Benign", "Cancer")
PHANTOM_SIZE, PHANTOM_VOLUMES, PHANTOM_DEPTH, PHANTOM_BITS = (96, 72), 30, 5, 10

Volume = tuple[str, str, str]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SliceRecord(Record):
    """One slice of a volume.

    Args:
        slice: its number, the first is 0.
        depths: how many slices its volume has, as the rows of its boxes say.
        boxes: x, y, width and height of the lesions' boxes on it, pixels of the slice as its view names it.
    """

    slice: int = 0
    depths: tuple[int, ...] = ()
    boxes: tuple[Box, ...] = ()


class BCSDBT(DBT):
    """Breast Cancer Screening DBT (Buda et al. 2021; TCIA, CC BY-NC 4.0): the slices that boxes mark.

    Layout: ``BCS-DBT boxes-*.csv``, ``BCS-DBT file-paths-*.csv`` and, for the diagnosis, ``BCS-DBT labels-*.csv``
    beside the download of TCIA. A boxes table joined with the paths (``boxes_with_paths-*.csv``) does for both. The
    mask of a slice holds all boxes that mark it. Tables named ``validation`` and ``test`` are these splits. The tables
    are published whole and a download seldom is: rows whose volume is not there are counted and reported, not refused.

    Samples are written, and read back, in the layout of :class:`~fairdiff_lightning.data.dbt.DBT`, since a mask is no
    box: a folder without tables is read as that.

    Args:
        offsets: slices to take around the slice of each box: 0 is its own, -1 the one before.
    """

    name: ClassVar[str] = "BCS-DBT"
    expected_tree: ClassVar[str] = (
        "  BCS-DBT boxes-train-v2.csv, BCS-DBT file-paths-train-v2.csv  (or boxes_with_paths-train-v2.csv)\n"
        "  BCS-DBT labels-train-v2.csv                                  (optional) the diagnosis\n"
        "  Breast-Cancer-Screening-DBT/DBT-P00013/.../1-1.dcm           where the paths say, or below manifest-*/\n"
        "or, of generated samples, img/ and mask/"
    )
    source: ClassVar[str] = "BCS-DBT is at TCIA, doi:10.7937/E4WT-CD02 (CC BY-NC 4.0)."

    def __init__(self, offsets: Sequence[int] = (0,)) -> None:
        names = tuple(name.lower() for name in DIAGNOSES)
        super().__init__(columns={"diagnosis": names, "distortion": ("no", "yes")})
        self.offsets = tuple(sorted(set(offsets)))

    def index(self, root: Path) -> Index:
        """List the slices around the boxes whose volumes are there; the others' boxes are counted."""
        boxes = _tables_of_boxes(root)
        if not boxes:
            return super().index(root)
        paths, labels = self._read_paths(root), self._read_labels(root)
        left_out, rows = Counter[str](), 0
        records: list[Record] = []
        for table in boxes:
            split = OWNER_SPLITS.get(_part(table))
            found = self._read_boxes(table)
            rows += len(found)
            for names, group in found.groupby(VOLUME, sort=True):
                volume = _volume(names)
                file = _first_file(root, paths.get(volume, ()))
                if file is None:
                    absent = "a file" if volume in paths else "a path"
                    left_out[f"rows of the boxes without {absent}"] += len(group)
                    continue
                records += self._slices(volume, group, {"image": str(file), "boxes": str(table)}, labels, split)
        if not records:
            counts = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
            raise self.not_found(root, f"{rows} rows in {len(boxes)} tables of boxes; {counts or 'no slice asked for'}")
        return Index(records, dict(left_out))

    def read_arrays(self, record: Record) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Decode one slice (H, W) uint8, turned as its view says, and its boxes as a mask (H, W) in {0, 1}."""
        if not isinstance(record, SliceRecord):
            return super().read_arrays(record)
        mask = self.read_mask(record)
        image = read_frame(record.files["image"], record.slice)
        view = self.attributes["laterality"].groups[record.attributes["laterality"]]
        return turn_to(image, view), mask

    def read_mask(self, record: Record) -> NDArray[np.uint8]:
        """The boxes of a slice as a mask (H, W); the volume is not decoded.

        Raises:
            InvalidSampleError: when the file is not the volume that the boxes were drawn in: it has another number of
                slices, or a box leaves it.
        """
        if not isinstance(record, SliceRecord):
            return super().read_mask(record)
        file = record.files["image"]
        depth, *size = volume_size(file)
        if record.depths != (depth,):
            raise InvalidSampleError(
                f"{record.files['boxes']}[VolumeSlices], {record.id}",
                " and ".join(map(str, record.depths)),
                f"{depth}, the frames of '{file}', which is another volume otherwise",
            )
        mask = np.zeros(size, np.uint8)
        for x, y, width, height in record.boxes:
            if x + width > mask.shape[1] or y + height > mask.shape[0]:
                raise InvalidSampleError(
                    f"{record.files['boxes']}, {record.id}",
                    f"a box over columns {x} to {x + width} and rows {y} to {y + height}",
                    f"one within the {mask.shape[1]} columns and {mask.shape[0]} rows of '{file}'",
                )
            mask[y : y + height, x : x + width] = 1
        return mask

    def write_phantom(self, root: Path, seed: int) -> None:
        """Write 30 volumes of 5 slices with a box each, 10 bits, a fifth of them stored the wrong way round."""
        boxes, labels = [], []
        for i, density in enumerate(allocate(PHANTOM_VOLUMES, {0: 0.1, 1: 0.4, 2: 0.4, 3: 0.1})):
            view: View = "CC" if i % 2 == 0 else "MLO"
            side, cancer = "lr"[i // 2 % 2], i % 3 == 0
            names = {"PatientID": f"DBT-P{i:05d}", "StudyUID": f"DBT-S{i:05d}", "View": side + view.lower()}
            file = f"Breast-Cancer-Screening-DBT/{names['PatientID']}/{names['View']}/1-1.dcm"
            slices = [
                breast_slice(np.random.default_rng([seed, i]), PHANTOM_SIZE, BREAST_LOOKS[density], view, depth)
                for depth in np.linspace(-0.8, 0.8, PHANTOM_DEPTH)
            ]
            image, mask = (np.stack(kind)[:, :, :: 1 if side == "r" else -1] for kind in zip(*slices, strict=True))
            stored = image[:, ::-1, ::-1] if i % 5 == 0 else image
            scale = (2**PHANTOM_BITS - 1) / 255
            window = (2 ** (PHANTOM_BITS - 1), 2**PHANTOM_BITS)
            write_volume(root / file, (stored * scale).astype(np.uint16), PHANTOM_BITS, window)
            middle = PHANTOM_DEPTH // 2
            box = dict(zip(BOX, _bounds(mask[middle]), strict=True))
            kind = "cancer" if cancer else "benign"
            facts = {"Slice": middle, **box, "Class": kind, "AD": int(i % 4 == 0), "VolumeSlices": PHANTOM_DEPTH}
            boxes.append({**names, "Subject": 0, **facts, **dict.fromkeys(PATHS, file)})
            labels.append({**names, **{name: int(name.lower() == kind) for name in DIAGNOSES}})
        pd.DataFrame(boxes).drop(columns=list(PATHS)).to_csv(root / "BCS-DBT boxes-train-v2.csv", index=False)
        pd.DataFrame(boxes)[[*VOLUME, *PATHS]].to_csv(root / "BCS-DBT file-paths-train-v2.csv", index=False)
        pd.DataFrame(labels).to_csv(root / "BCS-DBT labels-train-v2.csv", index=False)

    def _slices(
        self,
        volume: Volume,
        boxes: pd.DataFrame,
        files: dict[str, str],
        labels: Mapping[Volume, int],
        split: str | None,
    ) -> list[SliceRecord]:
        """The slices that a volume's boxes mark; those that lie beyond its ends are none."""
        marked: dict[int, list[dict[str, int]]] = {}
        for box in boxes[list(NUMBERS)].to_dict("records"):
            for number in (box["Slice"] + offset for offset in self.offsets):
                if 0 <= number < box["VolumeSlices"]:
                    marked.setdefault(number, []).append({str(name): int(value) for name, value in box.items()})
        patient, _, view = volume
        known = {"diagnosis": labels.get(volume, -1)}
        known |= {name: self._group(name, group, files["boxes"]) for name, group in name_attributes(view).items()}
        return [
            SliceRecord(
                id=f"{'_'.join(volume)}_{number:03d}",
                files=files,
                attributes=known | {"distortion": int(any(box["AD"] for box in found))},
                unit=patient,
                split=split,
                slice=number,
                depths=tuple(sorted({box["VolumeSlices"] for box in found})),
                boxes=tuple((b["X"], b["Y"], b["Width"], b["Height"]) for b in found),
            )
            for number, found in sorted(marked.items())
        ]

    def _read_boxes(self, path: Path) -> pd.DataFrame:
        """A table of boxes with whole numbers.

        Raises:
            InvalidSampleError: naming the row and column of what is no box or no view.
        """
        table = read_table(path, (*VOLUME, *NUMBERS))
        for column in NUMBERS:
            numbers = pd.to_numeric(table[column], errors="coerce")
            least = 1 if column in ("Width", "Height", "VolumeSlices") else 0
            _refuse(table, ~((numbers >= least) & (numbers % 1 == 0)), column, path, f"a whole number from {least}")
            table[column] = numbers.astype(int)
        beyond = table["Slice"] >= table["VolumeSlices"]
        _refuse(table, beyond, "Slice", path, "a slice below the row's VolumeSlices")
        known = table["View"].map(lambda view: len(name_attributes(view)) == 2)
        _refuse(table, ~known, "View", path, "lcc, rcc, lmlo or rmlo, with or without a number")
        return table

    def _read_paths(self, root: Path) -> dict[Volume, tuple[str, ...]]:
        """Volume -> its paths below the download, in either of TCIA's two spellings."""
        paths = {}
        for path in (*visible_files(root, "BCS-DBT*file-paths*.csv"), *visible_files(root, "boxes_with_paths*.csv")):
            table = read_table(path, VOLUME)
            given = [column for column in PATHS if column in table.columns]
            if not given:
                raise InvalidSampleError(path, f"columns {list(table.columns)}", f"{' or '.join(PATHS)} too")
            for row in table[[*VOLUME, *given]].itertuples(index=False):
                paths[_volume(row)] = tuple(p for p in row[len(VOLUME) :] if p)
        return paths

    def _read_labels(self, root: Path) -> dict[Volume, int]:
        """Volume -> index of its diagnosis.

        Raises:
            InvalidSampleError: for a row that does not have one diagnosis.
        """
        labels: dict[Volume, int] = {}
        for path in visible_files(root, "BCS-DBT*labels-*.csv"):
            table = read_table(path, (*VOLUME, *DIAGNOSES))
            ones = (table[list(DIAGNOSES)] == "1").to_numpy()
            _refuse(table, pd.Series(ones.sum(axis=1) != 1), "Normal", path, "a 1 for one of Normal to Cancer")
            volumes = map(_volume, table[VOLUME].itertuples(index=False))
            labels |= dict(zip(volumes, ones.argmax(axis=1).tolist(), strict=True))
        return labels


class BCSDBTDataModule(SegmentationDataModule):
    """BCS-DBT for segmentation with boxes as weak masks: slices squeezed to a square, split by patient.

    The cases of the owner's tables ``validation`` and ``test`` are the validation and the test split; ``fractions``
    divide the others where one of these tables is not there. A ``fold`` divides the patients of training and validation
    anew: its own validate, or are the test split where there is no table of that name.

    Args:
        root: folder with the tables and the download; None writes and uses a phantom.
        attributes: attributes to report and to route by; the first is the one that ``balance`` balances.
        image_size: side, or height and width, that the network sees, pixels; None keeps the crop as it is.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        offsets: slices to take around the slice of each box: 0 is its own, -1 the one before.
        num_folds: folds that the patients are divided into when ``fold`` is given; five in the paper of PIG.
        **kwargs: arguments of :class:`SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        attributes: Sequence[str] = ("view",),
        image_size: int | tuple[int, int] | None = 512,
        batch_size: int = 6,
        num_workers: int = 0,
        offsets: Sequence[int] = (0,),
        num_folds: int = 5,
        **kwargs: Any,
    ) -> None:
        frame = (image_size, batch_size, num_workers)
        super().__init__(BCSDBT(offsets), root, attributes, *frame, num_folds=num_folds, **kwargs)

    def _split(self, real: Sequence[Record]) -> Splits:
        published = [record for record in real if record.split == "val"]
        train, val, test = self.fractions
        if not published or self.fold is not None or train <= 0:
            return super()._split(real)
        rest = [record for record in real if record.split != "val"]
        return split_records(rest, (train + val, 0.0, test), self.split_seed) | {"val": published}


def turn_to(image: NDArray[np.uint8], laterality: str) -> NDArray[np.uint8]:
    """Turn a slice (H, W) by half a turn where its chest wall is not on the side that the view's laterality has it.

    The headers of BCS-DBT are unreliable, so that its authors' reader looks at which edge is brighter, takes the right
    one for R, and turns the slice otherwise, top to bottom too. The boxes are in the coordinates of the turned slice.
    """
    left, right = image[:, [0, -1]].sum(axis=0, dtype=np.int64)
    shown = "R" if left < right else "L"
    return image if shown == laterality else np.ascontiguousarray(image[::-1, ::-1])


def _first_file(root: Path, paths: Iterable[str]) -> Path | None:
    folders = [root, *sorted(root.glob("manifest-*"))]
    return next((folder / path for folder in folders for path in paths if (folder / path).is_file()), None)


def _refuse(table: pd.DataFrame, wrong: pd.Series[bool], column: str, path: Path, expected: str) -> None:
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise InvalidSampleError(f"{path}[{column}], row {row + 2}", f"{table[column].iloc[row]!r}", expected)


def _volume(row: Any) -> Volume:
    return row[0], row[1], row[2]


def _bounds(mask: NDArray[np.uint8]) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1


def _part(table: Path) -> str:
    """Which of the official parts a table is of: train, validation or test; empty when its name says none."""
    found = re.search(r"-(train|validation|test)", table.name)
    return found[1] if found else ""


def _tables_of_boxes(root: Path) -> list[Path]:
    """The tables of boxes; of a part that has none, the one that is joined with the paths."""
    plain = visible_files(root, "BCS-DBT*boxes-*.csv")
    parts = {_part(table) for table in plain}
    return [*plain, *(t for t in visible_files(root, "boxes_with_paths*.csv") if _part(t) not in parts)]
