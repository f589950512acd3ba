"""HAM10000: dermoscopic images with lesion masks, age, sex and body site."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import (
    Index,
    NativeDataset,
    Record,
    atomic_path,
    bin_centre,
    bin_index,
    bin_names,
    check_same_size,
    to_uint8_image,
    visible_files,
)
from fairdiff_lightning.data.phantoms import SkinLook, allocate, dermoscopy
from fairdiff_lightning.data.pictures import decode, save_png
from fairdiff_lightning.data.sample import AttributeSpec, Sample
from fairdiff_lightning.data.segmentation import SegmentationDataModule

METADATA = "HAM10000_metadata.csv"
COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "synthetic", "source_id")
"""Of the tables that we write: the release's, and two that only generated samples fill."""
IMAGES = "HAM10000_images"
MASKS = "HAM10000_segmentations_lesion_tschandl"
SITES = (
    "scalp", "face", "back", "trunk", "chest", "upper extremity", "abdomen", "lower extremity", "neck", "foot",
    "hand", "ear", "genital", "acral",
)  # fmt: skip
PHANTOM_LOOKS = (
    SkinLook((0.90, 0.72, 0.66), 0.14, 1, 0.4, 0.03),
    SkinLook((0.86, 0.68, 0.60), 0.28, 3, 0.3, 0.02),
    SkinLook((0.82, 0.64, 0.56), 0.36, 4, 0.3, 0.02),
    SkinLook((0.74, 0.56, 0.48), 0.32, 6, 0.4, 0.03),
    SkinLook((0.55, 0.42, 0.36), -0.14, 10, 0.6, 0.05),
)
PHANTOM_SIZE, PHANTOM_COUNT, PHANTOM_AGES = (112, 150), 280, (10, 30, 50, 70, 85)


class HAM10000(NativeDataset):
    """HAM10000 dermoscopic images with lesion masks (Tschandl et al. 2018; CC BY-NC 4.0).

    Layout: ``HAM10000_metadata.csv``, folders ``HAM10000_images*`` with ``<image_id>.jpg`` (the two parts of the
    release, or one) and ``HAM10000_segmentations*`` with ``<image_id>_segmentation.png`` of {0, 255}.

    Args:
        age_bins: ages (years) at which a new age group begins; the default makes MEDFAIR's and dMoE's five groups.
    """

    name: ClassVar[str] = "HAM10000"
    classes: ClassVar[tuple[str, ...]] = ("background", "lesion")
    channels: ClassVar[int] = 3
    unit: ClassVar[str] = "lesion"
    drawn_over: ClassVar[str] = "age"
    expected_tree: ClassVar[str] = (
        f"  {METADATA}\n"
        "  HAM10000_images_part_1/ISIC_*.jpg, HAM10000_images_part_2/ISIC_*.jpg  (or one folder HAM10000_images)\n"
        f"  {MASKS}/ISIC_*_segmentation.png"
    )
    source: ClassVar[str] = "HAM10000 is at Harvard Dataverse, doi:10.7910/DVN/DBW86T (CC BY-NC 4.0)."

    def __init__(self, age_bins: Sequence[float] = (20, 40, 60, 80)) -> None:
        self.age_bins = tuple(age_bins)

    @property
    def attributes(self) -> dict[str, AttributeSpec]:
        """Age group, sex and body site; the first ten sites are dMoE's, in its order."""
        return {
            "age": AttributeSpec("age", bin_names(self.age_bins)),
            "sex": AttributeSpec("sex", ("female", "male")),
            "localization": AttributeSpec("localization", SITES),
        }

    def index(self, root: Path) -> Index:
        """List the rows of the table that have an image and a mask; the rest is counted."""
        if not (root / METADATA).is_file():
            raise self.not_found(root, f"no {METADATA}" if root.is_dir() else "no such folder")
        images = {p.stem: p for p in visible_files(root, f"{IMAGES}*/*.jpg")}
        masks = {
            p.stem.removesuffix("_segmentation"): p
            for p in visible_files(root, "HAM10000_segmentations*/*_segmentation.png")
        }
        table = self.read_table(root / METADATA)
        rows = table[table["image_id"].isin(images) & table["image_id"].isin(masks)]
        if rows.empty:
            found = f"{len(table)} rows, {len(images)} images and {len(masks)} masks, of which none belong together"
            raise self.not_found(root, found)
        listed = set(table["image_id"])
        left_out = {
            "rows of the table without an image": len(listed - images.keys()),
            "images without a mask": len((listed & images.keys()) - masks.keys()),
            "images without a row": len(images.keys() - listed),
        }
        records = [self._record(row, images, masks) for _, row in rows.iterrows()]
        return Index(records, {reason: count for reason, count in left_out.items() if count})

    def read_table(self, path: Path) -> pd.DataFrame:
        """Read the metadata table.

        Raises:
            InvalidSampleError: for a missing column, a repeated image or an age that is no number.
        """
        try:
            table = pd.read_csv(path)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise InvalidSampleError(path, f"unreadable ({error})", "a table with commas") from error
        missing = [c for c in ("lesion_id", "image_id", "age", "sex", "localization") if c not in table.columns]
        if missing:
            raise InvalidSampleError(path, f"columns {list(table.columns)}", f"the columns {', '.join(missing)} too")
        repeated = table["image_id"][table["image_id"].duplicated()]
        if len(repeated):
            raise InvalidSampleError(f"{path}[image_id]", f"{repeated.iloc[0]!r} twice", "one row for each image")
        ages = pd.to_numeric(table["age"], errors="coerce")
        wrong = table["age"][ages.isna() & table["age"].notna() & (table["age"] != "unknown")]
        if len(wrong):
            raise InvalidSampleError(f"{path}[age], row {wrong.index[0] + 2}", f"{wrong.iloc[0]!r}", "years or nothing")
        table["age"] = ages
        return table

    def read_arrays(self, record: Record) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Decode one image (H, W, 3) uint8 and its mask (H, W) in {0, 1}."""
        image = decode(record.files["image"], "RGB")
        mask = self.read_mask(record)
        check_same_size(image, mask, record.files["mask"])
        return image, mask

    def read_mask(self, record: Record) -> NDArray[np.uint8]:
        """Decode the mask (H, W) alone."""
        mask = decode(record.files["mask"], "L")
        found = np.unique(mask)
        if not np.isin(found, (0, 255)).all():
            raise InvalidSampleError(record.files["mask"], f"mask values {found[:8].tolist()}", "0 and 255")
        return (mask // 255).astype(np.uint8)

    def write(self, directory: Path, sample: Sample) -> Path:
        """Store a sample as ``.jpg`` (quality 100), ``_segmentation.png`` and a row of the table."""
        groups = {name: int(group) for name, group in sample["attributes"].items()}
        sex, site = groups.get("sex", -1), groups.get("localization", -1)
        row = {
            "lesion_id": sample["id"],
            "image_id": sample["id"],
            "age": bin_centre(groups.get("age", -1), self.age_bins),
            "sex": ("female", "male", "unknown")[sex],
            "localization": (*SITES, "unknown")[site],
            "synthetic": int(bool(sample.get("synthetic", False))) or "",
            "source_id": sample.get("source", ""),
        }
        self.write_mask(directory, sample["id"], sample["mask"][0].numpy().astype(np.uint8))
        again = (directory / IMAGES / f"{sample['id']}.jpg").exists()
        path = _write_image(directory, sample["id"], to_uint8_image(sample["image"]))
        if not (again and _has_row(directory / METADATA, sample["id"])):
            _append_row(directory / METADATA, row)
        return path

    def write_mask(self, directory: Path, sample_id: str, mask: NDArray[np.uint8]) -> Path:
        """Store a mask as ``HAM10000_segmentations_lesion_tschandl/<id>_segmentation.png`` of {0, 255}."""
        return save_png(directory / MASKS / f"{sample_id}_segmentation.png", mask * np.uint8(255))

    def mask_file(self, written: Path) -> Path:
        """The mask beside an image; a mask itself."""
        folder = written.parents[1] / MASKS
        return written if written.parent == folder else folder / f"{written.stem}_segmentation.png"

    def write_phantom(self, root: Path, seed: int) -> None:
        """Write 280 lesions with hair in two image parts; ages 5, 20, 50, 19 and 6 %, some lesions seen twice."""
        ages = allocate(PHANTOM_COUNT, {0: 0.05, 1: 0.20, 2: 0.50, 3: 0.19, 4: 0.06})
        lesion = 0
        for i, age in enumerate(ages):
            rng = np.random.default_rng([seed, i])
            again = i > 0 and age == ages[i - 1] and rng.random() < 0.5
            lesion += not again
            name = f"ISIC_{i + 24306:07d}"
            image, mask = dermoscopy(rng, PHANTOM_SIZE, PHANTOM_LOOKS[age])
            _write_image(root, name, image, f"{IMAGES}_part_{1 + i % 2}")
            self.write_mask(root, name, mask)
            row = {
                "lesion_id": f"HAM_{lesion:07d}",
                "image_id": name,
                "dx": "nv",
                "dx_type": "histo",
                "age": PHANTOM_AGES[age] if rng.random() > 0.02 else float("nan"),
                "sex": str(rng.choice(["female", "male"], p=[0.45, 0.55])),
                "localization": str(rng.choice(SITES)),
            }
            _append_row(root / METADATA, row)

    def _record(self, row: pd.Series[Any], images: dict[str, Path], masks: dict[str, Path]) -> Record:
        sex = {"female": 0, "male": 1}.get(str(row["sex"]), -1)
        site = str(row["localization"])
        source = row.get("source_id")
        return Record(
            id=row["image_id"],
            files={"image": str(images[row["image_id"]]), "mask": str(masks[row["image_id"]])},
            attributes={
                "age": bin_index(row["age"], self.age_bins),
                "sex": sex,
                "localization": SITES.index(site) if site in SITES else -1,
            },
            unit=row["lesion_id"],
            synthetic=bool(row.get("synthetic", 0) == 1),
            source=source if isinstance(source, str) else None,
        )


class HAM10000DataModule(SegmentationDataModule):
    """HAM10000 for segmentation: images squeezed to the asked size, split by lesion.

    With ``split_seed=0`` the images of known age are split as MEDFAIR splits them.

    Args:
        root: folder in the release's layout; None writes and uses a phantom.
        attributes: attributes to report and to route by; the first is the one that ``balance`` balances.
        image_size: side, or height and width, that the network sees, pixels; None keeps the crop as it is.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        age_bins: ages (years) at which a new age group begins.
        **kwargs: arguments of :class:`SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        attributes: Sequence[str] = ("age",),
        image_size: int | tuple[int, int] | None = 224,
        batch_size: int = 42,
        num_workers: int = 0,
        age_bins: Sequence[float] = (20, 40, 60, 80),
        **kwargs: Any,
    ) -> None:
        super().__init__(HAM10000(age_bins), root, attributes, image_size, batch_size, num_workers, **kwargs)


def _write_image(root: Path, name: str, image: NDArray[np.uint8], folder: str = IMAGES) -> Path:
    path = root / folder / f"{name}.jpg"
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="JPEG", quality=100, subsampling=0)
    return path


def _has_row(path: Path, image_id: str) -> bool:
    if not path.exists():
        return False
    with path.open(newline="") as stream:
        return any(row["image_id"] == image_id for row in csv.DictReader(stream))


def _append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the table, made with its header when it is not there; one line is one write, also of processes."""
    _make_table_once(path)
    values = {c: "" if isinstance(v := row.get(c, ""), float) and np.isnan(v) else v for c in COLUMNS}
    with path.open("a", newline="") as stream:
        csv.DictWriter(stream, COLUMNS).writerow(values)


def _make_table_once(path: Path) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    with open(handle, "w", newline="") as stream:
        csv.DictWriter(stream, COLUMNS).writeheader()
    os.chmod(temporary, 0o644)
    with suppress(FileExistsError):  # another process was first
        os.link(temporary, path)
    os.unlink(temporary)
