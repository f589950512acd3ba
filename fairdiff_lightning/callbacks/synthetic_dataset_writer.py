"""Writes what a generator makes as a data set in its native layout, resumably and with provenance."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from fairdiff_lightning.callbacks.manifest import Manifest
from fairdiff_lightning.callbacks.report_files import to_plain
from fairdiff_lightning.callbacks.step_outputs import require_keys
from fairdiff_lightning.data.native import atomic_path
from fairdiff_lightning.data.requests import Request

_SAMPLES = {
    "id": "a name for each sample, unique in the folder",
    "seed": "the seed (B,) that each sample was drawn from",
    "attributes": "attribute -> group index (B,), -1 when unknown",
}


class SyntheticDatasetWriter(Callback):
    """Writes each generated sample through the data set's own ``write`` and lists it in ``manifest.csv``.

    The table holds id, file, seed, the group of every attribute, the condition (id of the mask that was followed), the
    source (the real case behind it), the generator's class, the checkpoint's SHA-256 and the file with its
    hyperparameters. Files are written whole or not at all. A run that was killed is repeated with the same command:
    samples that are listed are not made again, and the others come out as they would have. Memory stays flat.

    Needs a data module with ``generate`` (a plan), ``attribute_groups``, ``skip_requests`` and ``write_sample``, as
    :class:`~fairdiff_lightning.data.SegmentationDataModule` has them, and a module whose ``predict_step`` returns a
    batch of the contract with ``id``, ``seed`` and ``attributes``, and ``image`` in [0, 1], ``mask`` or both.

    Args:
        output_dir: folder of the data set; by default ``synthetic`` below the trainer's ``default_root_dir``.

    Raises:
        ValueError: before anything is made, when the folder holds samples of another generator or of another seed.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        self.output_dir = output_dir

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle on the folder, and have what exists already left out of the requests."""
        if stage != "predict":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if getattr(data, "generate", None) is None:
            raise ValueError(
                f"{type(self).__name__}: nothing to generate. Say how much, with --data.generate.per_group=N, "
                "--data.generate.total=N or --data.generate.equal_scale=true (generate=GenerationPlan(...) in code)."
            )
        self.directory = Path(self.output_dir or Path(trainer.default_root_dir) / "synthetic")
        self.groups: Mapping[str, Sequence[str]] = data.attribute_groups
        columns = ("id", "file", "seed", *self.groups, "condition", "source", "generator", "checkpoint", "config")
        self.manifest = Manifest(self.directory, columns)
        data.skip_requests(lambda: self._existing(trainer, pl_module, data.requests()))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin this process's part of the table, and keep the hyperparameters."""
        self.manifest.start(trainer.global_rank)
        if trainer.is_global_zero:
            with atomic_path(self.directory / self.provenance[-1]) as path:
                path.write_text(_config(pl_module))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the samples of a batch that do not exist yet."""
        samples = require_keys(outputs, _SAMPLES, f"{type(pl_module).__name__}.predict_step", self)
        samples = _on_cpu(samples)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for index, sample_id in enumerate(samples["id"]):
            if sample_id not in self.done:
                sample = _one(samples, index)
                path = data.write_sample(self.directory, sample)
                self.manifest.append(trainer.global_rank, [self._row(sample, path)])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Merge the parts of all processes into ``manifest.csv``; also when nothing was left to be made."""
        if stage == "predict":
            trainer.strategy.barrier("samples written")
            if trainer.is_global_zero:
                self.manifest.merge()

    def _existing(self, trainer: Trainer, pl_module: LightningModule, requests: Sequence[Request]) -> set[str]:
        """Ids of the samples that need not be made, when the folder is of this generator."""
        self.provenance = self._provenance(trainer, pl_module)
        rows = self.manifest.rows()
        self._refuse_others(rows, {request.id: request.seed for request in requests})
        self.done = {name for name, row in rows.items() if (self.directory / row["file"]).is_file()}
        missing = sum(request.id not in self.done for request in requests)
        rank_zero_info(f"{missing} of {len(requests)} samples are to be made, into '{self.directory}'.")
        trainer.strategy.barrier("existing samples listed")  # before anyone writes
        return self.done

    def _row(self, sample: Mapping[str, Any], path: Path) -> list[str]:
        groups = [self._group_name(a, int(sample["attributes"].get(a, -1))) for a in self.groups]
        about = [str(sample.get(key, "")) for key in ("condition", "source")]
        file = os.path.relpath(path, self.directory)
        return [sample["id"], file, str(int(sample["seed"])), *groups, *about, *self.provenance]

    def _group_name(self, attribute: str, group: int) -> str:
        return self.groups[attribute][group] if group >= 0 else "unknown"

    def _provenance(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str, str, str]:
        checkpoint = _sha256(Path(trainer.ckpt_path)) if trainer.ckpt_path else "none"
        config = hashlib.sha256(_config(pl_module).encode()).hexdigest()[:12]
        return type(pl_module).__name__, checkpoint, f"generator-{config}.json"

    def _refuse_others(self, rows: Mapping[str, Mapping[str, str]], seeds: Mapping[str, int]) -> None:
        for name, row in rows.items():
            found = (row["generator"], row["checkpoint"], row["config"])
            if found != self.provenance or int(row["seed"]) != seeds.get(name, int(row["seed"])):
                raise ValueError(
                    f"'{self.directory}' holds '{name}' of seed {row['seed']} by {found[0]}, checkpoint "
                    f"{found[1][:12]}, {found[2]}; this run has seed {seeds.get(name, 'none')}, {self.provenance[0]}, "
                    f"checkpoint {self.provenance[1][:12]}, {self.provenance[2]}. Choose another output_dir, or remove "
                    "the folder."
                )


def _config(module: LightningModule) -> str:
    return json.dumps(to_plain(module.hparams), indent=2, ensure_ascii=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    return {k: _on_cpu(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _one(value: Any, index: int) -> Any:
    return {k: _one(v, index) for k, v in value.items()} if isinstance(value, Mapping) else value[index]
