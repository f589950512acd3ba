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

from fairdiff_lightning.callbacks.cases import Case, Picture, read_cases, take_picture, worst_cases
from fairdiff_lightning.callbacks.fairness_summary import FairnessSummary, summarize
from fairdiff_lightning.callbacks.report_files import Report, to_plain, write_tables
from fairdiff_lightning.callbacks.report_page import page
from fairdiff_lightning.callbacks.report_table import terminal_table
from fairdiff_lightning.callbacks.step_outputs import require_keys
from fairdiff_lightning.data.native import atomic_path
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

    ============== ==================================================================
    ``prediction`` int (B, 1, H, W) class indices, or a list of (1, H, W)
    ``dice``       (B, C) in [0, 1] for the C foreground classes, NaN where undefined
    ``iou``        (B, C), as ``dice``
    ============== ==================================================================

    and any batch with ``id``, ``attributes``, ``image`` and ``mask`` (and ``native_mask``, shown instead of ``mask``).
    Names come from the data module's ``classes`` and ``attribute_groups`` and counts from its ``counts()``, where it
    has them. Files: ``report.html`` (self-contained), ``fairness.csv``, ``fairness.json``, ``cases.csv``; each is
    replaced as a whole. Under distributed training every image counts once, also where a sampler repeats it. The scores
    stay in memory, and of the images only the worst cases' pictures.

    Args:
        output_dir: folder of the files; by default ``fairness`` below the trainer's log folder.
        num_worst: cases of lowest Dice that are shown for each attribute.
        num_resamples: resamples of the bootstrap.
        confidence: coverage of the intervals, in (0, 1).
        seed: of the bootstrap.
        title: of the page.

    Raises:
        ValueError: while testing, when the step or the batch lacks a key, or the batch has no attribute.
    """

    def __init__(
        self,
        output_dir: str | None = None,
        num_worst: int = 4,
        num_resamples: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
        title: str = "Fairness report",
    ) -> None:
        self.output_dir, self.num_worst, self.title = output_dir, num_worst, title
        self.num_resamples, self.confidence, self.seed = num_resamples, confidence, seed
        self._cases: dict[str, Case] = {}
        self._pictures: dict[str, Picture] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        self._cases, self._pictures = {}, {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the scores of the batch, and the pictures of its worst cases."""
        outputs = require_keys(outputs, _OUTPUTS, f"{type(pl_module).__name__}.test_step", self)
        batch = require_keys(batch, _BATCH, "the test batch", self)
        if not batch["attributes"]:
            raise ValueError(
                f"{type(self).__name__}: the test batch has no attribute, expected at least one. "
                "Name one in the data module's attributes, or leave the callback out."
            )
        found = {case.id: (index, case) for index, case in enumerate(read_cases(outputs, batch))}
        if trainer.world_size == 1 and (len(found) < len(batch["id"]) or not self._cases.keys().isdisjoint(found)):
            rank_zero_warn("FairnessReport: an id came twice in the test set; only its last image is reported.")
        self._cases |= {name: case for name, (_, case) in found.items()}
        candidates = {name: self._cases[name] for name in (*self._pictures, *found)}
        self._pictures = {
            case.id: take_picture(outputs, batch, found[case.id][0]) if case.id in found else self._pictures[case.id]
            for case in worst_cases(candidates.values(), self.num_worst)
        }

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the scores of all processes; the first one writes and prints."""
        log_dir = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes
        cases, pictures = _gathered(trainer, self._cases), _gathered(trainer, self._pictures)
        if not trainer.is_global_zero:
            return
        if not cases:
            rank_zero_warn("FairnessReport: the test had no batch, so there is no report.")
            return
        report = self._report(trainer, pl_module, log_dir, cases, pictures)
        console = rich.get_console()
        for summary in report.summaries:
            console.print(terminal_table(summary, self.confidence))
        directory = Path(self.output_dir) if self.output_dir is not None else log_dir / "fairness"
        write_tables(report, directory)
        with atomic_path(directory / "report.html") as path:
            path.write_text(page(report), encoding="utf-8")
        console.print(f"Fairness report: {(directory / 'report.html').resolve()}", soft_wrap=True, markup=False)

    def _report(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        log_dir: Path,
        cases: Mapping[str, Case],
        pictures: Mapping[str, Picture],
    ) -> Report:
        datamodule: Any = getattr(trainer, "datamodule", None)
        ordered = [cases[name] for name in sorted(cases)]
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
            summaries=self._summaries(ordered, datamodule),
            cases=ordered,
            worst=[(case, pictures.get(case.id)) for case in worst_cases(ordered, self.num_worst)],
            run=run,
            counts=counts,
            logged={name: value for name, value in trainer.callback_metrics.items() if name.startswith("test/")},
            config=config.read_text() if config.is_file() else json.dumps(hparams, indent=2, ensure_ascii=False),
        )

    def _summaries(self, cases: list[Case], datamodule: object) -> list[FairnessSummary]:
        scores = torch.tensor([(case.dice, case.iou) for case in cases], dtype=torch.float64)
        named: Mapping[str, list[str]] = getattr(datamodule, "attribute_groups", {})
        classes = list(getattr(datamodule, "classes", ()))[1:]
        if len(classes) != scores.shape[-1]:
            classes = [f"class {index}" for index in range(1, scores.shape[-1] + 1)]
        summaries = []
        for attribute in cases[0].groups:
            group = torch.tensor([case.groups[attribute] for case in cases])
            known = list(named.get(attribute, ()))
            groups = known + [f"group {index}" for index in range(len(known), int(group.max()) + 1)]
            summaries.append(
                summarize(
                    scores, group, attribute, groups or ["group 0"], classes,
                    self.num_resamples, self.confidence, self.seed,
                )
            )  # fmt: skip
        return summaries


def _gathered(trainer: Trainer, mine: dict[str, T]) -> dict[str, T]:
    """Merge the dicts of all processes; what several hold is kept once."""
    if trainer.world_size == 1:
        return mine
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}
