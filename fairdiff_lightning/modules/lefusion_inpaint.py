"""LeFusion: lesions of an asked texture, class, size and place painted into healthy scans."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.data.seeding import derive_seed
from fairdiff_lightning.diffusion import (
    add_noise,
    class_masks,
    gaussian,
    generators,
    lesion_histogram,
    timesteps,
    training_target,
)
from fairdiff_lightning.diffusion.class_painting import paint_classes
from fairdiff_lightning.diffusion.guidance import guide
from fairdiff_lightning.diffusion.inpaint import Compose, Region
from fairdiff_lightning.diffusion.lesion_box import per_axis
from fairdiff_lightning.diffusion.lesion_histogram import check_histograms
from fairdiff_lightning.losses.lesion import Norm, Normalise, lesion_noise_loss
from fairdiff_lightning.modules.data_facts import check_data, chosen_attribute, group_of
from fairdiff_lightning.modules.lesion_diffusion import LesionDiffusion
from fairdiff_lightning.modules.training_pass import over_training
from fairdiff_lightning.networks.class_networks import Decomposition, build_class_networks, networks_of
from fairdiff_lightning.networks.lesion_backbones import Backbone
from fairdiff_lightning.networks.lesion_unet import Conditioning
from fairdiff_lightning.networks.texture_bank import TextureBank

REFERENCE: dict[str, Any] = {
    "loss": "l1",
    "normalise": "volume",
    "condition_dropout": 0.0,
    "guidance_scale": 1.0,
    "num_steps": 300,
    "jump_length": 5,
    "jump_n_sample": 5,
    "scheduler": "DDPMScheduler",
    "scheduler_args": None,
    "sampler": "DDPMScheduler",
    "sampler_args": None,
    "eta": 0.0,
    "compose": "before",
    "final_composite": False,
    "roi": "volume",
}
"""What the authors' code does."""

CHAIN = ("num_steps", "jump_length", "jump_n_sample", "compose", "final_composite", "eta", "roi", "context")
"""Settings that the sampler is called with."""


class LeFusionInpaint(LesionDiffusion):
    """Lesion synthesis inside of masks: a diffusion that learns lesion voxels alone and is given the scan around them.

    Zhang et al., *LeFusion: Controllable Pathology Synthesis via Lesion-Focused Diffusion Models*, ICLR 2025,
    arXiv:2403.14066.

    Args:
        image_size: height, width and depth of the volumes, voxels.
        in_channels: channels of the image; LeFusion knows one.
        num_classes: classes of the mask, the background included.
        lesion_classes: classes that are synthesised, each in a channel of its own; all but the background when None.
        decomposition: ``joint``, one network for all of them (LeFusion-J), or ``separate``, a network for each
            (LeFusion-S), which paint in the order of ``lesion_classes``, each around what the earlier ones painted.
            Modules of one lesion class each, trained apart, do the same where the next one is given the ``image`` that
            the last one returned; from the healthy scan, it would know nothing of the lesion that it touches.
        width: channels of the network at full resolution: 64 for LIDC, 72 for Emidec.
        multipliers: of the width at each level.
        backbone: ``lesion_unet``, LeFusion's own, or ``diffusion_unet``, MONAI's, which halves the depth too.
        network_args: further arguments of the network, such as ``heads``.
        conditioning: how the histogram enters: ``film`` (the authors' code), ``cross_attention`` (the paper), or None.
        bins: of each class's histogram.
        condition_dropout: share of training samples without their histogram, which guidance needs.
        guidance_scale: of classifier-free guidance towards the histogram; 1 is none, and half the work.
        textures: prototypes that are made of the real training lesions' histograms, see
            :class:`~fairdiff_lightning.networks.texture_bank.TextureBank`.
        texture: of requests that bring none, see :meth:`TextureBank.draw`; ``group`` is that of the request's group.
        num_groups: attribute -> number of its groups; the CLI takes it from the data.
        attribute: whose groups ``texture="group"`` means; the first of ``num_groups`` when None.
        loss: absolute (``l1``) or squared error.
        normalise: ``lesion``, so that the loss does not depend on a lesion's size, or ``volume``.
        num_steps: levels of the sampling chain.
        jump_length: levels that the chain goes back up at a time.
        jump_n_sample: times that each stretch is walked; 1 is no resampling.
        compose: when the scan is put around the lesion, see :func:`~fairdiff_lightning.diffusion.inpaint.inpaint`.
        final_composite: leave the voxels outside of the lesion exactly as they were.
        roi: ``lesion`` shows the network the lesion with some context instead of the volume.
        context: voxels around the lesion that ``roi="lesion"`` shows at least, for all axes or each.
        eta: noise that DDIM adds on its way, 1 being as much as DDPM; None is 1 for DDIM and 0 for the others.
        scheduler: diffusers' scheduler of the training noise.
        scheduler_args: its arguments; without any of the noise, it is the cosine schedule of 300 steps.
        sampler: diffusers' scheduler that samples.
        sampler_args: its arguments.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        compile: compile the network in place before the first step.
        num_validation_samples: held-out lesions that each validation paints anew, over all devices.
        reference_behaviour: restore what the table below says.
        optimizer: built on the trainable parameters.
        lr_scheduler: built on the optimizer.
        lr_interval: when the scheduler steps.

    Shapes:
        image (B, 1, H, W, D) in [0, 1], [-1, 1] inside; mask (B, 1, H, W, D) class indices; texture (B, K * bins) for K
        lesion classes.

    Logs:
        ``train/loss``, ``val/loss``; of held-out lesions painted anew with their own mask and histogram:
        ``val/reconstruction``, mean absolute difference inside of the lesions, and ``val/histogram_distance``, half the
        sum of differences between the histogram asked for and the one obtained, 0 to 1.

    Differences from the reference:
        ==================  ============================  ============================  ==========================
        What                Reference code                Here                          To restore
        ==================  ============================  ============================  ==========================
        loss                over all voxels               over the lesion's             ``normalise="volume"``
        background          8.8 HU of noise               the scan, bit for bit         ``final_composite=False``
        sampling            300 levels, (5, 5), 1,480     50 levels of DDIM, (5, 2)     ``num_steps`` and others
                            evaluations
        guidance            null condition never trained  ``condition_dropout``         ``condition_dropout=0``
        jittered histogram  not normalised                normalised                    not offered
        weights             raw                           averaged with TrainableEMA    no callback
        all of these                                                                    ``reference_behaviour``
        ==================  ============================  ============================  ==========================

    Raises:
        ValueError: for sides that the network cannot halve, an unknown scheduler or decomposition, a context below 0,
            or other channels than one.
    """

    reference = REFERENCE
    measures = ("reconstruction", "histogram_distance")

    def __init__(
        self,
        image_size: tuple[int, int, int] = (64, 64, 32),
        in_channels: int = 1,
        num_classes: int = 2,
        lesion_classes: tuple[int, ...] | None = None,
        decomposition: Decomposition = "joint",
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 4, 8),
        backbone: Backbone = "lesion_unet",
        network_args: dict[str, Any] | None = None,
        conditioning: Conditioning | None = "film",
        bins: int = 16,
        condition_dropout: float = 0.1,
        guidance_scale: float = 1.0,
        textures: int = 3,
        texture: str = "empirical",
        num_groups: dict[str, int] | None = None,
        attribute: str | None = None,
        loss: Norm = "l1",
        normalise: Normalise = "lesion",
        num_steps: int = 50,
        jump_length: int = 5,
        jump_n_sample: int = 2,
        compose: Compose = "before",
        final_composite: bool = True,
        roi: Region = "volume",
        context: int | tuple[int, int, int] = 8,
        eta: float | None = None,
        scheduler: str = "DDPMScheduler",
        scheduler_args: dict[str, Any] | None = None,
        sampler: str = "DDIMScheduler",
        sampler_args: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        num_validation_samples: int = 4,
        reference_behaviour: bool = False,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["step", "epoch"] = "step",
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_interval, num_validation_samples)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if in_channels != 1:
            raise ValueError(
                f"in_channels {in_channels}; expected is 1, a grey scan, which has a channel for each class inside."
            )
        self.attribute = chosen_attribute(attribute, dict(num_groups or {}), needed=texture == "group")
        per_axis(context, 3, "context")
        self.adopt(range(1, num_classes))
        self.network = build_class_networks(
            decomposition,
            backbone,
            len(self.classes),
            width=width,
            multipliers=multipliers,
            bins=None if conditioning is None else bins,
            conditioning=conditioning or "film",
            checkpointing=gradient_checkpointing,
            arguments=network_args,
            image_size=self.image_size,
        )
        self.bank = TextureBank(textures, len(self.classes), bins)
        self.bank.check(texture)

    def setup(self, stage: str) -> None:
        """Check that the data are what the network was built for, and compile."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        facts = {name: self.hparams[name] for name in ("num_classes", "in_channels")}
        check_data(data, {}, **facts, image_size=self.image_size)
        asked = next(iter(getattr(data, "attribute_groups", {})), None)
        if getattr(data, "generate", None) and asked in data.dataset.lesion_attributes and self._mislabels():
            raise ValueError(
                f"requests ask for groups of '{asked}', which the samples get as a label, but texture="
                f"{self.hparams['texture']!r} draws any. Set texture='group' (--model.texture=group), or ask for no "
                "groups (--data.attributes=[])."
            )
        self._check_textures(getattr(data, "generate", None))
        if self.hparams["compile"]:
            for network in networks_of(self.network):
                network.compile()

    def on_fit_start(self) -> None:
        """Measure the histograms of the real lesions among the training samples, once."""
        if self.hparams["conditioning"] is not None and not len(self.bank.histograms):
            found, groups = over_training(self, lambda batch: (self.histograms(batch), self._groups(batch)))
            self.bank.measure(found[found.any(1)], groups[found.any(1)])

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Error of the predicted noise inside of the lesions."""
        random, masks = self.draws(batch), class_masks(batch["mask"], self.classes)
        clean = self._volumes(batch["image"])
        noise, steps = gaussian(clean, random), timesteps(clean, self.noise.config.num_train_timesteps, random)
        condition, dropped = self._condition(batch), None
        if self.training and condition is not None:
            dropped = torch.rand(len(clean), device=clean.device) < self.settings["condition_dropout"]
        predicted = self.network(add_noise(self.noise, clean, noise, steps), steps, condition, dropped)
        wanted = training_target(self.noise, clean, noise, steps)
        loss = lesion_noise_loss(predicted, wanted, masks, self.settings["loss"], self.settings["normalise"])
        return {"loss": loss}

    def histograms(self, batch: Sample) -> Tensor:
        """Histograms (B, K * bins) of the lesions of a batch."""
        masks = class_masks(batch["mask"], self.classes)
        return lesion_histogram(batch["image"] * 2 - 1, masks, self.hparams["bins"]).flatten(1)

    @torch.no_grad()
    def generate(self, requests: Sample) -> dict[str, Any]:
        """Paint lesions: ``image`` (B, 1, H, W, D) in [0, 1] and ``mask``.

        A scan whose mask has no lesion stays as it is, with a warning.

        Args:
            requests: ``seed`` (B,), the scan ``image`` (B, 1, H, W, D), the ``mask`` of the lesions to come and, unless
                the module's ``texture`` will do, ``texture``: (B, K * bins), or a list of such rows and of names.

        Raises:
            ValueError: for textures that are no histograms, naming the sample.
        """
        given, masks = dict[str, Any](requests), class_masks(requests["mask"], self.classes).flatten(2)
        some = masks.any(2).any(1).nonzero().flatten()
        image = given["image"].clone()
        self._warn_of_empty(requests, some)
        if len(some):
            chosen = {name: given[name][some.to(given[name].device)] for name in ("image", "mask", "seed")}
            image[some] = self.paint(**chosen, condition=self._asked(given, some, masks.any(2)))
        return {"image": image, "mask": given["mask"]}

    @torch.no_grad()
    def paint(self, image: Tensor, mask: Tensor, condition: Tensor | None, seed: Tensor) -> Tensor:
        """Scans (B, 1, H, W, D) in [0, 1] with lesions in the masks (B, 1, H, W, D), of histograms (B, K * bins)."""
        s, masks = self.settings, class_masks(mask, self.classes)
        networks = networks_of(self.network)
        later = ([derive_seed("network", k, one) for one in seed.tolist()] for k in range(1, len(networks)))
        painted = paint_classes(
            [partial(self._predict, network) for network in networks],
            image * 2 - 1,
            masks,
            condition,
            [seed, *map(torch.tensor, later)],
            scheduler=self.make_sampler(),
            stride=self.network.strides,
            **{name: s[name] for name in CHAIN},
        )
        inside = masks.any(1, keepdim=True) | (not s["final_composite"])
        return torch.where(inside, painted / 2 + 0.5, image).clamp(0, 1)

    def validation_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        """Losses, and the first held-out lesions painted anew with their own mask and texture."""
        if self.hparams["conditioning"] is not None:
            batch = {**batch, "texture": self.histograms(batch)}  # type: ignore[typeddict-unknown-key]
        output = super().validation_step(batch, batch_idx)
        made = output["generated"]
        if made is not None:
            count = len(made["id"])
            inside = class_masks(made["mask"], self.classes).any(1, keepdim=True)
            difference = (made["image"] - batch["image"][:count]).abs()[inside]
            cast(MeanMetric, self.metrics["reconstruction"]).update(difference.mean())
            asked = self.histograms(batch)[:count]
            distance = (self.histograms(made) - asked).abs().sum(1) / (2 * asked.sum(1).clamp(min=1))
            cast(MeanMetric, self.metrics["histogram_distance"]).update(distance)
        return output

    def _predict(self, network: nn.Module, noisy: Tensor, step: Tensor, condition: Tensor | None) -> Tensor:
        """A network as the sampler calls it, guided towards the histogram."""
        scale = self.settings["guidance_scale"]
        if scale == 1 or condition is None:
            alone: Tensor = network(noisy, step, condition).float()
            return alone
        dropped = torch.arange(2, device=noisy.device).repeat_interleave(len(noisy)) == 0
        both = network(torch.cat([noisy] * 2), step, torch.cat([condition] * 2), dropped)
        return guide(both.float(), scale)

    def _check_textures(self, plan: Any) -> None:
        """Refuse a plan's textures that the model does not know, before anything is made."""
        textures = list(getattr(plan, "textures", None) or ())
        if textures and self.hparams["conditioning"] is None:
            raise ValueError(
                f"generate: textures={textures} for a model with conditioning=None, which knows of none: every "
                "lesion would come out once for each, alike. Leave them out, or train with conditioning='film'."
            )
        names = [one for one in textures if isinstance(one, str) and not one.endswith(".npy")]
        for name in names:
            self.bank.check(name)
        if len(names) < len(textures) and plan.texture_bins != self.hparams["bins"]:
            raise ValueError(
                f"generate: texture_bins={plan.texture_bins} for a model of bins={self.hparams['bins']}: give "
                f"histograms of {self.hparams['bins']} bins, and texture_bins={self.hparams['bins']}."
            )

    def _mislabels(self) -> bool:
        return self.hparams["conditioning"] is not None and self.hparams["texture"] != "group"

    def _asked(self, given: dict[str, Any], some: Tensor, present: Tensor) -> Tensor | None:
        """Histograms of the samples that are painted: those given, by numbers or names, or the module's choice."""
        if self.hparams["conditioning"] is None:
            return None
        asked = given.get("texture")
        if not isinstance(asked, Tensor):
            asked = self._drawn(asked or [self.hparams["texture"]] * len(present), given, some, present)
        textures = asked.to(present.device)[some]
        check_histograms(textures, present[some], self.hparams["bins"], [given["id"][k] for k in some.tolist()])
        return textures.to(given["image"].device)

    def _drawn(self, asked: Sequence[str | Tensor], given: dict[str, Any], some: Tensor, present: Tensor) -> Tensor:
        """Histograms (B, K * bins) of names, each drawn from its sample's own seed, and of numbers; else zeros."""
        seeds, groups = given["seed"].tolist(), self._groups(cast(Sample, given)).cpu()
        rows = torch.zeros(len(present), present.shape[1] * self.hparams["bins"])
        for k in some.tolist():
            one = asked[k]
            if isinstance(one, str):
                random = generators(torch.tensor([derive_seed("texture", seeds[k])]))
                one = self.bank.draw(one, random, groups[k : k + 1], present[k : k + 1])[0]
            rows[k] = one
        return rows

    def _warn_of_empty(self, requests: Sample, some: Tensor) -> None:
        empty = sorted(set(range(len(requests["id"]))) - set(some.tolist()))
        if empty:
            rank_zero_warn(
                f"the masks of {', '.join(requests['id'][k] for k in empty)} have no voxel of the lesion classes "
                f"{self.classes}: these scans stay as they are. Check that the masks lie inside of the volume."
            )

    def _groups(self, batch: Sample) -> Tensor:
        """Group (B,) of each sample, -1 when the module looks at no attribute."""
        return torch.full((len(batch["id"]),), -1) if self.attribute is None else group_of(batch, self.attribute)

    def _volumes(self, image: Tensor) -> Tensor:
        """The scan once for each lesion class, (B, K, H, W, D) in [-1, 1]."""
        return (image * 2 - 1).expand(-1, len(self.classes), -1, -1, -1)

    def _condition(self, batch: Sample) -> Tensor | None:
        return None if self.hparams["conditioning"] is None else self.histograms(batch)
