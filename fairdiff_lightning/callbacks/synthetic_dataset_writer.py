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
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from fairdiff_lightning.callbacks.manifest import Manifest
from fairdiff_lightning.callbacks.report_files import to_plain
from fairdiff_lightning.callbacks.step_outputs import require_keys
from fairdiff_lightning.data.native import atomic_path
from fairdiff_lightning.data.provenance import TRAINING_CASES, refuse_seen, write_training_cases
from fairdiff_lightning.data.requests import Request

_SAMPLES = {
    "id": "a name for each sample, unique in the folder",
    "seed": "the seed (B,) that each sample was drawn from",
    "attributes": "attribute -> group index (B,), -1 when unknown",
}
_ORIGIN = ("condition", "condition_digest", "source")
_GENERATOR = ("generator", "checkpoint", "config")


class SyntheticDatasetWriter(Callback):
    """Writes each generated sample through the data set's own ``write`` and lists it in ``manifest.csv``.

    The table holds id, file, seed, the group of every attribute, the condition (id of the mask that was followed), a
    digest of how that mask was made when a generator made it, the source (the real case behind it), the generator's
    class, the SHA-256 of the checkpoint (of the weights, when there is none) and the file with its hyperparameters.
    ``training_cases.txt`` lists what the generator was trained on, as its module and the checkpoint's data module know
    it, so that no split mixes in what has seen its test; where neither knows, a warning says so.
    Files are written whole or not at all. A run that was killed is repeated with the same command: samples that are
    listed are not made again, and the others come out as they would have. Memory stays flat: predictions are not
    returned.

    Needs a data module with ``generate`` (a plan), ``attribute_groups``, ``requests``, ``skip_requests`` and
    ``write_sample``, as :class:`~fairdiff_lightning.data.SegmentationDataModule` has them, and a module whose
    ``predict_step`` answers a batch of requests with a batch of the contract: ``id``, ``seed`` and ``attributes``, and
    ``image`` in [0, 1], ``mask`` or both.

    Args:
        output_dir: folder of the data set; by default ``synthetic`` below the trainer's ``default_root_dir``.

    Raises:
        ValueError: before anything is made, when the folder holds samples of another generator, or made from another
            seed or mask than this run would, or when the generator was trained on cases that are held out here.
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
                "--data.generate.per_source=N, --data.generate.total=N or --data.generate.equal_scale=true "
                "(generate=GenerationPlan(...) in code)."
            )
        self.directory = Path(self.output_dir or Path(trainer.default_root_dir) / "synthetic")
        self.groups: Mapping[str, Sequence[str]] = data.attribute_groups
        self.manifest = Manifest(self.directory, ("id", "file", "seed", *self.groups, *_ORIGIN, *_GENERATOR))
        if trainer.predict_loop.return_predictions:
            rank_zero_info(f"{type(self).__name__}: samples go to files; trainer.predict(...) returns none of them.")
            trainer.predict_loop.return_predictions = False
        data.skip_requests(lambda: self._existing(trainer, pl_module, data.requests()))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin this process's part of the table, and keep the hyperparameters and the generator's training cases."""
        self.manifest.start(trainer.global_rank)
        if trainer.is_global_zero:
            if self.seen:
                write_training_cases(self.directory, self.seen)
            with atomic_path(self.directory / self.provenance["config"]) as path:
                path.write_text(_config(trainer, pl_module), encoding="utf-8")

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
            if sample_id not in self.requests:
                raise ValueError(
                    f"{type(pl_module).__name__}.predict_step: sample '{sample_id}', which nobody asked for."
                )
            if sample_id not in self.done:
                request = self.requests[sample_id]
                sample = {"source": request.source, **_one(samples, index)}
                path = data.write_sample(self.directory, sample)
                self.manifest.append(trainer.global_rank, [self._row(request, sample, path)])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Merge the parts of all processes into ``manifest.csv``; also when nothing was left to be made."""
        if stage == "predict":
            _ask_for_all(trainer)
            trainer.strategy.barrier("samples written")
            if trainer.is_global_zero:
                self.manifest.merge()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the data module; the parts stay for the run that is repeated."""
        _ask_for_all(trainer)

    def _existing(self, trainer: Trainer, pl_module: LightningModule, requests: Sequence[Request]) -> set[str]:
        """Ids of the samples that need not be made, when the folder is of this generator."""
        self.requests = {request.id: request for request in requests}
        self.seen = _training_cases(trainer, pl_module)
        self.provenance = _provenance(trainer, pl_module)
        rows = self.manifest.rows()
        self._refuse_others(rows)
        self.done = {name for name, row in rows.items() if (self.directory / row["file"]).is_file()}
        missing = len(self.requests.keys() - self.done)
        rank_zero_info(
            f"{missing} of {len(requests)} samples are to be made, into '{self.directory}'."
            if requests
            else "The plan asks for nothing: no group lacks a sample."
        )
        trainer.strategy.barrier("existing samples listed")  # before anyone writes
        return self.done

    def _row(self, request: Request, sample: Mapping[str, Any], path: Path) -> list[str]:
        groups = {a: self._group_name(a, int(sample["attributes"].get(a, -1))) for a in self.groups}
        written = {"id": sample["id"], "file": os.path.relpath(path, self.directory), "source": sample["source"]}
        row = {**_asked(request), **written, "seed": str(int(sample["seed"])), **groups, **self.provenance}
        return [row[column] for column in self.manifest.columns]

    def _group_name(self, attribute: str, group: int) -> str:
        return self.groups[attribute][group] if group >= 0 else "unknown"

    def _refuse_others(self, rows: Mapping[str, Mapping[str, str]]) -> None:
        for name, row in rows.items():
            asked = _asked(self.requests[name]) if name in self.requests else {}
            other = {column: value for column, value in {**asked, **self.provenance}.items() if row[column] != value}
            if other:
                raise ValueError(
                    f"'{self.directory}' holds '{name}' of another run: "
                    + ", ".join(f"{column} '{row[column]}', here '{value}'" for column, value in other.items())
                    + ". Choose another output_dir, or remove the folder."
                )


def _training_cases(trainer: Trainer, module: LightningModule) -> frozenset[str]:
    """What the generator was trained on, none of which may be held out here."""
    data, none = getattr(trainer, "datamodule", None), frozenset[str]()
    seen: frozenset[str] = getattr(data, "training_cases", none) | getattr(module, "training_cases", none)
    name = f"the generator {type(module).__name__}"
    if not seen:
        rank_zero_warn(
            f"nothing is known of what {name} was trained on: its samples come without {TRAINING_CASES}, and no data "
            "module will refuse them where they have seen its test cases. Load a checkpoint that was trained with a "
            "data module of this library, or a folder that save_pretrained wrote after such a training."
        )
    refuse_seen(name, seen, getattr(data, "held_out_records", ()))
    return seen


def _ask_for_all(trainer: Trainer) -> None:
    """Have the data module yield every request again, whoever predicts next."""
    data: Any = getattr(trainer, "datamodule", None)
    if hasattr(data, "skip_requests"):
        data.skip_requests(tuple)


def _asked(request: Request) -> dict[str, str]:
    """What a sample must have been made from to be the one that is asked for."""
    condition = request.condition
    followed = (condition.id, condition.digest) if condition is not None else ("", "")
    asked = {"seed": str(request.seed), "condition": followed[0], "condition_digest": followed[1]}
    return asked | ({"source": request.source} if request.background is not None else {})


def _provenance(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    checkpoint = _sha256(Path(trainer.ckpt_path)) if trainer.ckpt_path else _weights_sha256(module)
    config = hashlib.sha256(_config(trainer, module).encode()).hexdigest()[:12]
    return dict(zip(_GENERATOR, (type(module).__name__, checkpoint, f"generator-{config}.json"), strict=True))


def _config(trainer: Trainer, module: LightningModule) -> str:
    """The generator's hyperparameters, and how the data module reads what it follows."""
    reading = getattr(getattr(trainer, "datamodule", None), "reading", {})
    return json.dumps({**to_plain(module.hparams), "data": reading}, indent=2, ensure_ascii=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _weights_sha256(module: LightningModule) -> str:
    """Of a module that comes from no checkpoint: two such modules with equal settings may have other weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):  # else an extra state
            values = value.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    return {k: _on_cpu(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _one(value: Any, index: int) -> Any:
    return {k: _one(v, index) for k, v in value.items()} if isinstance(value, Mapping) else value[index]
