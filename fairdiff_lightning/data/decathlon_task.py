"""``dataset.json`` of a task of the Medical Segmentation Decathlon: channels, classes and pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import atomic_path, visible_files

TASK, IMAGES, LABELS = "dataset.json", "imagesTr", "labelsTr"


@dataclass(frozen=True)
class Task:
    """What ``dataset.json`` says.

    Args:
        name: of the task.
        modalities: names of the channels, in order.
        labels: names of the classes, in order, background first.
        training: paths of image and label of each case, below the folder of the task.
        test: paths of the images without labels.
    """

    name: str
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    training: tuple[tuple[str, str], ...] = ()
    test: tuple[str, ...] = ()


def read_task(path: Path) -> Task:
    """Read a ``dataset.json``.

    Raises:
        InvalidSampleError: for what is no JSON, or lacks a key, or numbers channels or classes with a gap.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidSampleError(path, f"unreadable ({error})", "JSON; fetch it again") from error
    missing = [key for key in ("modality", "labels", "training") if key not in content]
    if missing:
        raise InvalidSampleError(path, f"the keys {sorted(content)}", f"the keys {', '.join(missing)} too")
    pairs = []
    for number, case in enumerate(content["training"]):
        if not (isinstance(case, dict) and {"image", "label"} <= case.keys()):
            raise InvalidSampleError(f"{path}[training][{number}]", f"{case!r}", "an image and a label")
        pairs.append((str(case["image"]), str(case["label"])))
    test = []
    for number, image in enumerate(content.get("test", ())):
        image = image.get("image") if isinstance(image, dict) else image
        if not isinstance(image, str):
            raise InvalidSampleError(f"{path}[test][{number}]", f"{image!r}", "the path of an image")
        test.append(image)
    names = [_in_order(content[key], f"{path}[{key}]") for key in ("modality", "labels")]
    return Task(str(content.get("name", "")), names[0], names[1], tuple(pairs), tuple(test))


def _in_order(named: Any, where: str) -> tuple[str, ...]:
    """Names by number, from 0 on without a gap."""
    numbers = [str(number) for number in range(len(named))]
    if not (isinstance(named, dict) and named and set(named) == set(numbers)):
        raise InvalidSampleError(where, f"{named!r}", 'names by number, {"0": ..., "1": ...}, without a gap')
    return tuple(str(named[number]) for number in numbers)


def list_cases(root: Path, task: Task) -> None:
    """Name the pairs that are there in ``dataset.json``, beside those that it names already."""
    there = [f.name for f in visible_files(root, f"{LABELS}/*.nii.gz") if (root / IMAGES / f.name).is_file()]
    _add(root, task, there)


def add_case(root: Path, task: Task, name: str) -> None:
    """Name one pair more, ``<name>.nii.gz``, in ``dataset.json``; where that is yet to be made, all that are there."""
    if (root / TASK).is_file():
        _add(root, task, [f"{name}.nii.gz"])
    else:
        list_cases(root, task)


def _add(root: Path, task: Task, names: Sequence[str]) -> None:
    """Name pairs in ``dataset.json``; several processes may do so at a time, one after the other."""
    path = root / TASK
    with FileLock(root / f".{TASK}.lock"):
        known = read_task(path).training if path.is_file() else ()
        pairs = list(dict.fromkeys([*known, *((f"./{IMAGES}/{name}", f"./{LABELS}/{name}") for name in names)]))
        if path.is_file() and len(pairs) == len(known):
            return
        content = (json.loads(path.read_text()) if path.is_file() else _without_cases(task)) | {
            "numTraining": len(pairs),
            "training": [{"image": image, "label": label} for image, label in pairs],
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1))


def _without_cases(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "tensorImageSize": "3D" if len(task.modalities) == 1 else "4D",
        "modality": {str(k): name for k, name in enumerate(task.modalities)},
        "labels": {str(k): name for k, name in enumerate(task.labels)},
        "numTest": 0,
        "test": [],
    }
