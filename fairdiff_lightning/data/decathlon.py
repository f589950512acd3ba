"""Medical Segmentation Decathlon: any of its tasks, CT or MRI, of one channel or several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fairdiff_lightning.data.case_table import check_groups, check_ids
from fairdiff_lightning.data.dbt import read_table
from fairdiff_lightning.data.decathlon_task import IMAGES, LABELS, TASK, Task, add_case, list_cases, read_task
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import Index, Record
from fairdiff_lightning.data.nifti import check_finite, labels_on, read_nifti_channels
from fairdiff_lightning.data.phantoms_pelvis import Tissue, grid_affine, mr, pelvis
from fairdiff_lightning.data.sample import AttributeSpec, Sample
from fairdiff_lightning.data.volume_dataset import VolumeDataset, check_id, group_index, on_grid
from fairdiff_lightning.data.volume_module import VolumeDataModule
from fairdiff_lightning.data.volumes import Array, Volume, Window, check_mask, read_notes, write_nifti

TABLE, CT = "attributes.csv", "CT"
SOFT_TISSUE, WINDOWS = Window(-200, 250), {"Lung": Window(-1000, 400)}
"""HU that are [0, 1]: of most CT tasks, and of those that are no soft tissue, by name."""
PERCENTILES = (0.5, 99.5)
"""Of a volume of MRI, that are 0 and 1."""
PHANTOM_SIZE, PHANTOM_SPACING, PHANTOM_CASES = (36, 32, 20), (2.0, 2.0, 3.6), 12
PHANTOM_TASK = Task("Phantom", ("T2", "ADC"), ("background", "PZ", "TZ"))


class Decathlon(VolumeDataset):
    """One task of the Medical Segmentation Decathlon (Antonelli et al. 2022; CC BY-SA 4.0).

    Layout: ``dataset.json`` with ``modality`` (channels) and ``labels`` (classes) by number and the pairs under
    ``training``; images are (H, W, D), or (H, W, D, C) for several modalities. Its ``test`` images have no labels and
    are for prediction alone; files that it names and that are not there are left out. ``attributes.csv`` is optional:
    ``id`` (name of the image without ``.nii.gz``) and the columns that are attributes, by the names of their groups,
    empty where unknown.

    CT is windowed in HU. MRI has no unit: each channel is scaled so that its 0.5 and 99.5 percentiles are [0, 1]; a
    written file notes its window, so that a crop is not stretched.

    Args:
        root: folder of the task, whose ``dataset.json`` says what the channels and classes are; None is the phantom.
        channel: number of the one modality to read; None reads all of them as channels.
        window: HU that are [0, 1] in a sample of CT; None takes -200 to 250, and -1000 to 400 for the lung task.
        columns: columns of ``attributes.csv`` that are attributes -> names of their groups.
        ignore_mask_affine: take the image's affine for its mask too; the shapes must agree all the same.

    Raises:
        DatasetNotFoundError: for a root without ``dataset.json``.
        InvalidSampleError: for a ``dataset.json`` of another form.
        ValueError: for a channel that the task does not have, CT beside other modalities, or a window without CT.
    """

    name: ClassVar[str] = "Decathlon"
    mask_folder: ClassVar[str | None] = LABELS
    expected_tree: ClassVar[str] = (
        f"  {TASK}                   modality, labels, training: [{{image, label}}, ...]\n"
        f"  {IMAGES}/<case>.nii.gz         (H, W, D), or (H, W, D, C) for several modalities\n"
        f"  {LABELS}/<case>.nii.gz         classes by number\n"
        f"  {TABLE}                 (optional) id, attributes"
    )
    source: ClassVar[str] = "The ten tasks are at medicaldecathlon.com (CC BY-SA 4.0)."

    def __init__(
        self,
        root: str | Path | None = None,
        channel: int | None = None,
        window: tuple[float, float] | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
        ignore_mask_affine: bool = False,
    ) -> None:
        task = PHANTOM_TASK if root is None else self._task(Path(root))
        self.task_name, self.columns = task.name, {name: tuple(groups) for name, groups in (columns or {}).items()}
        self.file_modalities, self.picked = task.modalities, _picked(task, channel)
        self.modalities = tuple(task.modalities[k] for k in self.picked)
        self.classes = task.labels  # type: ignore[misc] # of the task, not of the reader's class
        self.channels = len(self.modalities)  # type: ignore[misc]
        self.window = _window(task, self.modalities, window)  # type: ignore[misc]
        self.ignore_mask_affine = ignore_mask_affine

    @property
    def attributes(self) -> dict[str, AttributeSpec]:
        """What ``columns`` names."""
        return {name: AttributeSpec(name, groups) for name, groups in self.columns.items()}

    def index(self, root: Path) -> Index:
        """List the training pairs that are there, in the order of ``dataset.json``.

        Raises:
            DatasetNotFoundError: when none of them is there.
            InvalidSampleError: for a task of other classes, or a table that cannot be read.
        """
        task = self._task(root)
        if task.labels != self.classes:
            raise InvalidSampleError(root / TASK, f"the labels {task.labels}", f"those of the task, {self.classes}")
        groups = self._read_table(root / TABLE) if (root / TABLE).is_file() else {}
        records, errors, left_out = [], [], Counter[str]()
        for image, label in task.training:
            absent = [role for role, file in (("image", image), ("label", label)) if not (root / file).is_file()]
            if absent:
                left_out[f"cases of {TASK} whose {absent[0]} is absent"] += 1
                continue
            try:
                records.append(self._record(root / image, root / label, groups))
            except InvalidSampleError as error:
                errors.append(error)
        if not records and not errors:
            raise self.not_found(root, f"none of the {len(task.training)} cases that {TASK} names, {dict(left_out)}")
        if task.test:
            left_out["images of the test list, which have no labels"] = len(task.test)
        if without := len(groups.keys() - {record.id for record in records}):
            left_out[f"rows of {TABLE} without a case"] = without
        return Index(records, dict(left_out), errors)

    def unlabelled(self, root: Path) -> Index:
        """List the images of the test list that are there, in the order of ``dataset.json``."""
        groups = self._read_table(root / TABLE) if (root / TABLE).is_file() else {}
        records, errors, absent = [], [], 0
        for image in self._task(root).test:
            if not (root / image).is_file():
                absent += 1
                continue
            try:
                records.append(self._record(root / image, None, groups))
            except InvalidSampleError as error:
                errors.append(error)
        return Index(records, {f"images of the test list of {TASK} that are absent": absent} if absent else {}, errors)

    def read_channels(self, record: Record) -> tuple[Volume, ...]:
        """Read every channel (H, W, D), in the unit of ``window``, float32 in RAS order."""
        file = record.files["image"]
        notes, found = read_notes(file), read_nifti_channels(file)
        names = tuple(notes.get("modalities", self.file_modalities))
        if len(found) != len(names) or names not in (self.file_modalities, self.modalities):
            expected = f"those of {TASK}, {', '.join(self.file_modalities)}"
            raise InvalidSampleError(file, f"{len(found)} volumes" + (f" of {names}" if notes else ""), expected)
        channels = found if names == self.modalities else [found[k] for k in self.picked]
        if self.modalities[0] == CT:
            return tuple(channel.with_array(check_finite(channel.array, file)) for channel in channels)
        noted = notes.get("window")
        return tuple(
            channel.with_array(_scaled(check_finite(channel.array, file), noted, file)) for channel in channels
        )

    def read_image(self, record: Record) -> Volume:
        """Read the image of one channel.

        Raises:
            ValueError: for several channels.
        """
        if self.channels > 1:
            raise ValueError(f"{self.modalities} are several volumes; choose one by `channel`, or use read_channels.")
        return self.read_channels(record)[0]

    def read_labels(self, record: Record) -> Volume:
        """Read the mask of the task's classes, in RAS order."""
        return check_mask(self.read_mask_file(record), len(self.classes), record.files["mask"])

    def read_aligned(self, record: Record) -> tuple[tuple[Volume, ...], Volume]:
        """Read all channels and the mask, on one grid."""
        channels, mask = self.read_channels(record), self.read_labels(record)
        return channels, on_grid(channels[0], mask, record.files["mask"])

    def write(self, directory: Path, sample: Sample) -> Path:
        """Store a sample, its channels as the volumes of one file; without ``affine`` at 1 mm from the origin.

        Raises:
            ValueError: for another number of channels than the task's.
        """
        image = sample["image"]
        if len(image) != self.channels:
            raise ValueError(f"{sample['id']}: {len(image)} channels; expected {self.channels}, {self.modalities}.")
        volumes = image[0] if self.channels == 1 else image.movedim(0, -1)
        return super().write(directory, {**sample, "image": volumes[None]})

    def write_volumes(self, directory: Path, sample_id: str, image: Volume, mask: Volume, **notes: Any) -> Path:
        """Store an image (H, W, D), or (H, W, D, C), and its mask, and name them in ``dataset.json``.

        CT is rounded to int16, MRI is float32 in [0, 1].
        """
        write_nifti(_place(directory, LABELS, sample_id), mask.with_array(mask.array.astype(np.uint8)))
        notes = {"id": sample_id, "modalities": self.modalities, **notes}
        if self.modalities[0] == CT:
            values: Array = np.round(image.array).astype(np.int16)
        else:
            values, notes = image.array.astype(np.float32), {"window": [0.0, 1.0], **notes}
        path = write_nifti(_place(directory, IMAGES, sample_id), Volume(values, image.affine), notes)
        add_case(directory, Task(self.task_name, self.modalities, self.classes), sample_id)
        return path

    def write_mask(
        self, directory: Path, sample_id: str, mask: NDArray[np.uint8], affine: NDArray[np.float64] | None = None
    ) -> Path:
        """Store a mask (H, W, D) as ``labelsTr/<id>.nii.gz``."""
        volume = Volume(mask.astype(np.uint8), np.eye(4) if affine is None else affine)
        return write_nifti(_place(directory, LABELS, sample_id), volume)

    def write_prediction(self, directory: Path, record: Record, mask: NDArray[np.uint8]) -> Path:
        """Store a predicted mask (H, W, D) as ``labelsTr/<id>.nii.gz``, voxel for voxel as the image's own file."""
        return write_nifti(_place(directory, LABELS, record.id), labels_on(self.read_channels(record)[0], mask))

    def write_phantom(self, root: Path, seed: int) -> None:
        """Write 12 prostates in MRI, T2-weighted and diffusion, with their two zones; what ``root=None`` reads."""
        affine = grid_affine(PHANTOM_SIZE, PHANTOM_SPACING)
        for number in range(PHANTOM_CASES):
            rng = np.random.default_rng([seed, number])
            tissue = pelvis(rng, PHANTOM_SIZE, affine).tissue
            zones = (tissue == Tissue.PERIPHERAL_ZONE) + 2 * (tissue == Tissue.TRANSITION_ZONE)
            name = f"phantom_{number:02d}"
            write_nifti(_place(root, LABELS, name), Volume(zones.astype(np.uint8), affine))
            write_nifti(_place(root, IMAGES, name), Volume(mr(rng, tissue), affine))
        list_cases(root, PHANTOM_TASK)

    def _task(self, root: Path) -> Task:
        if not (root / TASK).is_file():
            raise self.not_found(root, f"no {TASK}" if root.is_dir() else "no such folder")
        return read_task(root / TASK)

    def _record(self, image: Path, label: Path | None, groups: Mapping[str, Mapping[str, str]]) -> Record:
        notes = read_notes(image)
        name = check_id(str(notes.get("id", image.name.split(".nii")[0])), image)
        said = {**notes, **groups.get(name, {})}
        return Record(
            id=name,
            files={"image": str(image)} | ({} if label is None else {"mask": str(label)}),
            attributes={key: group_index(spec, said.get(key)) for key, spec in self.attributes.items()},
            unit=name,
            synthetic=bool(notes.get("synthetic", False)),
            source=notes.get("source"),
        )

    def _read_table(self, path: Path) -> dict[str, dict[str, str]]:
        """Case -> its groups, empty cells left out."""
        table = read_table(path, ("id", *self.columns))
        check_ids(table, path)
        for name, groups in self.columns.items():
            check_groups(table, name, groups, path)
        return {row["id"]: {k: row[k] for k in self.columns if row[k]} for row in table.to_dict("records")}


class DecathlonDataModule(VolumeDataModule):
    """A task of the Decathlon for segmentation: its channels and classes from ``dataset.json``, split by case.

    Args:
        root: folder of the task; None writes and uses a phantom.
        attributes: attributes to report and to route by, of ``columns``; the first is the one that is balanced.
        image_size: height, width and depth of a sample, voxels; None keeps each volume's own.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        channel: number of the one modality to read; None reads all of them as channels.
        window: HU that are [0, 1] in a sample of CT.
        columns: columns of ``attributes.csv`` that are attributes -> names of their groups.
        ignore_mask_affine: take the image's affine for its mask too.
        **kwargs: arguments of :class:`~fairdiff_lightning.data.volume_module.VolumeDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        attributes: Sequence[str] = (),
        image_size: tuple[int, int, int] | None = None,
        batch_size: int = 2,
        num_workers: int = 0,
        channel: int | None = None,
        window: tuple[float, float] | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
        ignore_mask_affine: bool = False,
        **kwargs: Any,
    ) -> None:
        dataset = Decathlon(root, channel, window, columns, ignore_mask_affine)
        super().__init__(dataset, root, attributes, image_size, batch_size, num_workers, **kwargs)


def _picked(task: Task, channel: int | None) -> tuple[int, ...]:
    """Numbers of the channels to read."""
    count = len(task.modalities)
    if channel is not None and not 0 <= channel < count:
        raise ValueError(f"channel={channel} of {task.name}; expected is one of 0 to {count - 1}, {task.modalities}.")
    picked = tuple(range(count)) if channel is None else (channel,)
    kinds = {task.modalities[k] == CT for k in picked}
    if len(kinds) > 1:
        raise ValueError(f"{task.name} has CT beside other modalities, {task.modalities}; choose one by `channel`.")
    return picked


def _window(task: Task, modalities: Sequence[str], window: tuple[float, float] | None) -> Window:
    if modalities[0] == CT:
        return Window(*window) if window else WINDOWS.get(task.name, SOFT_TISSUE)
    if window:
        raise ValueError(f"window={window} for {modalities}; only CT has one, MRI is scaled by percentiles.")
    return Window(0, 1)


def _scaled(values: Array, noted: Sequence[float] | None, where: str) -> Array:
    """A volume of MRI in [0, 1], by the window that its file notes, or by percentiles."""
    low, high = noted or np.percentile(values, PERCENTILES).tolist()
    if noted and not (np.isfinite([low, high]).all() and low < high):
        raise InvalidSampleError(
            where, f"the window ({low:g}, {high:g}) in its notes", "two finite ends, the lower first"
        )
    if high <= low:
        raise InvalidSampleError(where, f"{low:g} at both percentiles {PERCENTILES}", "an image that is not constant")
    return Window(low, high).to_unit(values)


def _place(root: Path, folder: str, name: str) -> Path:
    return root / folder / f"{check_id(name, root / folder)}.nii.gz"
