"""``dataset.json`` of a task of the Medical Segmentation Decathlon: channels, classes and pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        num_test: number of images without labels.
    """

    name: str
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    training: tuple[tuple[str, str], ...] = ()
    num_test: int = 0


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
    names = [_in_order(content[key], f"{path}[{key}]") for key in ("modality", "labels")]
    return Task(str(content.get("name", "")), names[0], names[1], tuple(pairs), len(content.get("test", ())))


def _in_order(named: Any, where: str) -> tuple[str, ...]:
    """Names by number, from 0 on without a gap."""
    numbers = [str(number) for number in range(len(named))]
    if not (isinstance(named, dict) and named and set(named) == set(numbers)):
        raise InvalidSampleError(where, f"{named!r}", 'names by number, {"0": ..., "1": ...}, without a gap')
    return tuple(str(named[number]) for number in numbers)


def list_cases(root: Path, task: Task) -> None:
    """Name the pairs that are there in ``dataset.json``, beside those that it names already.

    Several processes may write at a time: one whose list was complete when it looked again after it had stored it has
    missed nothing, and a case that came later is listed by whoever wrote it.
    """
    path = root / TASK
    listed: list[tuple[str, str]] = []
    while True:
        known = read_task(path).training if path.is_file() else ()
        there = [f.name for f in visible_files(root, f"{LABELS}/*.nii.gz") if (root / IMAGES / f.name).is_file()]
        pairs = list(dict.fromkeys([*known, *((f"./{IMAGES}/{name}", f"./{LABELS}/{name}") for name in there)]))
        if pairs == listed:
            return
        content = (json.loads(path.read_text()) if known else _without_cases(task)) | {
            "numTraining": len(pairs),
            "training": [{"image": image, "label": label} for image, label in pairs],
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1))
        listed = pairs


def _without_cases(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "tensorImageSize": "3D" if len(task.modalities) == 1 else "4D",
        "modality": {str(k): name for k, name in enumerate(task.modalities)},
        "labels": {str(k): name for k, name in enumerate(task.labels)},
        "numTest": 0,
        "test": [],
    }
