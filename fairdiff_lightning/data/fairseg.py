"""Harvard-FairSeg: scanning-laser fundus images with disc and cup masks and six attributes."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fairdiff_lightning.data.cache import cache_root, fingerprint
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
from fairdiff_lightning.data.phantoms import FundusLook, allocate, slo_fundus
from fairdiff_lightning.data.sample import AttributeSpec, Sample
from fairdiff_lightning.data.segmentation import SegmentationDataModule

IMAGE_KEYS = ("slo_fundus", "fundus_slo", "fundus")
MASK_KEYS = ("disc_cup_mask", "disc_cup", "disc_cup_borders")
SCALAR_KEYS = (
    "race",
    "gender",
    "ethnicity",
    "hispanic",
    "language",
    "maritalstatus",
    "age",
    "synthetic",
    "source_id",
    "race_codes",
)
TEXT_KEYS = ("source_id", "race_codes")
RACE_CODES: dict[str | None, dict[int, int]] = {"public": {0: 0, 1: 1, 2: 2}, "fairdiff": {2: 0, 3: 1, 7: 2}}
GROUPS: dict[str, tuple[str, ...]] = {
    "race": ("Asian", "Black", "White"),
    "gender": ("Female", "Male"),
    "ethnicity": ("non-Hispanic", "Hispanic"),
    "language": ("English", "Spanish", "Other"),
    "maritalstatus": ("Married", "Single", "Divorced", "Widowed", "Separated"),
}
PHANTOM_LOOKS = (
    FundusLook(0.16, -0.20, 0.6, 0.05),
    FundusLook(-0.10, 0.14, 0.8, 0.06),
    FundusLook(0.18, 0.16, 0.4, 0.03),
)
PHANTOM_SIZE, PHANTOM_COUNT = (128, 166), 400


class FairSeg(NativeDataset):
    """Harvard-FairSeg SLO fundus images with disc and cup masks (CC BY-NC-ND 4.0; access by request).

    Layout: ``data_*.npz``, anywhere below the root, with an image (H, W) of 0-255, a mask (H, W) in {0, -1, -2}
    and scalar attributes. Three generations of key names are read: ``slo_fundus``/``disc_cup_mask`` (public release),
    ``fundus_slo``/``disc_cup`` (FairSeg's code) and ``fundus``/``disc_cup_borders`` (FairDiff's code).
    ``train.txt`` and ``test.txt``, when present, are the official split. The first is what :meth:`write` writes.

    Args:
        age_bins: ages (years) at which a new age group begins.
        race_codes: ``public`` 0/1/2, ``fairdiff`` 2/3/7 or ``auto``: decided once for the whole folder, since code 2
            is White in one and Asian in the other.
    """

    name: ClassVar[str] = "FairSeg"
    classes: ClassVar[tuple[str, ...]] = ("background", "rim", "cup")
    channels: ClassVar[int] = 1
    expected_tree: ClassVar[str] = (
        "  data_00001.npz ...  with keys slo_fundus, disc_cup_mask, race, gender, ethnicity, language, ...\n"
        "  train.txt, test.txt  (optional) one file name a line"
    )
    source: ClassVar[str] = (
        "Harvard-FairSeg is released on request by the Harvard Ophthalmology AI Lab (project page 'Harvard-FairSeg'; "
        "CC BY-NC-ND 4.0, research only)."
    )

    def __init__(
        self, age_bins: Sequence[float] = (60,), race_codes: Literal["auto", "public", "fairdiff"] = "auto"
    ) -> None:
        self.age_bins, self.race_codes = tuple(age_bins), race_codes

    @property
    def attributes(self) -> dict[str, AttributeSpec]:
        """Race, gender, ethnicity, language, marital status and age group."""
        groups = {**GROUPS, "age": bin_names(self.age_bins)}
        return {name: AttributeSpec(name, names) for name, names in groups.items()}

    def index(self, root: Path) -> Index:
        """List the ``.npz`` files below ``root``; their scalars are read once and kept in the cache folder."""
        files = visible_files(root, "**/*.npz") if root.is_dir() else []
        if not files:
            raise self.not_found(root, _summary(root))
        rows, errors = _cached_scalars(files)
        unmarked = [row.get("race") for row in rows.values() if "race_codes" not in row]
        decoders = RACE_CODES | {None: _race_decoder(unmarked, self.race_codes, root)}
        in_days = max((row["age"] for row in rows.values() if row.get("age") is not None), default=0) > 130
        split, left_out, records = self._official_split(root), Counter[str](), []
        for file, row in rows.items():
            official = split.get(self.case_key(file.stem))
            if split and official is None and not row.get("synthetic"):
                left_out["files that neither train.txt nor test.txt lists"] += 1
                continue
            attributes = {"race": decoders[row.get("race_codes")].get(row.get("race"), -1)}
            attributes["age"] = bin_index(_years(row.get("age"), in_days), self.age_bins)
            for name, names in GROUPS.items():
                if name != "race":
                    attributes[name] = _group(row, name, len(names), left_out)
            records.append(
                Record(
                    id=file.stem,
                    files={"image": str(file)},
                    attributes=attributes,
                    unit=file.stem,
                    split=official,
                    synthetic=bool(row.get("synthetic")),
                    source=row.get("source_id"),
                )
            )
        if not records and left_out:
            raise self.not_found(root, f"{len(rows)} files, none of which train.txt or test.txt lists")
        return Index(records, dict(left_out), errors)

    def case_key(self, record_id: str) -> str:
        """The number of a patient: FairDiff pads it with one more zero than the release."""
        return re.sub(r"^data_0*(?=\d)", "", record_id)

    def read_arrays(self, record: Record) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Decode one file: grey image (H, W) uint8 and mask (H, W) in {0 background, 1 rim, 2 cup}."""
        file = record.files["image"]
        with _open(file) as archive:
            image_key, mask_key = _first(archive, IMAGE_KEYS, file), _first(archive, MASK_KEYS, file)
            image, mask = archive[image_key], archive[mask_key]
        if image.ndim != 2:
            raise InvalidSampleError(f"{file}[{image_key}]", f"shape {image.shape}", "a grey image (H, W)")
        if not np.isfinite(image).all():
            raise InvalidSampleError(f"{file}[{image_key}]", "NaN or infinite pixels", "values of 0 to 255")
        if image.min() < 0 or image.max() > 255:
            raise InvalidSampleError(
                f"{file}[{image_key}]", f"pixels from {image.min()} to {image.max()}", "values of 0 to 255"
            )
        check_same_size(image, mask, file)
        return image.round().astype(np.uint8), _unsigned(mask, f"{file}[{mask_key}]")

    def read_mask(self, record: Record) -> NDArray[np.uint8]:
        """Decode the mask (H, W) alone."""
        file = record.files["image"]
        with _open(file) as archive:
            key = _first(archive, MASK_KEYS, file)
            return _unsigned(archive[key], f"{file}[{key}]")

    def write(self, directory: Path, sample: Sample) -> Path:
        """Store a sample as ``<id>.npz`` with the public release's keys."""
        groups = {name: int(group) for name, group in sample["attributes"].items()}
        scalars: dict[str, Any] = {name: groups.get(name, -1) for name in GROUPS}
        scalars["age"] = bin_centre(groups.get("age", -1), self.age_bins)
        scalars["race_codes"] = "public"
        if bool(sample.get("synthetic", False)):
            scalars["synthetic"] = 1
        if sample.get("source"):
            scalars["source_id"] = sample["source"]
        mask = sample["mask"][0].numpy().astype(np.uint8)
        path = directory / f"{sample['id']}.npz"
        _save(path, slo_fundus=to_uint8_image(sample["image"]), disc_cup_mask=_signed(mask), **scalars)
        return path

    def write_mask(self, directory: Path, sample_id: str, mask: NDArray[np.uint8]) -> Path:
        """Store a mask as ``<id>.npz`` with the key ``disc_cup_mask`` alone, signed as in the release."""
        path = directory / f"{sample_id}.npz"
        _save(path, disc_cup_mask=_signed(mask))
        return path

    def write_phantom(self, root: Path, seed: int) -> None:
        """Write 400 fundus phantoms (15 % Asian, 20 % Black, 65 % White) with an official split of 300 to 100."""
        races = allocate(PHANTOM_COUNT, {0: 0.15, 1: 0.20, 2: 0.65})
        for i, race in enumerate(races):
            rng = np.random.default_rng([seed, i])
            image, mask = slo_fundus(rng, PHANTOM_SIZE, PHANTOM_LOOKS[race])
            scalars = {
                "race": race,
                "gender": int(rng.random() < 0.42),
                "ethnicity": int(rng.choice([0, 1, -1], p=[0.9, 0.06, 0.04])),
                "language": int(rng.choice([0, 1, 2, -1], p=[0.9, 0.03, 0.03, 0.04])),
                "maritalstatus": int(rng.integers(-1, 5)),
                "age": float(rng.normal(60, 14) * 365.25),
            }
            _save(root / f"data_{i + 1:05d}.npz", slo_fundus=image, disc_cup_mask=_signed(mask), **scalars)
        names = [f"data_{i + 1:05d}.npz" for i in range(PHANTOM_COUNT)]
        first_test = PHANTOM_COUNT * 3 // 4
        (root / "train.txt").write_text("\n".join(names[:first_test]) + "\n")
        (root / "test.txt").write_text("\n".join(names[first_test:]) + "\n")

    def _official_split(self, root: Path) -> dict[str, str]:
        split = {}
        for name in ("train", "test"):
            listing = root / f"{name}.txt"
            if listing.is_file():
                for line in listing.read_text().split():
                    split[self.case_key(Path(line).stem)] = name
        return split


class FairSegDataModule(SegmentationDataModule):
    """Harvard-FairSeg for segmentation: 512-pixel centre crop, official or patient split.

    Args:
        root: folder with the ``.npz`` files; None writes and uses a phantom.
        attributes: attributes to report and to route by; the first is the one that ``balance`` balances.
        image_size: side, or height and width, that the network sees, pixels; None keeps the crop as it is.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        age_bins: ages (years) at which a new age group begins.
        race_codes: codes of the race field; ``auto`` decides once for the whole folder.
        crop: side of the centre crop that is taken first, pixels; None takes none.
        **kwargs: arguments of :class:`SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        attributes: Sequence[str] = ("race",),
        image_size: int | tuple[int, int] | None = 224,
        batch_size: int = 42,
        num_workers: int = 0,
        age_bins: Sequence[float] = (60,),
        race_codes: Literal["auto", "public", "fairdiff"] = "auto",
        crop: int | None = 512,
        **kwargs: Any,
    ) -> None:
        dataset = FairSeg(age_bins, race_codes)
        super().__init__(dataset, root, attributes, image_size, batch_size, num_workers, crop=crop, **kwargs)


def _signed(mask: NDArray[np.uint8]) -> NDArray[np.int8]:
    return -mask.astype(np.int8)


def _unsigned(mask: NDArray[Any], where: str) -> NDArray[np.uint8]:
    found = np.unique(mask)
    if not np.isin(found, (0, -1, -2)).all():
        raise InvalidSampleError(
            where,
            f"mask values {found[:8].tolist()} ({mask.dtype})",
            "0 background, -1 rim and -2 cup in a signed type",
        )
    return (-mask).astype(np.uint8)


def _save(path: Path, **arrays: Any) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


@contextmanager
def _open(file: str | Path) -> Iterator[Any]:
    """Open an archive; what goes wrong while its arrays are read names the file."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise InvalidSampleError(file, f"unreadable ({error})", "a whole .npz file; fetch or write it again") from error
    except InvalidSampleError:
        raise
    except ValueError as error:  # numpy refuses object arrays
        raise InvalidSampleError(file, f"{error}", "plain numeric arrays; save them again without pickling") from error


def _first(archive: Any, keys: Sequence[str], file: str) -> str:
    for key in keys:
        if key in archive.files:
            return key
    raise InvalidSampleError(file, f"keys {sorted(archive.files)}", f"one of {', '.join(keys)}")


def _cached_scalars(files: Sequence[Path]) -> tuple[dict[Path, dict[str, Any]], list[InvalidSampleError]]:
    """Attributes of every file that can be read, and the errors of the others; kept only when there are none."""
    cached = cache_root() / "index" / f"fairseg-{fingerprint(files, SCALAR_KEYS)}.json"
    if cached.is_file():
        return dict(zip(files, json.loads(cached.read_text()), strict=True)), []
    rows, errors = {}, []
    for file in files:
        try:
            rows[file] = _scalars(file)
        except InvalidSampleError as error:
            errors.append(error)
    if not errors:
        with suppress(OSError), atomic_path(cached) as temporary:  # a full disk: it is read again next time
            temporary.write_text(json.dumps(list(rows.values())))
    return rows, errors


def _scalars(file: Path) -> dict[str, Any]:
    row: dict[str, Any] = {}
    with _open(file) as archive:
        values = {key: archive[key] for key in SCALAR_KEYS if key in archive.files}
    for key, value in values.items():
        if value.size != 1:
            raise InvalidSampleError(f"{file}[{key}]", f"an array of shape {value.shape}", "one value")
        scalar = value.item()
        if isinstance(scalar, str) != (key in TEXT_KEYS):
            raise InvalidSampleError(f"{file}[{key}]", f"{scalar!r}", "text" if key in TEXT_KEYS else "a number")
        row[key] = None if isinstance(scalar, float) and np.isnan(scalar) else scalar
    return row


def _years(age: float | None, in_days: bool) -> float:
    return float("nan") if age is None or age < 0 else age / (365.25 if in_days else 1)


def _race_decoder(codes: Sequence[Any], race_codes: str, root: Path) -> dict[Any, int]:
    found = {int(code) for code in codes if code is not None and code != -1}
    fitting = {name: codes for name, codes in RACE_CODES.items() if found <= codes.keys()}
    if race_codes != "auto":
        fitting = {name: codes for name, codes in fitting.items() if name == race_codes}
    if not found:
        return {}
    if len(fitting) != 1:
        raise InvalidSampleError(
            f"{root}[race]",
            f"race codes {sorted(found)} " + ("fit both code sets" if fitting else "fit no code set"),
            "0 Asian, 1 Black, 2 White (race_codes='public') or 2 Asian, 3 Black, 7 White (race_codes='fairdiff')"
            " in the whole folder; name the code set where it cannot be told",
        )
    return dict(next(iter(fitting.values())))


def _group(row: Mapping[str, Any], name: str, num_groups: int, beyond: Counter[str]) -> int:
    value = row.get(name, row.get("hispanic") if name == "ethnicity" else None)
    if value is not None and value >= num_groups:
        beyond[f"values of '{name}' beyond its codes 0 to {num_groups - 1}, taken as unknown"] += 1
    return int(value) if value is not None and 0 <= value < num_groups else -1


def _summary(root: Path) -> str:
    if not root.is_dir():
        return "no such folder"
    return ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "an empty folder"
