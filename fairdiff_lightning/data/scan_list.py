"""Whole scans in a folder: whose they are, and where the masks of their organs lie."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import pydicom
from lightning.pytorch.utilities import rank_zero_info
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from fairdiff_lightning.data.dicom_masks import is_dicom
from fairdiff_lightning.data.dicom_series import NO_SLICES
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import Record, visible_files
from fairdiff_lightning.data.volumes import NIFTI

SCAN, ORGAN = "scan", "organ"
"""Roles of the files of a whole scan and of the mask of its organ."""
TAGS = ("SOPClassUID", "Modality", "PatientID", "Rows")
LUNGS, ORGANS = ("CT", ""), ("CT", "MR", "")
"""Modalities of scans in which lungs are found, and of those with a mask of an organ; a header may lack it."""
AS_NIFTI = "masks of organs are NIfTI files; convert those of DICOM (data.dicom_masks.read_dicom_mask, write_volume)"
PATIENT = re.compile(r"LIDC-IDRI-\d{4}")
"""A patient of LIDC-IDRI, as the names of folders and files tell him."""
NOBODY = re.compile(
    r"(?:[\W_0]|anon(?:ym(?:ous|i[sz]ed?))?|unknown|removed|de-?identified|none|patient|subject|id)*", re.IGNORECASE
)
"""A PatientID that tells nobody: empty or zeros, or a word as ANONYMOUS without a number."""


def list_scans(path: Path, organs: str | None = None) -> list[Record]:
    """The scans below a folder: NIfTI files, and folders that hold a DICOM series; or the one scan that ``path`` is.

    Series of other modalities than CT, and with ``organs`` MR, are left out and counted in one line of the log.

    The patient (``unit``) is the PatientID of a series, and else the last ``LIDC-IDRI-<number>`` that the whole path
    names. The id is the path below ``path``, with a patient of LIDC in front where it alone does not tell him.

    Args:
        path: of the folder or scan.
        organs: folder of masks, or pattern of their paths, see
            :class:`~fairdiff_lightning.data.requests.GenerationPlan`; these are no scans.

    Raises:
        InvalidSampleError: when there is none, two would have one id, or a scan has no mask.
        ValueError: for a pattern of other names, or of other files than NIfTI.
    """
    found = _scan_paths(path, LUNGS if organs is None else ORGANS)
    patients = {scan: _patient(scan, told) for scan, told in found.items()}
    names = {scan: _name(scan, path, patients[scan]) for scan in found}
    masks = {} if organs is None else _organ_masks(names, organs)
    taken = {mask.resolve() for mask in masks.values()} | _masks_below(organs)
    kept = [scan for scan in found if scan.resolve() not in taken]
    if not kept:
        expected = f"files that end in {' or '.join(NIFTI)}, or folders of a DICOM series of CT (with `organs` or MR)"
        raise InvalidSampleError(path, "no scan", expected)
    _refuse_one_name(kept, names)
    if organs is not None:
        _refuse_without(kept, names, masks, organs)
    return [
        Record(
            names[scan],
            {SCAN: str(scan)} | ({ORGAN: str(masks[scan])} if scan in masks else {}),
            {},
            patients[scan] or names[scan],
        )
        for scan in kept
    ]


def named_cases(scans: Iterable[Record], cases: Collection[str]) -> list[str | None]:
    """The case that each scan is of, by its patient or by a whole word of its path; None where neither tells.

    Of several the longest is meant, and of these the last. A case that is a mere number is looked for below the given
    folder alone.

    Args:
        scans: from :func:`list_scans`.
        cases: keys of the cases, see :meth:`~fairdiff_lightning.data.native.NativeDataset.case_key`.
    """
    spelled = {case.casefold(): case for case in cases if case}
    words = _words(spelled)
    distinct = _words(name for name in spelled if re.search("[a-z]", name))

    def case_of(scan: Record) -> str | None:
        path = Path(scan.files[SCAN])
        places = ((words, scan.unit), (words, scan.id), (distinct, path.resolve()), (distinct, path.absolute()))
        for pattern, text in places:
            found = pattern.findall(str(text).casefold())
            if found:
                return spelled[max(reversed(found), key=len)]
        return None

    return [case_of(scan) for scan in scans]


def _scan_paths(path: Path, modalities: Collection[str]) -> dict[Path, str]:
    """Scan -> the PatientID that its headers tell, empty where they tell nobody."""
    if path.is_file():
        return {path: ""}
    folders: dict[Path, list[Path]] = defaultdict(list)
    for file in visible_files(path, "**/*"):
        if file.is_file():
            folders[file.parent].append(file)
    nifti = sorted(file for held in folders.values() for file in held if file.name.endswith(NIFTI))
    series = [folder for folder, held in sorted(folders.items()) if any(map(_is_slice, held))]
    headers = {folder: _first_header(filter(_is_slice, folders[folder])) for folder in series}
    taken = {folder: patient_id(header) for folder, header in headers.items() if _modality(header) in modalities}
    if len(taken) < len(series):
        others = Counter(_modality(header) for folder, header in headers.items() if folder not in taken)
        kinds = " or ".join(filter(None, modalities))
        rank_zero_info(
            f"{len(series) - len(taken)} DICOM series under '{path}' are no {kinds} and are left out: {dict(others)}."
        )
    return dict.fromkeys(nifti, "") | taken


def _organ_masks(names: Mapping[Path, str], organs: str) -> dict[Path, Path]:
    """Scan -> the mask of its organ, of those that have one."""
    if "{" in organs and not organs.endswith(NIFTI):
        raise ValueError(
            f"generate: organs={organs!r}; {AS_NIFTI}, and a pattern of them ends in {' or '.join(NIFTI)}."
        )
    if "{" not in organs:
        folder = Path(organs)
        masks = {_name(p, folder, _patient(p)): p for p in visible_files(folder, "**/*") if p.name.endswith(NIFTI)}
        return {scan: masks[name] for scan, name in names.items() if name in masks}
    try:
        paths = {
            scan: Path(organs.format(folder=scan.parent, name=_without_suffix(scan), id=name))
            for scan, name in names.items()
        }
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"generate: organs={organs!r} ({error}); a pattern has {{folder}}, {{name}} and {{id}} of the scan."
        ) from error
    return {scan: mask for scan, mask in paths.items() if mask.is_file()}


def _masks_below(organs: str | None) -> set[Path]:
    """The files of a folder of masks, which may lie among the scans."""
    return set() if organs is None or "{" in organs else {p.resolve() for p in visible_files(Path(organs), "**/*")}


def _refuse_one_name(scans: Iterable[Path], names: Mapping[Path, str]) -> None:
    seen: dict[str, Path] = {}
    for scan in scans:
        if names[scan] in seen:
            found = f"the id '{names[scan]}', as of '{seen[names[scan]]}'"
            raise InvalidSampleError(scan, found, "another name for one of the two")
        seen[names[scan]] = scan


def _refuse_without(scans: Iterable[Path], names: Mapping[Path, str], masks: Mapping[Path, Path], organs: str) -> None:
    for scan in scans:
        if scan not in masks:
            place = organs if "{" in organs else f"{organs}/{names[scan]}.nii.gz"
            raise InvalidSampleError(scan, "no mask of its organ", f"one at '{place}', as `organs` says; {AS_NIFTI}")


def _words(names: Iterable[str]) -> re.Pattern[str]:
    """Matches each name where no letter or digit goes on, the longest first; nothing where there is none."""
    listed = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)"
    return re.compile(rf"(?<![^\W_])(?:{listed})(?![^\W_])")


def _is_slice(path: Path) -> bool:
    """Whether a file may be of a series; a DICOMDIR is the table of contents of a disc."""
    return path.name != "DICOMDIR" and is_dicom(path)


def _without_suffix(path: Path) -> str:
    return path.name.split(".nii")[0]


def _name(path: Path, root: Path, patient: str | None) -> str:
    """The id of a scan; the first patient in it is the one that the scan is of."""
    name = (path.relative_to(root).as_posix() if path != root else path.resolve().name).split(".nii")[0]
    name = name.replace("/", "-")
    known = patient is not None and PATIENT.fullmatch(patient)
    return f"{patient}-{name}" if known and PATIENT.findall(name)[:1] != [patient] else name


def _patient(path: Path, told: str = "") -> str | None:
    """Whose scan it is: as the series says, or the path, of which links are followed where they tell a patient."""
    named = PATIENT.findall(str(path.resolve())) or PATIENT.findall(str(path.absolute()))
    return told or (named[-1] if named else None)


def _first_header(files: Iterable[Path]) -> Dataset:
    """That of the first slice, or else of the first file that can be read; empty where none can."""
    first = Dataset()
    for file in files:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
        except (OSError, EOFError, ValueError, InvalidDicomError):
            continue  # said when the series is read
        if "Rows" in header and header.get("SOPClassUID") not in NO_SLICES:
            return header
        first = first or header
    return first


def _modality(header: Dataset) -> str:
    return str(header.get("Modality") or "").strip()


def patient_id(header: Dataset) -> str:
    """The PatientID; empty where it tells nobody."""
    told = str(header.get("PatientID") or "").strip()
    return "" if NOBODY.fullmatch(told) else told
