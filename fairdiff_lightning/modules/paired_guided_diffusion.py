"""PIG: an image and its mask out of two diffusions that guide each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.diffusion import (
    add_noise,
    antithetic_timesteps,
    clean_estimate,
    denoise,
    gaussian,
    generators,
    sample_guide,
    sample_guided,
    sample_pairs,
    timesteps,
    training_target,
)
from fairdiff_lightning.diffusion.guidance import guide as guide_away
from fairdiff_lightning.diffusion.mask_channels import Decode, decode_mask, encode_mask, relative_levels
from fairdiff_lightning.diffusion.noise import Generators
from fairdiff_lightning.diffusion.paired import Guide, Transform, guide_transform
from fairdiff_lightning.diffusion.sampling import step_arguments
from fairdiff_lightning.diffusion.weighting import min_snr_weights
from fairdiff_lightning.metrics.mask_plausibility import MaskPlausibility
from fairdiff_lightning.metrics.noise_levels import LossByNoise
from fairdiff_lightning.modules.data_facts import check_data, check_requests, chosen_attribute, group_of
from fairdiff_lightning.modules.generative import TRAINING_CASES, GenerativeModule
from fairdiff_lightning.modules.guider_checkpoint import read_guider
from fairdiff_lightning.modules.pair_conditions import Groups, check_mask, hide_groups, requests_for
from fairdiff_lightning.modules.paired_noise import noise_sampler, training_noise
from fairdiff_lightning.networks.checkpoint import LoadReport, Source, check_state_dict
from fairdiff_lightning.networks.guided_unet import WIDTHS, GuidedUNet


class PairedGuidedDiffusion(GenerativeModule):
    """Paired image and mask generation by two mutually guided diffusion processes.

    Zhang et al., *Paired Image Generation with Diffusion-Guided Diffusion Models*, MICCAI 2025, arXiv:2507.14833. The
    guider denoises the mask and sees the noisy image; the target denoises the image and sees the mask that the guider
    estimates at the same step.

    Args:
        stage: which network is trained. ``guider`` and ``target`` are the paper's two stages, the second with the
            guider frozen; ``joint`` trains both in one pass, the guide detached (not in the paper).
        guider_checkpoint: checkpoint of a run with ``stage="guider"``, which ``stage="target"`` starts from.
        variant: ``mutual``, or ``two_channel``: one network on image and mask stacked, at half the cost, the ablation
            that the paper lacks (``stage="joint"`` alone).
        image_size: side, or height and width, of the image, pixels.
        in_channels: channels of the image.
        num_classes: classes of the mask, the background included.
        widths: channels of the networks' levels, see :class:`~fairdiff_lightning.networks.guided_unet.GuidedUNet`.
        num_groups: attribute -> number of its groups, of the data.
        attributes: those that the networks are conditioned on, so that pairs can be asked for a group.
        group_dropout: share of training samples whose groups are all hidden, which guidance and unknown groups need; of
            several attributes each is hidden in as many alone, so that a pair can be asked for one of them.
        guidance_scale: of classifier-free guidance towards the groups; 1 is none, and half the work.
        guide: what becomes of the estimated mask before it guides the image, in training and sampling alike, see
            :func:`~fairdiff_lightning.diffusion.paired.guide_transform`; also of a given mask, but for the relative
            ``binary``, which would take a pixel off its border.
        decode: how a mask is read from its channels, see
            :func:`~fairdiff_lightning.diffusion.mask_channels.decode_mask`.
        ordinal_mask: one channel with evenly spaced levels instead of one for each class.
        lesion_weight: weigh the target's loss by the sigmoid of the estimated mask, 2.7 times more inside of a lesion.
        antithetic: draw training steps in pairs t and T - 1 - t.
        min_snr_gamma: bound of the min-SNR weights; None weighs all steps alike.
        num_steps: sampling steps; each evaluates both networks once.
        eta: noise that a DDIM sampler adds on its way.
        scheduler: diffusers' scheduler of the training noise.
        scheduler_args: its arguments; the paper's linear schedule of 1,024 steps by default.
        sampler: diffusers' scheduler that samples.
        sampler_args: its arguments; steps even in log SNR for DPM-Solver++ by default.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        channels_last: memory format of the networks; on a CPU it pays for large images (512 x 512), hardly for others.
        compile: compile the networks in place before the first step.
        num_validation_samples: pairs that each validation generates, over all devices.
        reference_behaviour: restore what the table below says.
        optimizer: built on the trainable parameters.
        lr_scheduler: built on the optimizer.
        lr_interval: when the scheduler steps.

    Shapes:
        image (B, C, H, W) in [0, 1], [-1, 1] inside; mask (B, 1, H, W) class indices, channels of -1 and 1 inside.

    Logs:
        ``loss``, ``guider`` and ``target`` of ``train/`` and ``val/``; ``val/<network>_by_noise/<k>``, the loss in each
        quarter of the steps, least noise first; ``val/plausibility/area``, ``count`` and ``location``, how the decoded
        masks' histograms overlap with those of the real ones.

    Differences from the reference:
        ==================  ==============================  ==============================  ==========================
        What                Reference code                  Here                            To restore
        ==================  ==============================  ==============================  ==========================
        guide               raw in training, binary in      one transform for both          ``reference_behaviour``
                            sampling
        mask decoding       relative, no empty masks, one   absolute threshold              ``reference_behaviour``, or
                            pixel eroded                                                    ``decode="relative"``
        image decoding      stretched by the batch's        never stretched                 not offered
                            darkest level
        sampling            DDIM, 256 steps                 DPM-Solver++, 32 steps          ``sampler``, ``num_steps``
        best checkpoint     weights of a later epoch        those of the best epoch         not offered
        masks               JPEG, grey borders kept         thresholded when read           not offered
        noise               one global seed, none set       each pair's own seed            not offered
        ==================  ==============================  ==============================  ==========================

    Raises:
        ValueError: for a combination of stage and variant that does not exist, an unknown scheduler, relative levels of
            more than three ordinal classes, or groups that the data do not have.
    """

    def __init__(
        self,
        stage: Literal["guider", "target", "joint"] = "joint",
        guider_checkpoint: str | None = None,
        variant: Literal["mutual", "two_channel"] = "mutual",
        image_size: int | tuple[int, int] = 512,
        in_channels: int = 1,
        num_classes: int = 2,
        widths: tuple[int, ...] = WIDTHS,
        num_groups: dict[str, int] | None = None,
        attributes: tuple[str, ...] = (),
        group_dropout: float = 0.1,
        guidance_scale: float = 1.0,
        guide: Guide = "raw",
        decode: Decode = "absolute",
        ordinal_mask: bool = False,
        lesion_weight: bool = True,
        antithetic: bool = True,
        min_snr_gamma: float | None = None,
        num_steps: int = 32,
        eta: float = 0.0,
        scheduler: str = "DDPMScheduler",
        scheduler_args: dict[str, Any] | None = None,
        sampler: str = "DPMSolverMultistepScheduler",
        sampler_args: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        num_validation_samples: int = 8,
        reference_behaviour: bool = False,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["step", "epoch"] = "step",
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_interval, num_validation_samples)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if variant == "two_channel" and stage != "joint":
            raise ValueError(f"stage='{stage}' with variant='two_channel': one network has one stage, 'joint'.")
        if guider_checkpoint is not None and stage != "target":
            raise ValueError(f"guider_checkpoint with stage='{stage}': only stage='target' starts from one.")
        known = num_groups or {}
        conditions = {str(chosen_attribute(name, known)): known.get(name, 0) for name in attributes}
        self.attribute = next(iter(conditions), None)
        self.noise = training_noise(self.hparams)
        step_arguments(self.make_sampler(), eta, None)  # so that a wrong name or argument is found now
        if guidance_scale != 1 and not (attributes and group_dropout):
            raise ValueError(
                f"guidance_scale={guidance_scale} with attributes={list(attributes)}, group_dropout={group_dropout}: "
                "guidance needs groups to go towards, and some of them hidden in training."
            )
        if decode not in get_args(Decode):
            raise ValueError(f"decode={decode!r}; expected is one of {', '.join(get_args(Decode))}.")
        relative = reference_behaviour or decode == "relative"
        if relative and ordinal_mask and num_classes > 3:
            raise ValueError(
                f"num_classes={num_classes}, ordinal_mask=True with decode='{decode}', reference_behaviour="
                f"{reference_behaviour}: relative levels are those of 2 or 3 classes. Take decode='absolute' without "
                "reference_behaviour, or ordinal_mask=False."
            )
        self.decode_method: Decode = "relative" if relative else "absolute"
        levels: Transform = partial(relative_levels, levels=num_classes if ordinal_mask else 2)
        erodes = guide == "binary" and relative
        self.guide_transform: Transform = levels if erodes else guide_transform(guide)
        self.given_transform: Transform = guide_transform("raw") if erodes else self.guide_transform
        self.sampling_transform: Transform = levels if reference_behaviour else self.guide_transform
        self.mask_channels = 1 if ordinal_mask else num_classes - 1
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        common: dict[str, Any] = {"image_size": self.image_size, "widths": widths, "num_groups": conditions}
        self.guider: GuidedUNet | None = None
        self.target: GuidedUNet | None = None
        if variant == "two_channel":
            self.target = GuidedUNet(in_channels + self.mask_channels, 0, **common)
        else:
            self.guider = GuidedUNet(self.mask_channels, in_channels, **common)
            if stage != "guider":
                self.target = GuidedUNet(in_channels, self.mask_channels, **common)
        if stage == "target":
            self._part("guider").requires_grad_(False)
        for network in self._networks():
            if gradient_checkpointing:
                network.unet.enable_gradient_checkpointing()
            if channels_last:
                network.use_channels_last()
        count = self.noise.config.num_train_timesteps
        self.trained: tuple[str, ...] = {"joint": ("guider", "target")}.get(stage, (stage,))
        if variant == "two_channel":
            self.trained = ("target",)
        self.levels = nn.ModuleDict({name: LossByNoise(count) for name in self.trained})
        self.plausibility = MaskPlausibility()
        self._has_guider = False

    def make_sampler(self) -> Any:
        """A new scheduler for sampling, along the noise of training."""
        return noise_sampler(self.hparams, self.noise)

    def setup(self, stage: str) -> None:
        """Check that the data are what the networks were built for, take over the guider, and compile."""
        data: Any = getattr(self.trainer, "datamodule", None)
        facts = {name: self.hparams[name] for name in ("num_classes", "in_channels")}
        check_data(data, self._conditions(), **facts, image_size=self.image_size)
        if stage == "predict":
            check_requests(data, self.attribute)
            if self.target is None:
                raise ValueError("stage='guider' makes no pairs: go on with stage='target' and guider_checkpoint.")
        if stage == "fit" and self.hparams["stage"] == "target" and not self._has_guider and not self.trainer.ckpt_path:
            self.load_guider(self.hparams["guider_checkpoint"])
        if self.hparams["compile"]:
            for network in self._networks():
                network.compile()

    def load_guider(self, path: str | None) -> None:
        """Take over the guider of a checkpoint that ``stage="guider"`` wrote.

        Raises:
            ValueError: when none is given, it holds no guider, or one of another noise, encoding of masks or size of
                images.
            CheckpointMismatchError: when its network is another one, naming what does not fit.
        """
        if path is None:
            raise ValueError(
                "stage='target' trains beside a finished guider: give guider_checkpoint, the checkpoint of a run with "
                "stage='guider'; or train both with stage='joint'."
            )
        state, checkpoint = read_guider(path, self.hparams)
        guider = self._part("guider")
        check_state_dict(state, guider.state_dict(), f"guider_checkpoint='{path}'")
        guider.load_state_dict(state)
        self.training_cases |= frozenset(checkpoint.get(TRAINING_CASES, ()))
        self._has_guider = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which file the guider came from; among the hyperparameters a loader may name another one."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["guider_checkpoint"] = self.hparams["guider_checkpoint"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Learn too whether it brings the guider that is asked for, whose own file is then not needed to go on."""
        super().on_load_checkpoint(checkpoint)
        wanted = self.hparams["guider_checkpoint"]
        brought = any(name.startswith("guider.") for name in checkpoint["state_dict"])
        self._has_guider |= brought and wanted in (None, checkpoint.get("guider_checkpoint", wanted))

    def load_reference_weights(self, source: Source, network: Literal["guider", "target"]) -> LoadReport:
        """Load a checkpoint of the authors' code, which has one for each network (their x and y).

        Raises:
            ValueError: when this stage has no such network.
            CheckpointMismatchError: naming every missing, unexpected or misshapen tensor.
        """
        report = self._part(network).load_reference_weights(source)
        self._has_guider |= network == "guider"
        return report

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Squared errors of the networks that are trained, and their sum."""
        terms, steps = self.terms(batch)
        if not self.training:
            for name, each in terms.items():
                cast(LossByNoise, self.levels[name]).update(each, steps)
        means = {name: each.mean() for name, each in terms.items()}
        return {"loss": torch.stack([*means.values()]).sum(), **(means if len(means) > 1 else {})}

    def terms(self, batch: Sample) -> tuple[dict[str, Tensor], Tensor]:
        """Squared error (B,) of each network that is trained, and the steps (B,) that the samples were noised to."""
        random = self.draws(batch)
        mask, image = self.encode_mask(batch["mask"]), batch["image"] * 2 - 1
        noise_x, noise_y = gaussian(mask, random), gaussian(image, random)
        steps, groups = self._steps(image, random), self._groups(batch)
        if self.training:
            groups = hide_groups(groups, self.hparams["group_dropout"])
        x, y = add_noise(self.noise, mask, noise_x, steps), add_noise(self.noise, image, noise_y, steps)
        wanted_x = training_target(self.noise, mask, noise_x, steps)
        wanted_y = training_target(self.noise, image, noise_y, steps)
        if self.guider is None:
            both = torch.cat([x, y], 1)
            predicted = self._part("target")(both, both[:, :0], steps, groups)
            return {"target": self._errors(predicted, torch.cat([wanted_x, wanted_y], 1), steps)}, steps
        with torch.set_grad_enabled(torch.is_grad_enabled() and "guider" in self.trained):
            predicted = self.guider(x, y, steps, groups)
        terms = {"guider": self._errors(predicted, wanted_x, steps)} if "guider" in self.trained else {}
        if self.target is not None:
            estimate = clean_estimate(self.noise, predicted.detach().float(), x, steps)
            answer = self.target(y, self.guide_transform(estimate), steps, groups)
            weight = estimate.amax(1, keepdim=True).sigmoid() if self.hparams["lesion_weight"] else None
            terms["target"] = self._errors(answer, wanted_y, steps, weight)
        return terms, steps

    def validation_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        """Losses, a few pairs, and what their masks look like."""
        output = super().validation_step(batch, batch_idx)
        if output["generated"] is not None:
            self.plausibility.update(output["generated"]["mask"], real=False)
        self.plausibility.update(batch["mask"], real=True)
        return output

    def on_validation_epoch_end(self) -> None:
        """Log the losses by noise level, and how plausible the masks are."""
        super().on_validation_epoch_end()
        values = {f"plausibility/{name}": value for name, value in self.plausibility.compute().items()}
        for name, module in self.levels.items():
            metric = cast(LossByNoise, module)
            values |= {f"{name}_by_noise/{k}": value for k, value in enumerate(metric.compute())}
            metric.reset()
        self.plausibility.reset()
        if not self.trainer.sanity_checking:
            self.log_dict({f"val/{name}": value for name, value in values.items() if not value.isnan()})

    def predict_step(self, batch: Sample, batch_idx: int = 0) -> dict[str, Any]:
        """Pairs for a batch of requests; of attributes that the networks do not know the group is unknown."""
        made, known = super().predict_step(batch, batch_idx), self._conditions()
        given = made["attributes"]
        return made | {"attributes": {n: g if n in known else torch.full_like(g, -1) for n, g in given.items()}}

    @torch.no_grad()
    def generate(self, requests: Sample) -> dict[str, Any]:
        """Pairs for requests with ``seed``: ``image`` (B, C, H, W) in [0, 1] and ``mask`` (B, 1, H, W).

        A request with a mask and no image asks for an image of that mask. With ``stage="guider"`` there are no pairs,
        but a mask for a given image. In training and evaluation mode alike.

        Raises:
            ValueError: for what the stage or variant cannot answer, or a given mask of another size or other classes.
        """
        random, groups = generators(requests["seed"]), self._groups(requests)
        shapes = [
            (len(random), channels, *self.image_size) for channels in (self.mask_channels, self.hparams["in_channels"])
        ]
        x, y = (gaussian(torch.empty(shape, device=self.device), random) for shape in shapes)
        common: dict[str, Any] = {"num_steps": self.hparams["num_steps"], "generator": random}
        keys = set(requests)
        mask_is_given = "mask" in keys and "image" not in keys
        if self.guider is None:
            if mask_is_given:
                raise ValueError("variant='two_channel' draws image and mask together; it cannot follow a given mask.")
            x0, y0 = self._denoise_both(x, y, groups, **common, eta=self.hparams["eta"])
            return self._decoded(x0, y0)
        common |= {"scheduler": self.make_sampler(), "eta": self.hparams["eta"]}
        guider = self._predictor(self.guider, groups)
        if self.target is None:
            if "image" not in keys:
                raise ValueError("stage='guider' draws masks for given images; these requests have none.")
            x0 = sample_guide(guider, x=x, y0=requests["image"] * 2 - 1, **common)
            return {"mask": self.decode_mask(x0)}
        target = self._predictor(self.target, groups)
        if mask_is_given:
            check_mask(requests, self.image_size, self.hparams["num_classes"])
            given = self.encode_mask(requests["mask"])
            image = sample_guided(target, guide=self.given_transform(given), y=y, **common)
            return self._decoded(given, image) | {"mask": requests["mask"]}
        return self._decoded(*sample_pairs(guider, target, x=x, y=y, guide=self.sampling_transform, **common))

    @torch.no_grad()
    def sample(self, num: int, groups: dict[str, int] | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw pairs without a Trainer.

        Args:
            num: how many, at least 1.
            groups: attribute -> index of the group that all are of; unknown when left out.
            seed: of the first; each pair depends on this and its number alone.

        Returns:
            Images (num, C, H, W) in [0, 1] and masks (num, 1, H, W) int64.

        Raises:
            ValueError: for less than one pair, or a group that the networks do not know.
        """
        made = self.generate(requests_for(num, groups or {}, self._conditions(), seed, self.device))
        return made["image"], made["mask"]

    def encode_mask(self, mask: Tensor) -> Tensor:
        """Channels of masks (B, 1, H, W)."""
        return encode_mask(mask, self.hparams["num_classes"], self.hparams["ordinal_mask"])

    def decode_mask(self, channels: Tensor) -> Tensor:
        """Masks (B, 1, H, W) of channels."""
        return decode_mask(channels, self.hparams["num_classes"], self.decode_method, self.hparams["ordinal_mask"])

    def _decoded(self, x0: Tensor, y0: Tensor) -> dict[str, Any]:
        return {"image": (y0 / 2 + 0.5).clamp(0, 1), "mask": self.decode_mask(x0)}

    def _denoise_both(
        self, x: Tensor, y: Tensor, groups: Groups, num_steps: int, generator: Generators, eta: float
    ) -> tuple[Tensor, Tensor]:
        predict = self._predictor(self._part("target"), groups)
        start = torch.cat([x, y], 1)
        found = denoise(self.make_sampler(), lambda s, t: predict(s, s[:, :0], t), start, num_steps, generator, eta)
        return found[:, : x.shape[1]], found[:, x.shape[1] :]

    def _predictor(self, network: GuidedUNet, groups: Groups) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The network as samplers call it: one step for all, guided towards the groups."""
        scale = self.hparams["guidance_scale"]

        def predict(noisy: Tensor, partner: Tensor, step: Tensor) -> Tensor:
            steps = step.expand(len(noisy))
            if scale == 1:
                return cast(Tensor, network(noisy, partner, steps, groups)).float()
            both = {name: torch.cat([torch.full_like(group, -1), group]) for name, group in groups.items()}
            pair = network(torch.cat([noisy] * 2), torch.cat([partner] * 2), torch.cat([steps] * 2), both)
            return guide_away(pair.float(), scale)

        return predict

    def _errors(self, predicted: Tensor, wanted: Tensor, steps: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean squared error (B,) of each sample, weighted by place and step."""
        squares = (predicted.float() - wanted).square()
        each = (squares if weight is None else squares * weight).flatten(1).mean(1)
        gamma = self.hparams["min_snr_gamma"]
        return each if gamma is None else each * min_snr_weights(self.noise, steps, gamma)

    def _steps(self, like: Tensor, random: Generators | None) -> Tensor:
        count = self.noise.config.num_train_timesteps
        if self.hparams["antithetic"] and random is None:
            return antithetic_timesteps(like, count)
        return timesteps(like, count, random)

    def _groups(self, batch: Sample) -> Groups:
        """Groups (B,) of the attributes that the networks know."""
        return {name: group_of(batch, name) for name in self._conditions()}

    def _conditions(self) -> dict[str, int]:
        return {name: self.hparams["num_groups"][name] for name in self.hparams["attributes"]}

    def _networks(self) -> list[GuidedUNet]:
        return [network for network in (self.guider, self.target) if network is not None]

    def _part(self, name: str) -> GuidedUNet:
        network: GuidedUNet | None = getattr(self, name)
        if network is None:
            h = self.hparams
            raise ValueError(f"stage='{h['stage']}' with variant='{h['variant']}' has no {name}.")
        return network
