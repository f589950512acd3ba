"""``fairdiff fit|validate|test|predict``: one LightningCLI for every module and data module, ours or the user's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn

import fairdiff_lightning.callbacks.generation_metrics
import fairdiff_lightning.data  # noqa: F401 - these make bare class names known to the parser
from fairdiff_lightning.callbacks import (
    EpochSeed,
    ExpertUsageHeatMap,
    FairnessReport,
    GeneratedGrid,
    PredictionWriter,
    SampleGrid,
    SyntheticDatasetWriter,
)
from fairdiff_lightning.modules import GenerativeModule, Segmenter
from fairdiff_lightning.version import __version__

LINKED = ("num_classes", "in_channels", "image_size", "num_groups")
"""What a data module knows and a module is built from; classes without such an attribute or argument are left alone."""


class FairDiffCLI(LightningCLI):
    """LightningCLI with both subclass modes, data linked to the model, and callbacks that one wants anyway.

    Unless the configuration has its own: training keeps ``best.ckpt`` (by the module's ``monitor``) and ``last.ckpt``
    and logs sample grids and expert usage, testing writes the fairness report, predicting writes the masks, or what
    ``data.generate`` asks a generator for.
    ``--ckpt_path best|last`` also finds the newest such checkpoint of an earlier process below ``default_root_dir``.
    """

    resumed_folder: str | None = None
    """Where the checkpoints of the run that goes on lie: its best one so far must stay to be beaten."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the data's facts to the model."""
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Turn ``best`` and ``last`` into the path of the newest such checkpoint, and warn when there is none."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.get("return_predictions", None) is None and self.subcommand == "predict":
            config.return_predictions = False
        wanted = config.get("ckpt_path", None)
        if wanted in ("best", "last"):
            root = Path(config.trainer.default_root_dir or os.getcwd())
            config.ckpt_path = str(newest_checkpoint(root, wanted))
            self.resumed_folder = str(Path(config.ckpt_path).parent)
        elif wanted is None and self.subcommand in ("validate", "test", "predict"):
            rank_zero_warn(f"{self.subcommand} without --ckpt_path uses the weights that the model starts with.")

    def _parse_ckpt_path(self) -> None:
        """Keep what is asked for: Lightning lets the settings of a checkpoint win over it."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks that this subcommand wants and the configuration does not have."""
        given = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        present = {type(c) for c in given}
        added = [c for c in self.default_callbacks() if type(c) not in present]
        return super().instantiate_trainer(callbacks=[*given, *added], **kwargs)

    def default_callbacks(self) -> list[Callback]:
        """The callbacks of a subcommand; those that read what our modules return are for our modules."""
        ours, generator = isinstance(self.model, Segmenter), isinstance(self.model, GenerativeModule)
        if self.subcommand == "test":
            return [FairnessReport()] if ours else []
        if self.subcommand == "predict":
            return [PredictionWriter()] if ours else [SyntheticDatasetWriter()] if generator else []
        pictures: list[Callback] = [SampleGrid(), ExpertUsageHeatMap()] if ours else []
        pictures += [GeneratedGrid()] if generator else []
        if self.subcommand != "fit":
            return pictures
        trainer = self._get(self.config_init, "trainer", default={})
        if trainer.get("enable_checkpointing") is False or trainer.get("fast_dev_run"):
            return [EpochSeed(), *pictures]
        monitor = getattr(self.model, "monitor", None)
        mode = getattr(self.model, "monitor_mode", "max")
        best = [_checkpoint("best", self.resumed_folder, monitor=monitor, mode=mode)] if monitor else []
        last = _checkpoint("last", self.resumed_folder, save_on_train_epoch_end=True)
        return [EpochSeed(), *pictures, *best, last]


def newest_checkpoint(root: Path, name: str) -> Path:
    """The newest ``<name>.ckpt`` below a folder.

    Raises:
        FileNotFoundError: when there is none.
    """
    found = sorted(root.rglob(f"{name}.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"--ckpt_path {name}: no '{name}.ckpt' below '{root.resolve()}'. Give the path of a checkpoint, or the "
            "folder of the run with --trainer.default_root_dir."
        )
    return found[-1]


def _checkpoint(filename: str, folder: str | None, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename, auto_insert_metric_name=False, enable_version_counter=False, **arguments)


def build_cli(args: ArgsType = None, run: bool = True) -> FairDiffCLI:
    """Make the CLI; with ``run=False`` the model, data and trainer are made and nothing is run.

    Args:
        args: command line as a list of strings, or the configuration as a dict; ``sys.argv`` when None.
        run: whether the subcommand is run.
    """
    return FairDiffCLI(
        LightningModule,
        LightningDataModule,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        parser_kwargs={"parser_mode": "omegaconf", "version": __version__},
        args=args,
        run=run,
    )


def main(args: ArgsType = None) -> None:
    """Entry point of ``fairdiff``.

    Args:
        args: command line as a list of strings; ``sys.argv`` when None.
    """
    build_cli(args)
