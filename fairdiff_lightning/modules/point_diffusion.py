"""FairDiff's first stage: outlines of nested structures as point clouds, generated for a group and filled to masks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from fairdiff_lightning.data.sample import UNKNOWN, Sample
from fairdiff_lightning.data.seeding import derive_seed
from fairdiff_lightning.diffusion import build_scheduler, gaussian, generators, timesteps, training_target
from fairdiff_lightning.geometry import DISC_AND_CUP, StructureSpec, points_to_mask, points_to_masks
from fairdiff_lightning.geometry.filling import DecodeMethod
from fairdiff_lightning.metrics.generation import generation_scores
from fairdiff_lightning.modules.data_facts import check_data, chosen_attribute
from fairdiff_lightning.modules.generative import GenerativeModule
from fairdiff_lightning.networks.checkpoint import LoadReport, Source, check_state_dict, describe, read_state_dict
from fairdiff_lightning.networks.point_vae import LATENT_DIM, PointVAE, gaussian_entropy

NOISE = {"num_train_timesteps": 100, "clip_sample": False, "timestep_spacing": "trailing"}
TERMINAL_NOISE: dict[str, dict[str, Any]] = {
    "reference": {"prediction_type": "epsilon"},
    "zero": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},  # noise alone tells no noise apart
}
TAG = 5.0
"""Third coordinate of the innermost structure's points."""
MAX_DRAWS = 8
"""Clouds that are drawn for a request before it is given up."""


class UndecodableCloudError(ValueError):
    """Generated clouds that outline no mask.

    Args:
        message: which, and why.
        points: all clouds (B, N, 3) of the batch, in pixels.
    """

    def __init__(self, message: str, points: Tensor) -> None:
        super().__init__(message)
        self.points = points


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
        scheduler: diffusers scheduler of the training noise.
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
        precision           float32                        float64 while sampling: the    not offered
                                                           same masks in any batch
        decoding            closing, masks 3-5 % too       polygon                        ``decoder: closing``
                            large
        broken outlines     a mask without the structure   drawn again                    ``decoder: closing``
        validation          none                           scores against held-out        ``num_validation_samples``
        ==================  =============================  =============================  ===========================

        ``reference_behaviour=True`` restores all that can be but the groups.
    """

    shift: Tensor
    scale: Tensor
    measured: Tensor
    num_clouds: Tensor
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
        self.num_points, self.kl_weight, self.unknown_share = num_points, kl_weight, unknown_share
        self.normalization, self.terminal_snr = normalization, terminal_snr
        self.decoder: DecodeMethod = decoder
        noise = build_scheduler("DDPMScheduler", NOISE | TERMINAL_NOISE[terminal_snr])
        self.scheduler = build_scheduler(scheduler, scheduler_args, like=noise)
        self.sampler, self.num_steps = sampler, num_steps
        if reference_behaviour:
            self.sampler, self.num_steps = "DDPMScheduler", len(self.scheduler.betas)
        self.num_groups = dict(num_groups or {})
        self.attribute = chosen_attribute(attribute, self.num_groups) if conditional else None
        groups = self.num_groups[self.attribute] if self.attribute else 0
        self.network = PointVAE(groups)
        self.monitor = "val/mmd" if num_validation_samples else "val/loss"
        self._compared: list[tuple[Tensor, Tensor]] = []
        self.register_buffer("times", self._step_times(time), persistent=False)
        height, width = self.image_size  # before the statistics are measured: the middle of the frame
        self.register_buffer("shift", torch.tensor([(height - 1) / 2, (width - 1) / 2, 0.0]))
        self.register_buffer("scale", torch.tensor([height / 8, width / 8, TAG]))
        self.register_buffer("measured", torch.tensor(False))
        self.register_buffer("num_clouds", torch.zeros(groups + 1, dtype=torch.int64))

    def setup(self, stage: str) -> None:
        """Check that the data are what the module was built for, and compile."""
        self._check_data(getattr(self.trainer, "datamodule", None), stage)
        if self.hparams["compile"]:
            for part in (self.network.encoder, self.network.flow, self.network.denoiser):
                part.compile()

    def on_fit_start(self) -> None:
        """Measure the training clouds' statistics, unless a checkpoint has brought them."""
        if bool(self.measured):
            return
        self.trainer.fit_loop.setup_data()
        self.measure(cast(Iterable[Sample], self.trainer.train_dataloader))

    def measure(self, batches: Iterable[Sample]) -> None:
        """Set the statistics that normalise points to those of all clouds of the batches, over all devices."""
        sums = torch.zeros(3, 3, dtype=torch.float64)  # count, sum and sum of squares of each axis
        counts = torch.zeros_like(self.num_clouds, device="cpu")
        for batch in batches:
            points = self._checked_points(batch).double().cpu()
            sums += torch.stack([torch.full_like(points, 1), points, points.square()]).sum((1, 2))
            group = self._group_of(batch).cpu() if self.attribute else torch.full((len(points),), UNKNOWN)
            self._check_known(group)
            counts += torch.bincount(group.where(group != UNKNOWN, len(counts) - 1), minlength=len(counts))
        if self._trainer is not None and self.trainer.world_size > 1:
            device = self.trainer.strategy.root_device
            sums, counts = (self.trainer.strategy.reduce(x.to(device), reduce_op="sum") for x in (sums, counts))
        if self.normalization == "reference":
            shift = sums[1] / sums[0]
            sums = sums.sum(1, keepdim=True).expand(3, 3)
        mean = sums[1] / sums[0]
        scale = ((sums[2] - sums[0] * mean.square()) / (sums[0] - 1)).sqrt()
        if self.normalization == "per_axis":
            shift = torch.cat([mean[:2], mean.new_zeros(1)])
            scale = torch.cat([scale[:2], scale.new_tensor([TAG])])
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        self.num_clouds.copy_(counts)
        self.measured.fill_(True)

    def normalize(self, points: Tensor) -> Tensor:
        """Points in pixels (..., 3) to what the network sees."""
        return (points - self.shift) / self.scale

    def denormalize(self, points: Tensor) -> Tensor:
        """What the network sees (..., 3) to points in pixels."""
        shift, scale = self.shift.to(points.device), self.scale.to(points.device)
        return points * scale.to(points.dtype) + shift.to(points.dtype)

    def forward(self, points: Tensor, steps: Tensor, latent: Tensor, group: Tensor | None = None) -> Tensor:
        """What the diffusion predicts (B, N, 3) for normalised noisy points at their steps (B,), from 0 on."""
        prediction: Tensor = self.network(points, self.times[steps], latent, group)
        return prediction

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Terms of the bound on a batch's likelihood; the noise term is a mean over points, as in the reference."""
        draws = generators(batch["seed"]) if "seed" in batch else None
        points, group = self.normalize(self._checked_points(batch)), self.group(batch)
        mean, log_variance = (code.to(points.dtype) for code in self.network.encode(points))  # from autocast
        latent = mean + (0.5 * log_variance).exp() * gaussian(mean, draws)
        steps, noise = timesteps(points, len(self.times), draws), gaussian(points, draws)
        prediction = self(self.scheduler.add_noise(points, noise, steps), steps, latent, group)
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
        group = self._group_of(batch)
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
        self._check_groups(groups)
        seeds = torch.tensor([derive_seed(seed, i) for i in range(num)])
        parts = [slice(i, i + batch_size) for i in range(0, num, batch_size)]
        return torch.cat([self.draw(seeds[part], groups[part], num_steps) for part in parts])

    def generate(self, requests: Sample) -> dict[str, Tensor]:
        """Masks (B, 1, H, W) and the points that outline them; a cloud that outlines none is drawn again.

        Raises:
            ValueError: for a group that the model does not know or that had no training cloud.
            UndecodableCloudError: when a request has had eight such clouds.
        """
        seeds, group = requests["seed"], self._group_of(requests) if self.attribute else None
        if group is not None:
            self._check_groups(group)
        points = self.draw(seeds, group)
        masks, errors = self._decode(points)
        for attempt in range(1, MAX_DRAWS):
            if not errors:
                break
            failed = torch.tensor(list(errors), device=points.device)
            again = torch.tensor([derive_seed(int(seeds[i]), attempt) for i in errors])
            points[failed] = self.draw(again, None if group is None else group[failed.to(group.device)])
            masks[failed], remaining = self._decode(points[failed])
            errors = {int(failed[i]): error for i, error in remaining.items()}
        if errors:
            names = ", ".join(repr(requests["id"][i]) for i in errors)
            raise UndecodableCloudError(
                f"no mask for {len(errors)} of {len(points)} requests ({names}): {MAX_DRAWS} clouds of each outline "
                f"none, the last because: {next(iter(errors.values()))} Train longer, or raise num_steps.",
                points,
            )
        return {"mask": masks, "points": points}

    @torch.no_grad()
    def draw(self, seeds: Tensor, group: Tensor | None = None, num_steps: int | None = None) -> Tensor:
        """Clouds (B, N, 3) in pixels, each from its own seed (B,).

        The chain runs in float64: what rounding does to a sum of float32 depends on the size of the batch, and could
        move a pixel across an outline.
        """
        steps = self.num_steps if num_steps is None else num_steps
        if not 1 <= steps <= len(self.times):
            raise ValueError(f"num_steps must lie between 1 and {len(self.times)}, but is {steps}.")
        device = torch.device("cpu") if self.device.type == "mps" else self.device  # which has no float64
        network = deepcopy(self.network).to(device).double()
        group = group.to(device) if group is not None and self.attribute else None
        sampler = build_scheduler(self.sampler, self.hparams["sampler_args"], like=self.scheduler)
        sampler.set_timesteps(steps)
        draws = generators(seeds)
        stochastic = {"generator": draws} if "generator" in inspect.signature(sampler.step).parameters else {}
        with torch.autocast(device.type, enabled=False):
            code = torch.empty(len(seeds), LATENT_DIM, dtype=torch.float64, device=device)
            latent = network.draw_latent(gaussian(code, draws), group)
            points = gaussian(code.new_empty(len(seeds), self.num_points, 3), draws) * sampler.init_noise_sigma
            for step in sampler.timesteps:
                time = self.times[int(step)].to(device).expand(len(seeds))
                prediction = network(sampler.scale_model_input(points, step), time, latent, group)
                points = sampler.step(prediction, step, points, **stochastic).prev_sample
        return self.denormalize(points).float().to(self.device)

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
            self._compared.append((self.normalize(points), self.normalize(batch["points"][: len(points)])))
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
            CheckpointMismatchError: naming every tensor that does not fit.
            ValueError: when this module does not predict noise along the checkpoint's schedule.
        """
        if self.scheduler.config.prediction_type != "epsilon" or not torch.equal(self.times, self._step_times("beta")):
            raise ValueError(
                "the authors' weights predict noise, given beta, along a schedule that ends before noise alone: build "
                "the module with reference_behaviour=True, or with terminal_snr='reference' and time='beta'."
            )
        report = self.network.load_reference_weights(source, self.scheduler.betas)
        if statistics is not None:
            numbers = read_state_dict(statistics)
            check_state_dict(numbers, {"mean": self.shift[None], "std": self.scale[:1]}, describe(statistics))
            self.shift.copy_(numbers["mean"][0])
            self.scale.copy_(numbers["std"])
            self.measured.fill_(True)
        return report

    def _step_times(self, time: Literal["angle", "beta"]) -> Tensor:
        """What the denoiser is told about each step (T,)."""
        if time == "beta":
            return cast(Tensor, self.scheduler.betas.clone())
        return cast(Tensor, 2 * (1 - self.scheduler.alphas_cumprod).sqrt().arcsin())

    def _decode(self, points: Tensor) -> tuple[Tensor, dict[int, ValueError]]:
        """Masks (B, 1, H, W), and what is wrong with those clouds that have none."""
        size, decoder, structures = self.image_size, self.decoder, self.structures
        try:
            return points_to_masks(points, size, decoder, TAG, structures), {}
        except ValueError:
            masks = torch.zeros(len(points), 1, *size, dtype=torch.int64, device=points.device)
        errors = {}
        for i, cloud in enumerate(points):
            try:
                masks[i, 0] = points_to_mask(cloud, size, decoder, TAG, structures)
            except ValueError as error:
                errors[i] = error
        return masks, errors

    def _group_of(self, batch: Sample) -> Tensor:
        attributes = batch["attributes"]
        if self.attribute is None or self.attribute not in attributes:
            raise ValueError(
                f"the batch carries the attributes {sorted(attributes)}, but the model is conditional on "
                f"'{self.attribute}': name it in the data module's `attributes`, or build with conditional=False."
            )
        return attributes[self.attribute]

    def _with_trained_groups(self, batch: Sample) -> Sample:
        if self.attribute is None:
            return batch
        group = self._group_of(batch)
        self._check_known(group)
        trained = group.where(self.num_clouds[group] > 0, UNKNOWN)
        return cast(Sample, {**batch, "attributes": {**batch["attributes"], self.attribute: trained}})

    def _check_known(self, groups: Tensor) -> None:
        known = len(self.num_clouds) - 1
        foreign = sorted(set(groups.tolist()) - set(range(UNKNOWN, known)))
        if foreign:
            has = f"'{self.attribute}' has groups 0 to {known - 1}" if known else "the model has no groups"
            raise ValueError(f"group {foreign} was found, but {has}; -1 (or None) is no group in particular.")

    def _check_groups(self, groups: Tensor) -> None:
        """Refuse what cannot be generated; a model that was never trained generates for all groups alike."""
        self._check_known(groups)
        counts = self.num_clouds.tolist()[:-1]
        absent = sorted(g for g in set(groups.tolist()) - {UNKNOWN} if not counts[g])
        if absent and any(self.num_clouds.tolist()):
            raise ValueError(
                f"group {absent} of '{self.attribute}' was asked for, but had no training cloud (clouds of each group: "
                f"{counts}): it cannot be generated."
            )

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
        groups = {self.attribute: self.num_groups[self.attribute]} if self.attribute else {}
        check_data(data, groups, num_classes=len(self.structures) + 1, image_size=self.image_size)


def _structures(num_classes: int) -> StructureSpec:
    if num_classes == len(DISC_AND_CUP) + 1:
        return DISC_AND_CUP
    return StructureSpec(tuple(f"structure {k}" for k in range(1, num_classes)))
