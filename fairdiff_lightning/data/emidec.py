"""Emidec: late-enhancement cardiac MRI with infarcts and no-reflow, whole volumes or exported slices."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import Index, Record, visible_files
from fairdiff_lightning.data.nifti import nifti_grid
from fairdiff_lightning.data.phantoms_3d import left_ventricle
from fairdiff_lightning.data.pictures import opened
from fairdiff_lightning.data.sample import UNKNOWN, AttributeSpec
from fairdiff_lightning.data.volume_dataset import VolumeDataset, check_id, group_index
from fairdiff_lightning.data.volume_module import VolumeDataModule
from fairdiff_lightning.data.volumes import (
    NIFTI,
    Volume,
    Window,
    check_mask,
    read_nifti,
    read_notes,
    write_nifti,
)

TEST_CASES = ("P005", "P008", "P039", "P057", "P061", "P071", "P072", "P077", "P078", "P082")
"""Of LeFusion's test set, fixed."""
CASE = re.compile(r"Case_([PN]\d+)")
SLICE = re.compile(r"(?P<case>.+)_slice(?P<number>\d+)")
PATHOLOGICAL, NORMAL = "Pathological", "Normal"
IMAGES, LABELS = f"{PATHOLOGICAL}/images", f"{PATHOLOGICAL}/labels"
PHANTOM_SIZE = (80, 76, 10)
PHANTOM_CASES, PHANTOM_NORMAL, PHANTOM_SPACING = 20, 6, (1.5, 1.5, 10.0)

Files = dict[str, str]


class Emidec(VolumeDataset):
    """Emidec late-enhancement MRI of the left ventricle (Lalande et al. 2020; CC BY-NC-SA 4.0).

    Layouts: LeFusion's, ``Pathological/{images,labels}/Case_P*.nii.gz`` and ``Normal/images/Case_N*.nii.gz``, of which
    the normal ones have no labels and are :meth:`backgrounds`; the challenge's, ``Case_*/Images/Case_*.nii.gz`` and
    ``Case_*/Contours/Case_*.nii.gz``; or slices, ``train/Case_*_slice<k>.png`` and ``trainannot/...``, which have no
    place in the patient and get 1 mm voxels. Samples are written in the first.

    MRI has no unit: the image is scaled so that the whole volume, before any crop, is [0, 1]; a written file notes its
    window, so that a crop is not stretched. The axes are the files', slices last: a short axis is no body axis.

    Args:
        ignore_mask_affine: take the image's affine for its mask too; the shapes must agree all the same.
    """

    name: ClassVar[str] = "Emidec"
    classes: ClassVar[tuple[str, ...]] = ("background", "cavity", "myocardium", "infarct", "no-reflow")
    window: ClassVar[Window] = Window(0, 1)
    lesions: ClassVar[tuple[int, ...]] = (3, 4)
    mask_folder: ClassVar[str | None] = Path(LABELS).name
    flip_axes: ClassVar[tuple[int, ...]] = (1,)
    expected_tree: ClassVar[str] = (
        f"  {IMAGES}/Case_P*.nii.gz, {LABELS}/Case_P*.nii.gz, {NORMAL}/images/Case_N*.nii.gz   (LeFusion), or\n"
        "  Case_*/Images/Case_*.nii.gz, Case_*/Contours/Case_*.nii.gz   (challenge), or\n"
        "  train/Case_*_slice<k>.png, trainannot/Case_*_slice<k>.png   (slices)"
    )
    source: ClassVar[str] = "Emidec is at emidec.com (CC BY-NC-SA 4.0), on registration."

    def __init__(self, ignore_mask_affine: bool = False) -> None:
        self.ignore_mask_affine = ignore_mask_affine

    @property
    def attributes(self) -> dict[str, AttributeSpec]:
        """Whether the case is pathological, by the letter of its name."""
        return {"pathology": AttributeSpec("pathology", ("normal", "pathological"))}

    def index(self, root: Path) -> Index:
        """List the cases with a mask; the published test set is kept where a case of it is there."""
        images, masks = _layout(root)
        if not images:
            raise self.not_found(root, "no image" if root.is_dir() else "no such folder")
        records, errors, left_out = [], [], Counter[str]()
        for case, files in images.items():
            if case in masks and _numbers(files) != _numbers(masks[case]):
                odd = sorted(_numbers(files) ^ _numbers(masks[case]))
                errors.append(InvalidSampleError(case, f"slices {odd} of image or labels alone", "both of each slice"))
            elif case in masks:
                records.append(self._record(case, files, masks[case]))
            elif _letter(case) == "N":
                left_out["normal cases without labels"] += 1
            else:
                errors.append(InvalidSampleError(next(iter(files.values())), "no labels", f"those of {case}"))
        errors += [
            InvalidSampleError(next(iter(files.values())), "labels without an image", f"the image of {case}")
            for case, files in masks.items()
            if case not in images
        ]
        if not any(record.split == "test" for record in records):
            records = [_without_split(record) for record in records]
        return Index(records, dict(left_out), errors)

    def backgrounds(self, root: Path) -> list[Record]:
        """List the normal cases, with or without a mask."""
        images, masks = _layout(root)
        normal = [case for case in images if _letter(case) == "N"]
        return [_without_split(self._record(case, images[case], masks.get(case, {}))) for case in normal]

    def read_image(self, record: Record) -> Volume:
        """Read the image, float32 in [0, 1]."""
        volume, where = _read(record, "image")
        noted = read_notes(where).get("window") if "image" in record.files else None
        low, high = noted or (float(volume.array.min()), float(volume.array.max()))
        if not (np.isfinite([low, high]).all() and high > low):
            raise InvalidSampleError(where, f"values from {low:g} to {high:g}", "finite values that differ")
        return Volume(Window(low, high).to_unit(volume.array), volume.affine)

    def read_labels(self, record: Record) -> Volume:
        """Read the mask of the five classes."""
        if "mask" in record.files:
            return check_mask(self.read_mask_file(record, None), len(self.classes), record.files["mask"])
        volume, where = _read(record, "mask")
        return check_mask(volume, len(self.classes), where)

    def read_grid(self, record: Record) -> Volume:
        """The grid of the image; of a NIfTI file the header alone is read."""
        return nifti_grid(record.files["image"], None) if "image" in record.files else self.read_image(record)

    def write_volumes(self, directory: Path, sample_id: str, image: Volume, mask: Volume, **notes: Any) -> Path:
        """Store an image in [0, 1] (float32) and its mask below ``Pathological``.

        An id without ``Case_P`` gets a file name with it, by which others find it.
        """
        self.write_mask(directory, sample_id, mask.array, mask.affine)
        stored = Volume(image.array.astype(np.float32), image.affine)  # not in the type of a scan that it is cut from
        path = directory / IMAGES / f"{_stem(sample_id)}.nii.gz"
        return write_nifti(path, stored, {"id": sample_id, "window": [0.0, 1.0], **notes})

    def write_mask(
        self, directory: Path, sample_id: str, mask: NDArray[np.uint8], affine: NDArray[np.float64] | None = None
    ) -> Path:
        """Store a mask (H, W, D) as ``Pathological/labels/Case_P*.nii.gz``."""
        volume = Volume(mask.astype(np.uint8), np.eye(4) if affine is None else affine)
        return write_nifti(directory / LABELS / f"{_stem(sample_id)}.nii.gz", volume)

    def write_phantom(self, root: Path, seed: int) -> None:
        """Write 20 infarcted hearts, 5 of them of the test set, and 6 normal ones with the contours of their walls."""
        affine = np.diag([*PHANTOM_SPACING, 1.0])
        train = [name for k in range(1, 100) if (name := f"P{k:03d}") not in TEST_CASES]
        names = [*TEST_CASES[:5], *train[: PHANTOM_CASES - 5]]
        for i, name in enumerate(names):
            heart = left_ventricle(np.random.default_rng([seed, i]), PHANTOM_SIZE)
            self.write_volumes(root, f"Case_{name}", Volume(heart.image, affine), Volume(heart.mask, affine))
        for i in range(PHANTOM_NORMAL):
            heart = left_ventricle(np.random.default_rng([seed, PHANTOM_CASES + i]), PHANTOM_SIZE, infarct=False)
            for folder, array in (("images", heart.image), ("labels", heart.mask)):
                write_nifti(root / NORMAL / folder / f"Case_N{i + 1:03d}.nii.gz", Volume(array, affine))

    def _record(self, case: str, image: Files, mask: Files) -> Record:
        notes = read_notes(image["image"]) if "image" in image else {}
        synthetic = bool(notes.get("synthetic", False))
        found = CASE.search(case)
        letter = {"P": 1, "N": 0}.get(_letter(case) or "", UNKNOWN)
        noted = group_index(self.attributes["pathology"], notes.get("pathology"))
        record_id = check_id(str(notes.get("id", case)), next(iter(image.values())))
        return Record(
            id=record_id,
            files=image | mask,
            attributes={"pathology": letter if noted == UNKNOWN else noted},
            unit=record_id,
            split=None if synthetic else "test" if found and found[1] in TEST_CASES else "train",
            synthetic=synthetic,
            source=notes.get("source"),
        )


class EmidecDataModule(VolumeDataModule):
    """Emidec hearts, for generators of infarcts and for segmentation; LeFusion's test cases where they are there.

    Args:
        root: folder in one of the layouts; None writes and uses a phantom.
        attributes: attributes to report and to route by; the first is the one that ``balance`` balances.
        image_size: height, width and depth of a volume, voxels, cropped or padded about its centre.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        ignore_mask_affine: take the image's affine for its mask too.
        **kwargs: arguments of :class:`~fairdiff_lightning.data.volume_module.VolumeDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        attributes: Sequence[str] = (),
        image_size: tuple[int, int, int] | None = (72, 72, 10),
        batch_size: int = 20,
        num_workers: int = 0,
        ignore_mask_affine: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(Emidec(ignore_mask_affine), root, attributes, image_size, batch_size, num_workers, **kwargs)


def _layout(root: Path) -> tuple[dict[str, Files], dict[str, Files]]:
    """Case -> files of its image, and of its mask, in whichever of the layouts is there."""
    places = (("*/images/*", "*/labels/*"), ("*/Images/*", "*/Contours/*"))
    for images, masks in places:
        if found := _whole(root, images, "image"):
            return found, _whole(root, masks, "mask")
    return _sliced(root, "train", "image"), _sliced(root, "trainannot", "mask")


def _whole(root: Path, pattern: str, role: str) -> dict[str, Files]:
    return {p.name.split(".nii")[0]: {role: str(p)} for p in visible_files(root, pattern) if p.name.endswith(NIFTI)}


def _sliced(root: Path, folder: str, role: str) -> dict[str, Files]:
    cases: dict[str, Files] = defaultdict(dict)
    for path in visible_files(root, f"{folder}/*.png"):
        if match := SLICE.fullmatch(path.stem):
            cases[match["case"]][f"{role}/{match['number']}"] = str(path)
    return dict(cases)


def _read(record: Record, role: str) -> tuple[Volume, str]:
    """The volume of a role, and the file to name."""
    if role in record.files:
        file = record.files[role]
        return read_nifti(file, axes=None), file
    slices = {int(key.split("/")[1]): file for key, file in record.files.items() if key.startswith(f"{role}/")}
    first = _first(record, role)
    if sorted(slices) != list(range(min(slices), min(slices) + len(slices))):
        raise InvalidSampleError(first, f"slices {sorted(slices)} of {record.id}", "slices without a gap")
    pixels = [_decode(slices[number]) for number in sorted(slices)]
    if len({p.shape for p in pixels}) > 1:
        raise InvalidSampleError(first, f"slices of {sorted({p.shape for p in pixels})}", "slices of one size")
    return Volume(np.stack(pixels, -1), np.eye(4)), first


def _numbers(files: Files) -> set[str]:
    """Numbers of the slices; none for a whole volume."""
    return {key.split("/")[1] for key in files if "/" in key}


def _first(record: Record, role: str) -> str:
    files: Mapping[str, str] = record.files
    return next((file for key, file in sorted(files.items()) if key.split("/")[0] == role), f"{role} of {record.id}")


def _decode(file: str) -> NDArray[np.uint8]:
    with opened(file, file) as image:
        if image.mode not in ("L", "P", "1"):
            raise InvalidSampleError(file, f"pixels of mode {image.mode}", "grey ones of 8 bits")
        return np.array(image)


def _letter(case: str) -> str | None:
    match = CASE.search(case)
    return match[1][0] if match else None


def _stem(sample_id: str) -> str:
    check_id(sample_id, "a sample to write")
    return sample_id if sample_id.startswith("Case_P") else f"Case_P-{sample_id}"


def _without_split(record: Record) -> Record:
    return replace(record, split=None)
