"""Reports after a test how well a segmenter serves each group: in the terminal, as tables, and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import lightning
import rich
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from fairdiff_lightning.callbacks.cases import EVERYONE, Case, Picture, read_cases, take_picture, worst_cases
from fairdiff_lightning.callbacks.fairness_summary import FairnessSummary, summarize
from fairdiff_lightning.callbacks.report_files import Report, to_plain, write_tables
from fairdiff_lightning.callbacks.report_page import page
from fairdiff_lightning.callbacks.report_table import terminal_table
from fairdiff_lightning.callbacks.step_outputs import require_keys
from fairdiff_lightning.callbacks.volume_cases import PackedMasks, score_volumes
from fairdiff_lightning.data.native import atomic_path
from fairdiff_lightning.metrics.functional import EmptyPolicy
from fairdiff_lightning.version import __version__

T = TypeVar("T")
_OUTPUTS = {
    "prediction": "class indices (B, 1, H, W), or a list of (1, H, W)",
    "dice": "Dice (B, C) of each image and foreground class, NaN where not defined",
    "iou": "intersection over union (B, C)",
}
_BATCH = {
    "id": "a name for each image, unique in the test set",
    "attributes": "attribute -> group index (B,), -1 when unknown",
    "image": "(B, C, H, W)",
    "mask": "class indices (B, 1, H, W)",
}


class FairnessReport(Callback):
    """Writes a fairness report when a test ends, and prints its table.

    Works with any LightningModule whose ``test_step`` returns a dict with

    ============== ===================================================================
    ``prediction`` int (B, 1, H, W) class indices, or a list of (1, H, W)
    ``dice``       (B, C) in [0, 1] for the C foreground classes, NaN where undefined
    ``iou``        (B, C), as ``dice``
    ``hd95``       optional (B, C), as ``assd`` and ``nsd``: columns of ``cases.csv``
    ============== ===================================================================

    and any batch with ``id``, ``attributes``, ``image`` and ``mask`` (and ``native_mask``, shown instead of ``mask``).
    Without an attribute all images are one group, ``all``, and nothing is compared. Names come from the data module's
    ``classes`` and ``attribute_groups`` and counts from its ``counts()``, where it has them. Files: ``report.html``
    (self-contained), ``fairness.csv``, ``fairness.json``, ``cases.csv``; each is replaced as a whole. Under distributed
    training every image counts once, also where a sampler repeats it. The scores stay in memory, and of the images only
    the worst cases' pictures.

    Where a data module's samples are slices, its ``join`` puts the predictions together and the cases of the report are
    volumes: a slice is no independent case. They are scored anew, with HD95 and ASSD in mm where the step measures
    ``hd95``, and with the module's ``empty``. Until the test ends the masks are kept, compressed.

    Args:
        output_dir: folder of the files; by default ``fairness`` below the trainer's log folder.
        num_worst: cases of lowest Dice that are shown for each attribute.
        num_resamples: resamples of the bootstrap.
        confidence: coverage of the intervals, in (0, 1).
        seed: of the bootstrap.
        title: of the page.
        subsets: attribute, such as the centre, for each of whose groups the tables of the other attributes are repeated
            beside those of all images.

    Raises:
        ValueError: while testing, when the step or the batch lacks a key, or the batch lacks the attribute of
            ``subsets``.
    """

    def __init__(
        self,
        output_dir: str | None = None,
        num_worst: int = 4,
        num_resamples: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
        title: str = "Fairness report",
        subsets: str | None = None,
    ) -> None:
        self.output_dir, self.subsets, self.num_worst, self.title = output_dir, subsets, num_worst, title
        self.num_resamples, self.confidence, self.seed = num_resamples, confidence, seed
        self._cases: dict[str, Case] = {}
        self._pictures: dict[str, Picture] = {}
        self._masks, self._surfaces = PackedMasks(), False

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        self._cases, self._pictures = {}, {}
        self._masks, self._surfaces = PackedMasks(), False

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the scores of the batch and the pictures of its worst cases, or the masks of slices."""
        outputs = require_keys(outputs, _OUTPUTS, f"{type(pl_module).__name__}.test_step", self)
        batch = require_keys(batch, _BATCH, "the test batch", self)
        if self.subsets is not None and self.subsets not in batch["attributes"]:
            raise ValueError(
                f"{type(self).__name__}: subsets={self.subsets!r}, but the test batch has the attributes "
                f"{sorted(batch['attributes'])}. Name one of them, and add it to the data module's attributes."
            )
        known = self._masks if _joins(trainer) else self._cases
        if trainer.world_size == 1 and len({*batch["id"]} - known.keys()) < len(batch["id"]):
            rank_zero_warn("FairnessReport: an id came twice in the test set; only its last image is reported.")
        if not _joins(trainer):
            self._keep(outputs, batch)
            return
        self._surfaces = "hd95" in outputs
        for name, mask in zip(batch["id"], outputs["prediction"], strict=True):
            self._masks.add(name, mask)

    def _keep(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Keep the scores of a batch, and pictures of the worst cases so far."""
        found = {case.id: (index, case) for index, case in enumerate(read_cases(outputs, batch))}
        self._cases |= {name: case for name, (_, case) in found.items()}
        candidates = {name: self._cases[name] for name in (*self._pictures, *found)}
        self._pictures = {
            case.id: take_picture(outputs, batch, found[case.id][0]) if case.id in found else self._pictures[case.id]
            for case in worst_cases(candidates.values(), self.num_worst)
        }

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the scores of all processes; the first one writes and prints."""
        log_dir = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes
        self._cases, self._pictures = _gathered(trainer, self._cases), _gathered(trainer, self._pictures)
        masks = PackedMasks(_gathered(trainer, self._masks.packed))
        if not trainer.is_global_zero:
            return
        if masks:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            empty: EmptyPolicy = getattr(pl_module, "empty", "skip")
            for outputs, batch in score_volumes(data, masks, len(data.classes), empty, self._surfaces):
                self._keep(outputs, batch)
        if not self._cases:
            rank_zero_warn("FairnessReport: the test had no whole case, so there is no report.")
            return
        report = self._report(trainer, pl_module, log_dir)
        console = rich.get_console()
        for subset, summaries in {"": report.summaries, **report.subsets}.items():
            for summary in summaries:
                console.print(terminal_table(summary, self.confidence, subset))
        directory = Path(self.output_dir) if self.output_dir is not None else log_dir / "fairness"
        write_tables(report, directory)
        with atomic_path(directory / "report.html") as path:
            path.write_text(page(report), encoding="utf-8")
        console.print(f"Fairness report: {(directory / 'report.html').resolve()}", soft_wrap=True, markup=False)

    def _report(self, trainer: Trainer, pl_module: LightningModule, log_dir: Path) -> Report:
        datamodule: Any = getattr(trainer, "datamodule", None)
        ordered = [self._cases[name] for name in sorted(self._cases)]
        counts = datamodule.counts() if hasattr(datamodule, "counts") else {}
        hparams = to_plain(pl_module.hparams)
        versions = {"torch": torch.__version__, "lightning": lightning.__version__, "fairdiff_lightning": __version__}
        run = {
            "module": type(pl_module).__name__,
            "hparams": hparams,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": versions,
            "confidence": self.confidence,
            "num_resamples": self.num_resamples,
            "seed": self.seed,
        }
        config = log_dir / "config.yaml"
        return Report(
            title=self.title,
            summaries=self._summaries(ordered, list(ordered[0].groups), datamodule),
            subsets=self._by_subset(ordered, datamodule),
            cases=ordered,
            worst=[(case, self._pictures.get(case.id)) for case in worst_cases(ordered, self.num_worst)],
            run=run,
            counts=counts,
            logged={name: value for name, value in trainer.callback_metrics.items() if name.startswith("test/")},
            config=config.read_text() if config.is_file() else json.dumps(hparams, indent=2, ensure_ascii=False),
        )

    def _by_subset(self, cases: list[Case], datamodule: object) -> dict[str, list[FairnessSummary]]:
        """Name of each group of ``subsets`` that has cases -> the summaries of these."""
        if self.subsets is None:
            return {}
        others = [name for name in cases[0].groups if name != self.subsets] or [EVERYONE]
        found: dict[str, list[FairnessSummary]] = {}
        for index, name in enumerate(_group_names(self.subsets, cases, datamodule)):
            members = [case for case in cases if case.groups[self.subsets] == index]
            if members:
                found[f"{self.subsets} {name}"] = self._summaries(members, others, datamodule)
        return found

    def _summaries(self, cases: list[Case], attributes: list[str], datamodule: object) -> list[FairnessSummary]:
        scores = torch.tensor([(case.dice, case.iou) for case in cases], dtype=torch.float64)
        classes = list(getattr(datamodule, "classes", ()))[1:]
        if len(classes) != scores.shape[-1]:
            classes = [f"class {index}" for index in range(1, scores.shape[-1] + 1)]
        settings = (classes, self.num_resamples, self.confidence, self.seed)
        summaries = []
        for attribute in attributes:
            group = torch.tensor([case.groups.get(attribute, 0) for case in cases])  # 0: of everyone
            summaries.append(summarize(scores, group, attribute, _group_names(attribute, cases, datamodule), *settings))
        return summaries


def _joins(trainer: Trainer) -> bool:
    """Whether the samples are slices of volumes, which the data module puts together."""
    return hasattr(getattr(trainer, "datamodule", None), "join")


def _group_names(attribute: str, cases: list[Case], datamodule: object) -> list[str]:
    """Names of the groups that the data module has or that cases are of; numbers where it names none."""
    named: Mapping[str, list[str]] = getattr(datamodule, "attribute_groups", {})
    known = [EVERYONE] if attribute == EVERYONE else list(named.get(attribute, ()))
    highest = max((case.groups.get(attribute, -1) for case in cases), default=-1)
    return known + [f"group {index}" for index in range(len(known), highest + 1)] or ["group 0"]


def _gathered(trainer: Trainer, mine: dict[str, T]) -> dict[str, T]:
    """Merge the dicts of all processes; what several hold is kept once."""
    if trainer.world_size == 1:
        return mine
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}
