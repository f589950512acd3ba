"""FairDiff's first stage: outlines of nested structures as point clouds, generated for a group and filled to masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from fairdiff_lightning.data.sample import UNKNOWN, Sample
from fairdiff_lightning.data.seeding import derive_seed
from fairdiff_lightning.diffusion import (
    add_noise,
    build_scheduler,
    build_training_scheduler,
    gaussian,
    timesteps,
    training_target,
)
from fairdiff_lightning.geometry import DISC_AND_CUP, StructureSpec, points_to_masks
from fairdiff_lightning.geometry.filling import DecodeMethod
from fairdiff_lightning.metrics.generation import generation_scores
from fairdiff_lightning.modules.cloud_sampling import (
    Decoded,
    UndecodableCloudError,
    decode_each,
    draw_clouds,
    draw_masks,
)
from fairdiff_lightning.modules.data_facts import check_data, check_requests, chosen_attribute, group_of
from fairdiff_lightning.modules.generative import GenerativeModule
from fairdiff_lightning.networks.checkpoint import LoadReport, Source, check_state_dict, describe, read_state_dict
from fairdiff_lightning.networks.cloud_statistics import CloudStatistics
from fairdiff_lightning.networks.point_vae import PointVAE, gaussian_entropy

NOISE = {"num_train_timesteps": 100, "clip_sample": False, "timestep_spacing": "trailing"}
TERMINAL_NOISE: dict[str, dict[str, Any]] = {
    "reference": {"prediction_type": "epsilon"},
    "zero": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},  # noise alone tells no noise apart
}
TAG = 5.0
"""Third coordinate of the innermost structure's points."""


class PointDiffusion(GenerativeModule):
    """Generates masks as clouds of outline points: a PointNet VAE whose decoder is a diffusion of single points.

    Li et al., *FairDiff: Fair Segmentation with Point-Image Diffusion*, MICCAI 2024, arXiv:2407.06250, stage 1.

    Args:
        num_classes: classes of the mask, the background included: one structure inside the other, outermost first.
        image_size: side, or height and width, of the frame that the points lie in, pixels; masks are made at this size.
        num_points: N, points of a cloud.
        num_groups: attribute -> number of its groups.
        attribute: whose groups are generated; the first of ``num_groups`` when None.
        conditional: one model for all groups of the attribute. False looks at no attribute: with the data module's
            ``groups``, one model for a group.
        unknown_share: share of the training samples whose group is hidden, so that samples without a group can be made.
        kl_weight: weight of the entropy and prior terms.
        normalization: ``per_axis`` statistics, the tag at -1 to 1, or the ``reference``'s one deviation for all axes.
        terminal_snr: ``zero`` ends the noising in noise alone, which sampling starts from; ``reference`` does not.
        time: what tells the denoiser the step: twice the ``angle`` whose sine and cosine are the shares of noise and
            signal, from 0 to pi, or the value of ``beta``.
        scheduler: diffusers scheduler of the training noise (variance-preserving).
        scheduler_args: its arguments, which win over those that ``terminal_snr`` implies.
        sampler: diffusers scheduler that samples along the same noise.
        sampler_args: its arguments.
        num_steps: steps of the sampler.
        decoder: how points become masks, see :func:`~fairdiff_lightning.geometry.points_to_mask`.
        reference_behaviour: restore what the table below says.
        num_validation_samples: clouds that each validation generates, over all devices, and compares with as many
            held-out ones of the same groups.
        compile: compile the network in place before the first step; sampling does not use it.
        optimizer: built on the trainable parameters; Adam with lr 2e-3 in the authors' code.
        lr_scheduler: built on the optimizer; one of :mod:`~fairdiff_lightning.modules.schedules` learns the run's
            length by itself.
        lr_interval: when the scheduler steps.

    Shapes:
        points (B, N, 3): row, column (pixels) and tag; group (B,) integers, -1 when unknown; mask (B, 1, H, W).

    Logs:
        ``train/`` and ``val/`` ``loss``, ``noise``, ``entropy`` and ``prior``; and of the validation's clouds, in
        normalised coordinates, ``val/mmd``, ``val/coverage``, ``val/1nna`` and ``val/nearest_real`` (chamfer).

    Differences from the reference:
        ==================  =============================  =============================  ===========================
        What                Reference code                 Here                           To restore
        ==================  =============================  =============================  ===========================
        end of the noising  36 % of the signal's power     noise alone, velocity is       ``terminal_snr``
                            is left, noise is predicted    predicted
        step                value of beta, below 0.02,     angle, 0 to pi                 ``time``
                            which hardly tells steps
                            apart
        normalisation       one deviation squeezes the     per axis, tag at +-1           ``normalization``
                            tag into a band of 0.05
        statistics          a file that outlives its data  in the checkpoint              not offered
        prior's constant    added 256 times, loss 6 too    added once                     ``reference_behaviour``
                            high
        groups              a model for each               one model, conditional         ``conditional: false`` and
                                                                                          the data's ``groups``
        sampling            100 ancestral steps            20 steps, second order         ``sampler``, ``num_steps``
        random numbers      one global stream              the sample's own seed          not offered
        precision           float32                        the network samples in         not offered
                                                           float64: the same masks in
                                                           any batch
        decoding            closing, masks 3-5 % too       polygon                        ``decoder: closing``
                            large
        broken outlines     a mask without the structure   drawn again                    ``decoder: closing``
        validation          none                           scores against held-out        ``num_validation_samples``
        ==================  =============================  =============================  ===========================

        ``reference_behaviour=True`` restores all that can be but the groups.
    """

    times: Tensor

    def __init__(
        self,
        num_classes: int = 3,
        image_size: int | tuple[int, int] | None = 512,
        num_points: int = 512,
        num_groups: dict[str, int] | None = None,
        attribute: str | None = None,
        conditional: bool = True,
        unknown_share: float = 0.1,
        kl_weight: float = 1e-4,
        normalization: Literal["per_axis", "reference"] = "per_axis",
        terminal_snr: Literal["zero", "reference"] = "zero",
        time: Literal["angle", "beta"] = "angle",
        scheduler: str = "DDPMScheduler",
        scheduler_args: dict[str, Any] | None = None,
        sampler: str = "DPMSolverMultistepScheduler",
        sampler_args: dict[str, Any] | None = None,
        num_steps: int = 20,
        decoder: DecodeMethod = "polygon",
        reference_behaviour: bool = False,
        num_validation_samples: int = 32,
        compile: bool = False,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["step", "epoch"] = "step",
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_interval, num_validation_samples)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if image_size is None:
            raise ValueError("image_size is None: set --data.image_size, the frame that points and masks lie in.")
        if reference_behaviour:
            normalization, terminal_snr, time, decoder = "reference", "reference", "beta", "closing"
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.structures = _structures(num_classes)
        if decoder == "closing" and len(self.structures) != 2:
            raise ValueError(
                f"num_classes={num_classes}: decoder='closing', which reference_behaviour takes too, is FairDiff's own "
                "for a disc and a cup, 3 classes with the background. Set decoder='polygon', no reference_behaviour."
            )
        self.num_points, self.kl_weight, self.unknown_share = num_points, kl_weight, unknown_share
        self.time = time
        self.decoder: DecodeMethod = decoder
        noise = build_scheduler("DDPMScheduler", NOISE | TERMINAL_NOISE[terminal_snr])
        self.scheduler = build_training_scheduler(scheduler, scheduler_args, like=noise)
        self.sampler, self.num_steps = sampler, num_steps
        if reference_behaviour:
            self.sampler, self.num_steps = "DDPMScheduler", len(self.scheduler.betas)
        self.num_groups = dict(num_groups or {})
        self.attribute = chosen_attribute(attribute, self.num_groups) if conditional else None
        groups = self.num_groups[self.attribute] if self.attribute else 0
        self.network = PointVAE(groups)
        self.monitor = "val/mmd" if num_validation_samples else "val/loss"
        self._compared: list[tuple[Tensor, Tensor]] = []
        self.register_buffer("times", self._step_times().float(), persistent=False)
        self.statistics = CloudStatistics(self.image_size, TAG, groups, self.attribute, normalization)

    def setup(self, stage: str) -> None:
        """Check that the data are what the module was built for, and compile."""
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"precision={self.trainer.precision}: half precision has no room for coordinates of hundreds of pixels "
                "and their statistics. Use bf16-mixed (or 16-mixed), which rounds the network's products alone."
            )
        self._check_data(getattr(self.trainer, "datamodule", None), stage)
        if self.hparams["compile"]:
            for part in (self.network.encoder, self.network.flow, self.network.denoiser):
                part.compile()

    def on_fit_start(self) -> None:
        """Measure and count the training clouds, unless a checkpoint has brought that."""
        if not self.statistics.complete:
            self.trainer.fit_loop.setup_data()
            loader = cast(Iterable[Sample], self.trainer.train_dataloader)
            self.measure(loader, count_only=bool(self.statistics.measured))

    def measure(self, batches: Iterable[Sample], count_only: bool = False) -> None:
        """Set the statistics to those of all clouds of the batches, over all devices.

        Args:
            batches: with ``points``, and the attribute of a conditional model.
            count_only: count the groups' clouds, and leave the normalisation as it is.
        """
        clouds = ((self._checked_points(batch), self._known_group(batch)) for batch in batches)
        if self._trainer is None or self.trainer.world_size == 1:
            self.statistics.measure(clouds, count_only=count_only)
        else:
            device, reduce = self.trainer.strategy.root_device, self.trainer.strategy.reduce
            self.statistics.measure(
                clouds, lambda sums: cast(Tensor, reduce(sums.to(device), reduce_op="sum")), count_only
            )

    def forward(self, points: Tensor, steps: Tensor, latent: Tensor, group: Tensor | None = None) -> Tensor:
        """What the diffusion predicts (B, N, 3) for normalised noisy points at their steps (B,), from 0 on."""
        prediction: Tensor = self.network(points, self.times[steps], latent, group)
        return prediction

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Terms of the bound on a batch's likelihood; the noise term is a mean over points, as in the reference."""
        draws = self.draws(batch)
        points, group = self.statistics.normalize(self._checked_points(batch)), self.group(batch)
        mean, log_variance = (code.to(points.dtype) for code in self.network.encode(points))  # from autocast
        latent = mean + (0.5 * log_variance).exp() * gaussian(mean, draws)
        steps, noise = timesteps(points, len(self.times), draws), gaussian(points, draws)
        prediction = self(add_noise(self.scheduler, points, noise, steps), steps, latent, group)
        target = training_target(self.scheduler, points, noise, steps)
        return self.objective(prediction, target, log_variance, self.network.log_prior(latent, group))

    def objective(
        self, prediction: Tensor, target: Tensor, log_variance: Tensor, log_prior: Tensor
    ) -> dict[str, Tensor]:
        """The loss and its terms.

        Args:
            prediction: of the denoiser (B, N, 3).
            target: what it should have been.
            log_variance: of the latent codes (B, D).
            log_prior: log-density (B,) of the latent codes.
        """
        terms = {
            "noise": F.mse_loss(prediction, target),
            "entropy": -gaussian_entropy(log_variance).mean(),
            "prior": -log_prior.mean(),
        }
        if self.hparams["reference_behaviour"]:
            dim = log_variance.shape[-1]
            terms["prior"] = terms["prior"] + (dim - 1) * 0.5 * dim * math.log(2 * math.pi)
        return {"loss": terms["noise"] + self.kl_weight * (terms["entropy"] + terms["prior"]), **terms}

    def group(self, batch: Sample) -> Tensor | None:
        """Group indices (B,) of a batch, some of them hidden while training; None for a model without groups."""
        if self.attribute is None:
            return None
        group = group_of(batch, self.attribute)
        if not self.training:
            return group
        return group.masked_fill(torch.rand(group.shape, device=group.device) < self.unknown_share, UNKNOWN)

    def sample(
        self,
        num: int,
        group: int | Sequence[int] | Tensor | None = None,
        seed: int = 0,
        num_steps: int | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Clouds (num, N, 3) in pixels, at work without a Trainer; cloud i depends on ``seed`` and i alone.

        Args:
            num: how many.
            group: index of the group of all or of each (num,); None is no group in particular.
            seed: of all.
            num_steps: steps of the sampler, the module's when None.
            batch_size: how many at a time.

        Raises:
            ValueError: for a group that the model does not know or that had no training cloud.
        """
        if num < 1 or batch_size < 1:
            raise ValueError(f"num and batch_size must be at least 1, but are {num} and {batch_size}.")
        groups = torch.as_tensor(UNKNOWN if group is None else group).expand(num)
        self.statistics.check_trained(groups)
        seeds = torch.tensor([derive_seed(seed, i) for i in range(num)])
        parts = [slice(i, i + batch_size) for i in range(0, num, batch_size)]
        return torch.cat([self.draw(seeds[part], groups[part], num_steps) for part in parts])

    def generate(self, requests: Sample) -> dict[str, Tensor]:
        """Masks (B, 1, H, W) and the points that outline them; a cloud that outlines none is drawn again.

        Raises:
            ValueError: for a group that the model does not know or that had no training cloud.
            UndecodableCloudError: when a request has had eight such clouds.
        """
        group = None if self.attribute is None else group_of(requests, self.attribute)
        if group is not None:
            self.statistics.check_trained(group)
        points, masks = draw_masks(self.draw, self._decode, requests["seed"], group, requests["id"])
        return {"mask": masks, "points": points}

    @torch.no_grad()
    def draw(self, seeds: Tensor, group: Tensor | None = None, num_steps: int | None = None) -> Tensor:
        """Clouds (B, N, 3) in pixels, each from its own seed (B,).

        See :func:`~fairdiff_lightning.modules.cloud_sampling.draw_clouds`.
        """
        steps = self.num_steps if num_steps is None else num_steps
        if not 1 <= steps <= len(self.times):
            raise ValueError(f"num_steps must lie between 1 and {len(self.times)}, but is {steps}.")
        sampler = build_scheduler(self.sampler, self.hparams["sampler_args"], like=self.scheduler)
        known = group if self.attribute else None
        points = draw_clouds(self.network, self.times, sampler, steps, self.num_points, seeds, known)
        return self.statistics.denormalize(points).float().to(self.device)

    def on_validation_epoch_start(self) -> None:
        """Forget the clouds of the validation before."""
        super().on_validation_epoch_start()
        self._compared = []

    def validation_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        """Losses and samples of a batch; groups that were not trained count as unknown."""
        batch = self._with_trained_groups(batch)
        try:
            output = super().validation_step(batch, batch_idx)
            points = None if output["generated"] is None else output["generated"]["points"]
        except UndecodableCloudError as error:
            rank_zero_warn(f"No picture of this validation: {error}")
            output, points = {"generated": None}, error.points
        if points is not None:
            held_out = batch["points"][: len(points)]
            self._compared.append((self.statistics.normalize(points), self.statistics.normalize(held_out)))
        return output

    def on_validation_epoch_end(self) -> None:
        """Log how the generated clouds compare with the held-out ones."""
        if not self._compared:
            return
        both = torch.stack([torch.cat(clouds) for clouds in zip(*self._compared, strict=True)], 1)
        generated, held_out = cast(Tensor, self.all_gather(both)).view(-1, *both.shape[1:]).unbind(1)
        scores = generation_scores(generated, held_out, "chamfer")
        self.log_dict({f"val/{name}": value for name, value in scores.items()}, sync_dist=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say by name what does not fit when the checkpoint is of another architecture."""
        super().on_load_checkpoint(checkpoint)
        check_state_dict(checkpoint["state_dict"], self.state_dict(), "checkpoint")

    def load_reference_weights(self, source: Source, statistics: Source | None = None) -> LoadReport:
        """Load a checkpoint of the authors' ``train.py``, strictly.

        Args:
            source: path or state dict of the network.
            statistics: their ``stats_<group>.pt``, path or mapping, with ``mean`` and ``std``, which the checkpoint
                lacks; without it, ``measure`` or training sets them.

        Raises:
            CheckpointMismatchError: naming every tensor that does not fit; nothing is loaded then.
            ValueError: when this module does not predict noise along the checkpoint's schedule.
        """
        if self.scheduler.config.prediction_type != "epsilon" or self.time != "beta":
            raise ValueError(
                "the authors' weights predict noise, given beta, along a schedule that ends before noise alone: build "
                "the module with reference_behaviour=True, or with terminal_snr='reference' and time='beta'."
            )
        numbers = None if statistics is None else read_state_dict(statistics)
        if statistics is not None and numbers is not None:
            expected = {"mean": self.statistics.shift[None], "std": self.statistics.scale[:1]}
            check_state_dict(numbers, expected, describe(statistics))
        report = self.network.load_reference_weights(source, self.scheduler.betas)
        if numbers is not None:
            self.statistics.set(numbers["mean"][0], numbers["std"])
        return report

    def _step_times(self) -> Tensor:
        """What the denoiser is told about each step (T,)."""
        if self.time == "beta":
            return cast(Tensor, self.scheduler.betas)
        return cast(Tensor, 2 * (1 - self.scheduler.alphas_cumprod).sqrt().arcsin())

    def _decode(self, points: Tensor) -> Decoded:
        size, method = self.image_size, self.decoder
        decode = partial(points_to_masks, size=size, method=method, z=TAG, structures=self.structures)
        return decode_each(points, decode, size)

    def _known_group(self, batch: Sample) -> Tensor:
        return group_of(batch, self.attribute) if self.attribute else torch.full((len(batch["id"]),), UNKNOWN)

    def _with_trained_groups(self, batch: Sample) -> Sample:
        if self.attribute is None:
            return batch
        trained = self.statistics.trained(group_of(batch, self.attribute))
        return cast(Sample, {**batch, "attributes": {**batch["attributes"], self.attribute: trained}})

    def _checked_points(self, batch: Sample) -> Tensor:
        if "points" not in batch:
            raise ValueError(f"the batch has {sorted(batch)} but no 'points': set --data.num_points={self.num_points}.")
        points = batch["points"]
        if points.shape[1:] != (self.num_points, 3):
            raise ValueError(
                f"the batch's points have shape {tuple(points.shape)}, but the module's are (B, {self.num_points}, 3)."
            )
        return points

    def _check_data(self, data: Any, stage: str) -> None:
        if stage != "predict" and hasattr(data, "num_points") and data.num_points != self.num_points:
            raise ValueError(
                f"{type(data).__name__}.num_points is {data.num_points}, the module's is {self.num_points}: set "
                f"--data.num_points={self.num_points}, or the module's to the data's."
            )
        if stage == "predict":
            check_requests(data, self.attribute)
        groups = {self.attribute: self.num_groups[self.attribute]} if self.attribute else {}
        check_data(data, groups, num_classes=len(self.structures) + 1, image_size=self.image_size)


def _structures(num_classes: int) -> StructureSpec:
    if num_classes == len(DISC_AND_CUP) + 1:
        return DISC_AND_CUP
    return StructureSpec(tuple(f"structure {k}" for k in range(1, num_classes)))
