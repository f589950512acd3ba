"""Cases of a folder without a table: pairs of files, told by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fairdiff_lightning.data.dicom_masks import SUFFIXES, is_dicom
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import visible_files
from fairdiff_lightning.data.volumes import NIFTI

IMAGES, MASKS = "images", "masks"


@dataclass
class Cases:
    """Where each case stands and its row, as a table has it; what is left out, counted by reason; what is no case."""

    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    errors: list[InvalidSampleError] = field(default_factory=list)


def find_pairs(root: Path) -> Cases:
    """Pair the files and folders of ``images`` and ``masks`` by name; a mask without an image is an error."""
    images, masks = _files(root / IMAGES), _files(root / MASKS)
    cases = Cases()
    for name in dict.fromkeys([*images, *masks] if images else ()):
        try:
            row = _pair(name, images.get(name, []), masks.get(name, []))
            cases.rows[row["image"]] = row
        except InvalidSampleError as error:
            cases.errors.append(error)
    return cases


def describe(cases: Cases, said: Mapping[str, Mapping[str, str]]) -> Cases:
    """Add to each case what the row of its id, or of its folder, says; a row of no case is an error.

    Args:
        cases: that were found.
        said: where each row stands -> the row, with ``id``.
    """
    by_id = {row["id"]: row for row in said.values()}
    rows, used = {}, set()
    for where, row in cases.rows.items():
        name = row["id"] if row["id"] in by_id else row.get("folder", "")
        rows[where] = row | {key: value for key, value in by_id.get(name, {}).items() if value and key != "id"}
        used.add(name)
    errors = [
        InvalidSampleError(
            where, f"the id {row['id']!r} of no case", f"one of {', '.join(sorted(used - {''})[:5])}, ..."
        )
        for where, row in said.items()
        if row["id"] not in used
    ]
    return Cases(rows, cases.left_out, [*cases.errors, *errors])


def _files(folder: Path) -> dict[str, list[Path]]:
    """Id -> NIfTI files, DICOM files and folders of its name, in order."""
    found: dict[str, list[Path]] = {}
    for path in visible_files(folder, "*"):
        if path.is_dir():
            found.setdefault(path.name, []).append(path)
        elif path.name.endswith(NIFTI):
            found.setdefault(path.name.split(".nii")[0], []).append(path)
        elif is_dicom(path):
            found.setdefault(path.stem if path.suffix.lower() in SUFFIXES else path.name, []).append(path)
    return found


def _pair(name: str, images: Sequence[Path], masks: Sequence[Path]) -> dict[str, str]:
    for files in (images, masks):
        if len(files) > 1:
            raise InvalidSampleError(files[0], f"'{files[1].name}' beside it", "one image and one mask of each id")
    if not images:
        raise InvalidSampleError(masks[0], f"no {IMAGES} of its name", "both")
    return {"id": name, "image": str(images[0].absolute()), "mask": str(masks[0].absolute()) if masks else ""}
