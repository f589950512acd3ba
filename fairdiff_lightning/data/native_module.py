"""What all data modules share: splits, folds, filters, mixing, samplers, caching, requests, loaders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import DataLoader, DistributedSampler

from fairdiff_lightning.data.batch_augmentation import Augmentation, augment_batch, merge_batch
from fairdiff_lightning.data.cache import Storage
from fairdiff_lightning.data.condition_masks import condition_masks
from fairdiff_lightning.data.dataset import SegmentationDataset
from fairdiff_lightning.data.edge_augmentation import RandomZoomRotate
from fairdiff_lightning.data.edge_frame import EdgeFrame, detector_of, prepare_edges, refuse_other_detector
from fairdiff_lightning.data.edges import DetectorArgument, EdgeReader, ScharrEdges
from fairdiff_lightning.data.folds import fold_records
from fairdiff_lightning.data.frames import Frame
from fairdiff_lightning.data.mixing import Balance, mix
from fairdiff_lightning.data.module_facts import ModuleFacts
from fairdiff_lightning.data.native import Index, NativeDataset, Record, make_directory_once
from fairdiff_lightning.data.partners import find_partners
from fairdiff_lightning.data.patch_merge import PartnerIndex, PatchMerge
from fairdiff_lightning.data.phantoms import phantom_folder
from fairdiff_lightning.data.provenance import marks, refuse_generator, refuse_seen
from fairdiff_lightning.data.requests import (
    GenerationPlan,
    MaskReader,
    Request,
    RequestBatches,
    RequestReader,
    make_requests,
)
from fairdiff_lightning.data.sample import UNKNOWN, Sample, collate, validate
from fairdiff_lightning.data.samplers import EpochSampler, GroupBalancedSampler, SequentialShards
from fairdiff_lightning.data.seeding import derive_seed, generator
from fairdiff_lightning.data.selection import GroupFilter, find_attribute, select
from fairdiff_lightning.data.splits import (
    HELD_OUT,
    Splits,
    as_synthetic,
    check_disjoint,
    count_groups,
    held_out_keys,
    refuse_leaks,
    split_records,
    write_split_table,
)

Sampler = Literal["shuffle", "group_balanced"]


class NativeDataModule(ModuleFacts, LightningDataModule):
    """Splits, mixes, caches and loads a native data set, pictures or volumes.

    Args:
        dataset: reads and writes the files.
        frame: what part of a file a sample shows, and at what size.
        root: folder in the owner's layout; None writes a phantom into the cache folder and uses it.
        attributes: attributes that a sample carries; the first is the one that ``balance`` and the sampler balance.
        batch_size: samples in a batch, on each device.
        num_workers: loader processes.
        fractions: shares of train, val and test among the patients or lesions.
        split_seed: seed of the split, or of the division into folds.
        fold: number of the fold of patients or lesions that is the test split; ``fractions``' first two then divide the
            other folds. Where the owner marks cases as ``test``, these stay it, and the fold is the validation split.
            None splits by ``fractions``.
        num_folds: folds that they are divided into.
        groups: attribute -> names of the groups to keep in all splits; a filter moves no case to another split.
        drop_unknown: leave out samples of which one of ``attributes`` is unknown.
        synthetic: folders of generated samples in the same layout, for training only.
        merge: train on the real samples alone, each merged patch by patch with one of the ``synthetic`` samples that
            were made from it, another one in each epoch. They are read from their files each time.
        balance: how real and synthetic samples are mixed, see :func:`~fairdiff_lightning.data.mixing.mix`.
        total: size of the balanced training set.
        balance_unknown: balance the samples of unknown group too, as one group more.
        generate: what ``predict`` asks a generator for; None predicts the test split.
        sampler: ``group_balanced`` shows every group equally often in each epoch, also under DDP.
        cache: keep decoded and resized samples in ``memory`` (shared by the loader's processes), on ``disk``, or not.
        augmentation: (image, mask, generator) -> image, mask, of a training batch on its device, before it is merged.
        edges: ``scharr``, ``HED`` or another detector, see :func:`~fairdiff_lightning.data.edges.edges_of`, of edges
            that every picture or slice carries, and every request that follows a real image's mask; kept in the cache
            folder.
        evaluate_at: ``native`` also yields the mask at the file's own size in val and test, for metrics there.
        on_error: ``skip`` reads every file once in ``setup`` and leaves out, counts and reports what cannot be read.
        check: validate every batch against the sample contract; slow, for debugging.
        seed: of sampling, mixing and augmentation; that of ``seed_everything`` when None.

    Raises:
        DatasetNotFoundError: in ``prepare_data``, when the tree is missing or another one.
        ValueError: in ``setup``, for synthetic samples that were made from a validation or test case; on loading a
            checkpoint that was trained on one, naming it.
    """

    def __init__(
        self,
        dataset: NativeDataset,
        frame: Frame,
        root: str | None = None,
        attributes: Sequence[str] = (),
        batch_size: int = 16,
        num_workers: int = 0,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        fold: int | None = None,
        num_folds: int = 3,
        groups: Mapping[str, Sequence[str]] | None = None,
        drop_unknown: bool = False,
        synthetic: Sequence[str] = (),
        merge: PatchMerge | None = None,
        balance: Balance = "none",
        total: int | None = None,
        balance_unknown: bool = False,
        generate: GenerationPlan | None = None,
        sampler: Sampler = "shuffle",
        cache: Storage = "memory",
        augmentation: Augmentation | RandomZoomRotate | None = None,
        edges: DetectorArgument | None = None,
        evaluate_at: Literal["input", "native"] = "input",
        on_error: Literal["raise", "skip"] = "raise",
        check: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.root = dataset, root
        self.attribute_specs = [find_attribute(dataset, name) for name in attributes]
        self.wanted = GroupFilter.of(dataset, groups or {}, attributes if drop_unknown else ())
        if (balance != "none" or sampler == "group_balanced") and not self.attribute_specs:
            raise ValueError(f"balance={balance!r}, sampler={sampler!r} without attributes: name the one to balance.")
        if edges is not None and merge is not None:
            raise ValueError("edges with merge: edges are for generators, merged samples for segmenters. Give one.")
        self.frame = (
            frame if edges is None else EdgeFrame(frame, EdgeReader(ScharrEdges() if edges == "scharr" else edges))
        )
        self.batch_size, self.num_workers = batch_size, num_workers
        self.fractions, self.split_seed, self.fold, self.num_folds = fractions, split_seed, fold, num_folds
        self.synthetic, self.balance, self.total, self.sampler = list(synthetic), balance, total, sampler
        self.merge, self.partners = merge, cast(PartnerIndex | None, None)
        self.cache, self.evaluate_at, self.on_error, self.check = cache, evaluate_at, on_error, check
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.balance_unknown, self.generate, self.augmentation = balance_unknown, generate, augmentation
        self.allow_zero_length_dataloader_with_multiple_devices = generate is not None  # few requests may be left
        self.splits: Splits = {}
        self._real: list[Record] = []
        self._held_out: frozenset[str] = frozenset()
        self.held_out_records: list[Record] = []
        self.training_cases: frozenset[str] = frozenset()
        self._existing: Callable[[], Iterable[str]] = tuple
        self._datasets: dict[str, SegmentationDataset] = {}

    @property
    def group_counts(self) -> dict[str, list[int]]:
        """Attribute -> training samples of each group."""
        train = self.splits.get("train", [])
        return {
            s.name: [sum(r.attributes[s.name] == g for r in train) for g in range(len(s))] for s in self.attribute_specs
        }

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Split -> attribute -> group name -> number of samples, unknown ones included."""
        return count_groups(self.splits, self.attribute_specs)

    @property
    def reading(self) -> dict[str, str]:
        """How files become samples: what a generated sample depends on beside its generator and its condition."""
        return {"dataset": repr(sorted(vars(self.dataset).items())), "frame": repr(self.frame)}

    def prepare_data(self) -> None:
        """Write the phantom when there is no root, and check that the tree is the expected one."""
        if self.root is None:
            rank_zero_info(f"root is empty: the {self.dataset.name} phantom in '{self.folder}' is used.")
            make_directory_once(self.folder, lambda path: self.dataset.write_phantom(path, seed=0))
        for folder in (self.folder, *map(Path, self.synthetic)):
            if not folder.is_dir():
                raise self.dataset.not_found(folder, "no such folder")

    @property
    def folder(self) -> Path:
        """The folder that is read: the root, or the phantom's."""
        return Path(self.root) if self.root is not None else phantom_folder(self.dataset.name)

    def setup(self, stage: str | None = None) -> None:
        """Index, split, filter, mix and check; a second call does nothing."""
        if self.splits:
            return
        index = self.dataset.index(self.folder)
        real = [record for record in index.records if not record.synthetic]
        whole = self._split(real)
        self._held_out = held_out_keys(whole, self.dataset.case_key)
        self.held_out_records = [record for part in HELD_OUT for record in whole[part]]
        made = [record for record in index.records if record.synthetic]
        splits = self._select(self.folder, index, {**whole, "made": made})
        made, self._real = splits.pop("made"), splits["train"]
        splits["train"] = self._training_set(made)
        check_disjoint(splits)
        self.splits = splits
        self._report()

    def state_dict(self) -> dict[str, Any]:
        """The real cases that a checkpoint was trained on, and what drew their edges."""
        return {"training_cases": sorted(self.training_cases | marks(self._real)), "edges": detector_of(self.frame)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on cases that are held out here, or on another detector's edges.

        Raises:
            ValueError: naming them.
        """
        self.training_cases = frozenset(state_dict["training_cases"])
        refuse_seen("the checkpoint", self.training_cases, self.held_out_records)
        refuse_other_detector(state_dict.get("edges"), self.frame)

    def on_before_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Check the batch against the contract when asked to."""
        if self.check:
            validate(
                batch,
                num_classes=self.num_classes,
                attributes=self.attribute_specs,
                intensity_range=self.intensity_range,
                batched=True,
            )
        return batch

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Augment a training batch, on its device and from a seed of its own; others get the range of merged ones."""
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return batch if self.merge is None else self.merge.rescale(batch)
        draws = generator(self.seed, "augment", trainer.fit_loop.total_batch_idx, trainer.global_rank)
        return self.augment(batch, draws)

    def augment(self, batch: Sample, draws: torch.Generator) -> Sample:
        """Change what a training batch shows of each sample alike, and merge partners, from the given draws."""
        if self.augmentation is not None:
            batch = augment_batch(batch, self.augmentation, draws)
        return batch if self.merge is None else merge_batch(batch, self.merge, draws)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled, or balanced by the first attribute.

        Raises:
            ValueError: for a folder of samples whose generator was trained on held-out cases, naming them.
        """
        data = self._training_data()
        replicas, rank = self._ranks()
        sampler: DistributedSampler[Any] = (
            GroupBalancedSampler(data.groups(self.attribute_specs[0].name), self.seed, replicas, rank)
            if self.sampler == "group_balanced"
            else DistributedSampler(data, replicas, rank, shuffle=True, seed=self.seed)
        )
        return self._loader(data, EpochSampler(sampler), self.batch_size)

    def _training_data(self) -> SegmentationDataset:
        for folder in map(Path, self.synthetic):
            refuse_generator(folder, self.held_out_records)
        return self._data("train")

    def val_dataloader(self) -> DataLoader[Sample]:
        """In order; under DDP padded so that every rank makes as many steps, as the wrapped network needs."""
        replicas, rank = self._ranks()
        data = self._data("val")
        return self._loader(data, DistributedSampler(data, replicas, rank, shuffle=False))

    def test_dataloader(self) -> DataLoader[Sample]:
        """In order, every sample exactly once over all devices."""
        data = self._data("test")
        return self._loader(data, SequentialShards(data, *self._ranks()))

    def predict_dataloader(self) -> DataLoader[Sample]:
        """The requests of ``generate``, or the test split with the files' own sizes, to write predictions at these."""
        if self.generate is not None:
            names, done = list(self.attribute_groups), self._existing()
            batches = RequestBatches(self.requests(), self.batch_size, names, self.request_reader(), done)
            prepare_edges(self.frame, self.dataset, batches.followed(*self._ranks()))
            return batches.loader(self.num_workers, *self._ranks())
        data = self._data("predict")
        return self._loader(data, SequentialShards(data, *self._ranks()))

    def requests(self) -> list[Request]:
        """What ``generate`` asks for, all of it.

        Raises:
            ValueError: without a plan; when a group has no mask to condition on, or one is derived from a held-out
                case, or of a generator that was trained on one; for ``equal_scale`` without attributes.
        """
        if self.generate is None:
            raise ValueError("nothing to generate: give the data module generate=GenerationPlan(...).")
        groups = self._balanced_groups() if self.attribute_specs else {0: "sample"}
        attribute = self.attribute_specs[0].name if self.attribute_specs else None
        follows = self.generate.masks is not None or self.generate.backgrounds is not None
        if follows and attribute is not None and all(r.attributes[attribute] == UNKNOWN for r in self._real):
            rank_zero_warn(f"'{attribute}' is unknown for all training samples: what is made is of no group of it.")
            groups, attribute = {UNKNOWN: "sample"}, None
        counts = {g: sum(attribute is None or r.attributes[attribute] == g for r in self._real) for g in groups}
        masks = condition_masks(self.generate, self._real, self.dataset, self.attribute_specs)
        scans = self.backgrounds()
        used = [*(masks or ()), *(replace(scan, source=scan.source or scan.id) for scan in scans or ())]
        refuse_leaks(used, self._held_out, self.dataset.case_key)
        refuse_generator(Path(self.generate.masks or ""), self.held_out_records)
        return make_requests(self.generate, groups, counts, masks, attribute, scans)

    def backgrounds(self) -> list[Record] | None:
        """The scans that ``generate`` wants lesions put into; None when it wants none.

        Raises:
            ValueError: for a plan with backgrounds where pictures have none.
        """
        if self.generate is not None and self.generate.backgrounds is not None:
            raise ValueError(
                f"generate: backgrounds={self.generate.backgrounds!r}, but {self.dataset.name} has no lesions to put "
                "into scans; data sets of volumes do."
            )
        return None

    def request_reader(self) -> RequestReader:
        """Reads what a generator is given beside the request's seed and groups; loader processes get a copy."""
        return MaskReader(self.dataset, self.frame)

    def skip_requests(self, existing: Callable[[], Iterable[str]]) -> None:
        """Leave out of the predict loader what exists already; asked when the loader is made."""
        self._existing = existing

    def write_mask(self, directory: Path, sample_id: str, mask: torch.Tensor | NDArray[np.uint8]) -> Path:
        """Store a predicted mask (1, H, W[, D]) or (H, W[, D]) of class indices in the data set's own format."""
        array = np.asarray(mask, dtype=np.uint8).reshape(mask.shape[-self.dataset.ndim :])
        return self.dataset.write_mask(Path(directory), sample_id, array)

    def write_sample(self, directory: Path, sample: Mapping[str, Any]) -> Path:
        """Store a generated sample in the data set's own layout; one without an image as a mask."""
        if "image" in sample:
            return self.dataset.write(Path(directory), cast(Sample, sample))
        return self.write_mask(directory, sample["id"], sample["mask"])

    def write_splits(self, path: Path) -> None:
        """Write the split as a table: id, unit, split, synthetic, and the group of every attribute."""
        write_split_table(path, self.splits, self.dataset.unit, list(self.attribute_groups))

    def _select(self, folder: Path, index: Index, parts: Splits) -> Splits:
        decode = self.make_dataset([]).decode if self.on_error == "skip" else None
        return select(parts, index, self.wanted, decode, f"{self.dataset.name} under '{folder}'")

    def _training_set(self, made: Sequence[Record]) -> list[Record]:
        for folder in map(Path, self.synthetic):
            index = self.dataset.index(folder)
            found = self._select(folder, index, {"made": index.records})
            made = [*made, *(as_synthetic(record, folder) for record in found["made"])]
        refuse_leaks(made, self._held_out, self.dataset.case_key)
        if self.merge is not None:
            seed = derive_seed(self.seed, "partners")
            self.partners, made = find_partners(self._real, made, self.merge.num_synthetic, seed), []
        attribute, names = (self.attribute_specs[0].name, self._balanced_groups()) if self.attribute_specs else ("", {})
        seed = derive_seed(self.seed, "mix") % 2**32
        return mix(self._real, made, self.balance, attribute, names, self.total, seed)

    def _split(self, real: Sequence[Record]) -> Splits:
        if self.fold is None:
            return split_records(real, self.fractions, self.split_seed, self.dataset.drawn_over)
        train, val, _ = self.fractions
        if train <= 0:
            raise ValueError(
                f"fractions={self.fractions} with fold={self.fold}: no case of the other folds would train."
            )
        return fold_records(real, self.fold, self.num_folds, val / (train + val), self.split_seed)

    def _balanced_groups(self) -> dict[int, str]:
        """Index -> name of the first attribute's groups that the filters keep."""
        unknown = {UNKNOWN: "unknown"} if self.balance_unknown else {}
        return self.wanted.kept(self.attribute_specs[0]) | unknown

    def _report(self) -> None:
        sizes = ", ".join(f"{part} {len(records)}" for part, records in self.splits.items())
        rank_zero_info(f"{self.dataset.name} under '{self.folder}': {sizes}.")
        for spec in self.attribute_specs:
            absent = [name for g, name in self.wanted.kept(spec).items() if not self.group_counts[spec.name][g]]
            if absent:
                rank_zero_warn(
                    f"No training sample of '{spec.name}' {', '.join(absent)}: that group cannot be learned."
                )
        trainer = self.trainer
        log_dir = trainer.log_dir if trainer is not None and trainer.loggers else None  # asks all processes
        if trainer is not None and log_dir and trainer.is_global_zero:
            self.write_splits(Path(log_dir) / "splits.csv")

    def _data(self, part: str) -> SegmentationDataset:
        if part not in self._datasets:
            records = self.splits["test" if part == "predict" else part]
            processes, rank = self._ranks()
            if len(records) < processes:
                raise ValueError(
                    f"the {part} split of '{self.folder}' has {len(records)} samples for {processes} processes: "
                    f"fractions {self.fractions}, filters and the splits that the data name leave no more. "
                    "Change them, or give more data."
                )
            prepare_edges(self.frame, self.dataset, records[rank::processes])
            native = part == "predict" or (part in HELD_OUT and self.evaluate_at == "native")
            self._datasets[part] = self.make_dataset(records, native, self.cache, training=part == "train")
        return self._datasets[part]

    def make_dataset(
        self, records: Sequence[Record], native_mask: bool = False, cache: Storage = "none", training: bool = False
    ) -> SegmentationDataset:
        """Records as samples of this module's frame."""
        partners = self.partners if training else None
        settings = (list(self.attribute_groups), self.frame, native_mask, cache)
        return SegmentationDataset(self.dataset, records, *settings, partners=partners)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    @property
    def evaluation_batch_size(self) -> int:
        """Samples in a batch when not training."""
        return self.batch_size

    def _loader(
        self, data: SegmentationDataset, sampler: DistributedSampler[Any], batch_size: int | None = None
    ) -> DataLoader[Sample]:
        return DataLoader(
            dataset=data,
            batch_size=batch_size or self.evaluation_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=cast(Any, collate),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=generator(self.seed, "loader"),
        )
