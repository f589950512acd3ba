"""Plain segmentation: any network, the papers' losses, and metrics for every group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from fairdiff_lightning.data.resample import restore_volumes
from fairdiff_lightning.data.resize import restore_mask
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.losses import FEBSLoss, FocalLoss, dice_ce_loss
from fairdiff_lightning.metrics import GroupedScores
from fairdiff_lightning.metrics.functional import EmptyPolicy, dice_score, equity_scaled
from fairdiff_lightning.metrics.surface import SurfaceEmptyPolicy, surface_scores
from fairdiff_lightning.modules.data_facts import check_data, chosen_attribute
from fairdiff_lightning.modules.optimization import configure
from fairdiff_lightning.modules.sliding import slide
from fairdiff_lightning.networks.build import NetworkName, build_network
from fairdiff_lightning.networks.checkpoint import LoadReport, Source, check_state_dict, describe, read_state_dict

OVERLAP, SURFACES = ("dice", "iou"), ("hd95", "assd", "nsd")
EVERYONE = "everyone"
"""Table of scores of a module without attributes."""


class Segmenter(LightningModule):
    """Semantic segmentation with Dice and IoU for every group of every attribute.

    Args:
        network: by name, see :func:`~fairdiff_lightning.networks.build.build_network`: TransUNets (``vit_b16``,
            ``r50_vit_b16``, ``tiny``), ``resunet3d``, ``samed``, or one of MONAI's.
        network_args: further arguments of the network.
        num_classes: number of classes, the background included.
        in_channels: channels of the image.
        image_size: side, or height and width (and depth, of volumes), of what the network sees, pixels or voxels; None
            means ``roi_size``.
        num_groups: attribute -> number of its groups; metrics are logged for each.
        attribute: the attribute that the loss, the routing and the choice of the best checkpoint look at; the first of
            ``num_groups`` when None.
        loss: ``dice_ce``, ``febs`` (FairSeg's fair error-bound scaling of the Dice term) or ``focal``.
        ce_weight: weight of the cross-entropy.
        dice_weight: weight of the Dice term.
        dice_background: whether the Dice term of ``dice_ce`` counts the background as a class.
        gamma: exponent of the FEBS weights.
        empty: Dice and IoU of a class that the truth lacks, see
            :func:`~fairdiff_lightning.metrics.functional.dice_score`; ``reference`` is the papers' code.
        inference: ``whole`` images, or ``sliding`` windows of ``roi_size`` blended by a Gaussian.
        roi_size: side, or height and width (and depth), of a window.
        overlap: share of a window that the next one covers again.
        window_batch_size: windows that are segmented at a time, of one image or several; the result is the same.
        mirror: axes of the image, 0 for H, along which it is also mirrored when not training; the logits are averaged.
        surface_metrics: also measure the Hausdorff distance (95 %), the average symmetric surface distance and the
            surface Dice in tests: in mm where the data tell a spacing, else in pixels.
        tolerance: of the surface Dice, in the same unit.
        reference_behaviour: score empty masks (``empty="reference"``) and weigh absent and unknown groups (FEBS) as the
            papers' code does.
        init_from: checkpoint (ours) whose network weights the first training starts from.
        compile: compile the network in place before the first step.
        optimizer: built on the trainable parameters.
        lr_scheduler: built on the optimizer; one of :mod:`~fairdiff_lightning.modules.schedules` learns the run's
            length by itself.
        lr_interval: when the scheduler steps.
        monitor: logged value that ``best.ckpt`` is chosen by, ``val/loss`` the lowest, others the highest; None for
            ``val/es_dice/<attribute>``, without an attribute ``val/dice``.

    Shapes:
        image (B, C, H, W[, D]) in [0, 1]; mask (B, 1, H, W[, D]) class indices; logits (B, K, H, W[, D]).

    Logs:
        ``train/loss``; and for val and test ``loss``, ``dice``, ``iou`` (mean over images, then over the foreground
        classes), ``dice/class_<k>``, and for each attribute ``es_dice/<attribute>``, ``es_iou/<attribute>``,
        ``worst_dice/<attribute>``, ``gap_dice/<attribute>`` and ``dice/<attribute>/<group>``; ``hd95``, ``assd`` and
        ``nsd`` in tests when asked for.
    """

    def __init__(
        self,
        network: NetworkName = "tiny",
        network_args: dict[str, Any] | None = None,
        num_classes: int = 2,
        in_channels: int = 3,
        image_size: int | tuple[int, int] | tuple[int, int, int] | None = 224,
        num_groups: dict[str, int] | None = None,
        attribute: str | None = None,
        loss: Literal["dice_ce", "febs", "focal"] = "dice_ce",
        ce_weight: float = 0.5,
        dice_weight: float = 0.5,
        dice_background: bool = True,
        gamma: float = 1.0,
        empty: EmptyPolicy = "skip",
        inference: Literal["whole", "sliding"] = "whole",
        roi_size: int | tuple[int, int] | tuple[int, int, int] = 224,
        overlap: float = 0.5,
        window_batch_size: int = 4,
        mirror: tuple[int, ...] = (),
        surface_metrics: bool = False,
        tolerance: float = 5.0,
        reference_behaviour: bool = False,
        init_from: str | None = None,
        compile: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["step", "epoch"] = "step",
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.empty: EmptyPolicy = "reference" if reference_behaviour else empty
        self.num_groups = dict(num_groups or {})
        self.attribute = chosen_attribute(attribute, self.num_groups, needed=loss == "febs")
        self.network = build_network(
            network, in_channels, num_classes, image_size or roi_size, self.network_arguments()
        )
        self.loss = self._make_loss()
        surfaces = SURFACES if surface_metrics else ()
        self.tables = nn.ModuleDict(
            {"val": self._make_tables(OVERLAP), "test": self._make_tables((*OVERLAP, *surfaces))}
        )
        self._init_from = init_from

    @property
    def monitor(self) -> str:
        """The logged value that the best checkpoint is chosen by."""
        return self.hparams["monitor"] or (f"val/es_dice/{self.attribute}" if self.attribute else "val/dice")

    @property
    def monitor_mode(self) -> Literal["min", "max"]:
        """Whether the best is the lowest or the highest."""
        return "min" if self.monitor.endswith("loss") else "max"

    def network_arguments(self) -> dict[str, Any]:
        """Arguments of the network beside its name, classes, channels and size."""
        return dict(self.hparams["network_args"] or {})

    def setup(self, stage: str) -> None:
        """Check that the data are what the network was built for, load what training starts from, and compile."""
        facts = {name: self.hparams[name] for name in ("num_classes", "in_channels")}
        check_data(getattr(self.trainer, "datamodule", None), self.num_groups, **facts)
        if stage == "fit" and self._init_from is not None:
            self.load_network(self._init_from)
            self._init_from = None
        if self.hparams["compile"]:
            self.network.compile()

    def forward(self, image: Tensor, group: Tensor | None = None) -> Tensor:
        """Logits (B, K, H, W); a plain network does not look at the group."""
        logits: Tensor = self.network(image)
        return logits

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Named loss terms of a batch; ``loss`` is what is minimised.

        A batch with ``partner`` passes twice, since norms of batches must see real and synthetic images apart, and the
        logits are merged by ``keep_real`` (DiffBoost's code).
        """
        group = self.group(batch)
        logits = self(batch["image"], group)
        if "partner" in batch:
            logits = torch.where(batch["keep_real"], logits, self(batch["partner"], group))
        return {"loss": self.objective(logits, batch)}

    def objective(self, logits: Tensor, batch: Sample) -> Tensor:
        """The segmentation loss of the logits, a scalar."""
        arguments = (logits, batch["mask"])
        loss: Tensor = (
            self.loss(*arguments, self.group(batch)) if isinstance(self.loss, FEBSLoss) else self.loss(*arguments)
        )
        return loss

    def group(self, batch: Sample) -> Tensor | None:
        """Group indices (B,) of the module's attribute, None when it looks at no attribute."""
        return batch["attributes"][self.attribute] if self.attribute else None

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """One step on a batch of the contract."""
        losses = self.losses(batch)
        named = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict(named, prog_bar=True, batch_size=len(batch["image"]))
        return losses["loss"]

    def validation_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        """Scores of a batch; also what pictures are made of."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        """Scores of a batch, at the files' own size when the data module gives the masks at it."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        """Masks (1, H, W) of class indices, at the files' own sizes when the batch tells them, with their ids."""
        return {"id": batch["id"], "mask": self._decide(self.infer(batch, "predict"), batch)}

    def infer(self, batch: Sample, stage: str) -> Tensor:
        """Logits of a batch by the chosen inference, averaged over the mirrored images that are asked for."""
        axes = [axis + 2 for axis in self.hparams["mirror"]]
        mirrored = [list(some) for count in range(1, len(axes) + 1) for some in combinations(axes, count)]
        logits = self._infer_upright(batch, stage)
        if not mirrored:
            return logits
        total = logits.to(torch.promote_types(logits.dtype, torch.float32))
        for some in mirrored:
            total = total + self._infer(batch["image"].flip(some), self.group(batch)).flip(some)
        return total / (len(mirrored) + 1)

    def _infer_upright(self, batch: Sample, stage: str) -> Tensor:
        """Logits of a batch that is not mirrored."""
        return self._infer(batch["image"], self.group(batch))

    def _infer(self, image: Tensor, group: Tensor | None) -> Tensor:
        """Logits of images; every window knows the group of its image."""
        h = self.hparams
        if h["inference"] == "whole":
            return self.forward(image, group)
        return slide(self.forward, image, group, h["roi_size"], h["overlap"], h["window_batch_size"])

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the epoch."""
        self._log_tables("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test."""
        self._log_tables("test")

    def configure_optimizers(self) -> Any:
        """The optimizer on what is trainable, and its schedule."""
        return configure(self, self.optimizer, self.lr_scheduler, self.hparams["lr_interval"], self.monitor)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say by name what does not fit when the checkpoint is of another architecture."""
        check_state_dict(checkpoint["state_dict"], self.state_dict(), "checkpoint")

    def load_network(self, source: Source) -> None:
        """Load the network's weights from a checkpoint of any of our segmentation modules, strictly.

        Raises:
            CheckpointMismatchError: naming every missing, unexpected or misshapen tensor.
        """
        state = read_state_dict(source)
        weights = {name.removeprefix("network."): w for name, w in state.items() if name.startswith("network.")}
        check_state_dict(weights, self.network.state_dict(), describe(source))
        self.network.load_state_dict(weights)

    def load_reference_weights(self, source: Source) -> LoadReport:
        """Load the checkpoint that the paper's authors publish; see the network's own method."""
        load = getattr(self.network, "load_reference_weights", None)
        if load is None:
            raise TypeError(f"the authors published no weights for network {self.hparams['network']!r}.")
        return cast(LoadReport, load(source))

    def _decide(self, logits: Tensor, batch: Sample) -> Tensor | list[Tensor]:
        if "native_affine" in batch:
            return restore_volumes(logits, batch["affine"], batch["native_affine"], batch["native_size"])
        if "region" in batch:
            return restore_mask(logits, batch["region"], batch["native_size"])
        return logits.argmax(1, keepdim=True)

    def _evaluate(self, batch: Sample, stage: str) -> dict[str, Any]:
        logits = self.infer(batch, stage)
        self.log(f"{stage}/loss", self.objective(logits, batch), batch_size=len(batch["image"]), sync_dist=True)
        prediction, truth = self._decide(logits, batch), batch.get("native_mask", batch["mask"])
        surfaces = stage == "test" and self.hparams["surface_metrics"]
        scores = self._scores(prediction, truth, _spacings(batch) if surfaces else None)
        everyone = torch.zeros(len(batch["image"]), dtype=torch.int64, device=self.device)
        for name, tables in self._stage_tables(stage).items():
            for attribute, table in tables.items():
                table.update(scores[name], batch["attributes"][attribute] if attribute != EVERYONE else everyone)
        return {"prediction": prediction, **scores}

    def _scores(
        self,
        prediction: Tensor | list[Tensor],
        truth: Tensor | list[Tensor],
        spacings: Sequence[Sequence[float] | None] | None = None,
    ) -> dict[str, Tensor]:
        """Scores (B, K - 1) of each image, by name; of surfaces where spacings are given, with these."""
        num_classes, unequal = self.hparams["num_classes"], not isinstance(prediction, Tensor)
        if unequal or not isinstance(truth, Tensor) or (spacings and any(s != spacings[0] for s in spacings)):
            rows = [
                self._scores(p[None], t[None], None if spacings is None else [spacings[i]])
                for i, (p, t) in enumerate(zip(prediction, truth, strict=True))
            ]
            return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        pred = cast(Tensor, prediction)
        dice = dice_score(pred, truth, num_classes, self.empty)
        scores = {"dice": dice, "iou": dice / (2 - dice)}
        if spacings:
            policy: SurfaceEmptyPolicy = "reference" if self.empty == "reference" else "skip"
            found = surface_scores(pred, truth, num_classes, spacings[0], self.hparams["tolerance"], policy)
            measured = (found.hausdorff95, found.symmetric_distance, found.surface_dice)
            scores |= dict(zip(SURFACES, measured, strict=True))
        return scores

    def _stage_tables(self, stage: str) -> dict[str, dict[str, GroupedScores]]:
        return cast(dict[str, dict[str, GroupedScores]], self.tables[stage])

    def _log_tables(self, stage: str) -> None:
        names = getattr(getattr(self.trainer, "datamodule", None), "attribute_groups", {})
        values: dict[str, Tensor] = {}
        for metric, tables in self._stage_tables(stage).items():
            for attribute, table in tables.items():
                result = table.compute()
                overall, groups = result["overall"], result["group"]
                values[f"{stage}/{metric}"] = result["mean"]
                values |= {f"{stage}/{metric}/class_{c + 1}": value for c, value in enumerate(overall)}
                if attribute != EVERYONE:
                    values[f"{stage}/gap_{metric}/{attribute}"] = result["max_gap"]
                    if metric in OVERLAP:
                        values[f"{stage}/es_{metric}/{attribute}"] = equity_scaled(overall, groups).nanmean()
                        values[f"{stage}/worst_{metric}/{attribute}"] = result["worst_group"]
                    labels = names.get(attribute, range(len(groups)))
                    means = zip(labels, groups.nanmean(1), strict=True)
                    values |= {f"{stage}/{metric}/{attribute}/{label}": mean for label, mean in means}
                table.reset()
        self.log_dict(values, sync_dist=True)

    def _make_loss(self) -> nn.Module:
        h = self.hparams
        if h["loss"] == "febs":
            num_groups, weights = self.num_groups[str(self.attribute)], (h["ce_weight"], h["dice_weight"])
            return FEBSLoss(num_groups, h["gamma"], *weights, reference_behaviour=h["reference_behaviour"])
        if h["loss"] == "focal":
            return FocalLoss()
        return dice_ce_loss(h["ce_weight"], h["dice_weight"], h["dice_background"])

    def _make_tables(self, metrics: Sequence[str]) -> nn.ModuleDict:
        groups, classes = self.num_groups or {EVERYONE: 1}, self.hparams["num_classes"]
        return nn.ModuleDict(
            {name: nn.ModuleDict({a: GroupedScores(classes, n) for a, n in groups.items()}) for name in metrics}
        )


def _spacings(batch: Sample) -> list[Sequence[float] | None]:
    """Size of a voxel of what is scored, for each sample; None where the data do not tell it."""
    affine = batch.get("native_affine", batch.get("affine"))
    if affine is None:
        return [None] * len(batch["id"])
    spacings: list[Sequence[float] | None] = list(affine[:, :3, :3].norm(dim=1).round(decimals=4).tolist())
    return spacings
