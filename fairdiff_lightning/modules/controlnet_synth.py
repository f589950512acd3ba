"""ControlNet: images for masks or edges, by any Stable Diffusion of diffusers or a tiny one in pixels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.diffusion import (
    add_noise,
    build_scheduler,
    build_training_scheduler,
    denoise,
    gaussian,
    generators,
    timesteps,
    training_target,
)
from fairdiff_lightning.diffusion.guidance import guide
from fairdiff_lightning.diffusion.noise import Generators
from fairdiff_lightning.diffusion.weighting import min_snr_weights
from fairdiff_lightning.modules.adherence import MaskJudge
from fairdiff_lightning.modules.data_facts import check_data, check_requests, chosen_attribute, group_of
from fairdiff_lightning.modules.generative import GenerativeModule, rounds_of
from fairdiff_lightning.modules.learned_prompts import LearnedPrompts
from fairdiff_lightning.modules.partly_trained import PartlyTrained
from fairdiff_lightning.modules.saved_pipeline import save_pipeline, saved_training_cases
from fairdiff_lightning.networks.checkpoint import LoadReport, Source, describe, read_state_dict
from fairdiff_lightning.networks.cldm import load_cldm, to_cldm
from fairdiff_lightning.networks.condition import Condition, resize_labels
from fairdiff_lightning.networks.controlnet import build_controlnet
from fairdiff_lightning.networks.latent_diffusion import TINY, load_base, make_pipeline
from fairdiff_lightning.networks.prompt_mixture import Preset, PromptMixture
from fairdiff_lightning.networks.prompts import GROUP, Prompts

SHARED_NOISES = 50
"""That DiffBoost's code draws every slice's samples from, each once."""


class ControlNetSynth(LearnedPrompts, PartlyTrained, GenerativeModule):
    """Image synthesis under masks or edge maps, with a prompt that names the patient's group.

    Li et al., *FairDiff: Fair Segmentation with Point-Image Diffusion*, MICCAI 2024, arXiv:2407.06250 (masks), and
    Zhang et al., *DiffBoost: Enhancing Medical Image Segmentation via Text-Guided Diffusion Model*, IEEE TMI 2024,
    arXiv:2310.12868 (edges); both are ControlNets (Zhang et al., ICCV 2023, arXiv:2302.05543) on Stable Diffusion 1.5.

    Args:
        base: hub id or local folder of a Stable Diffusion in diffusers' layout, or ``tiny``, a small one in pixels that
            is built from its configuration and trains on a CPU (with ``trained="all"``). A folder that
            :meth:`save_pretrained` wrote also brings the prompts that were learned.
        base_args: of the tiny base: arguments of ``UNet2DConditionModel``, ``patch_size`` and ``scaling_factor``.
        pretrained: load the weights of UNet and autoencoder of ``base``; False needs their configurations alone.
        controlnet: what the control branch starts from: None grows it from the UNet; else a folder or hub id of
            diffusers, a checkpoint of this module, or a file in the original ``cldm`` layout.
        trained: ``controlnet``; ``controlnet+decoder`` also trains the UNet's output blocks and head, as FairDiff does;
            ``all`` the whole UNet, which a base without trained weights needs.
        num_classes: number of classes of the mask, the background included.
        in_channels: channels of the image; one is repeated for a base of three, whose output is averaged.
        image_size: side, or height and width, of the image, pixels.
        num_groups: attribute -> number of its groups.
        attribute: whose groups the prompt names; the first of ``num_groups`` when None.
        group_names: names of that attribute's groups; from the data module when None.
        condition: ``one_hot`` masks, masks in ``colours`` (what published ControlNets of segmentations expect), or the
            ``edge`` map of the batch.
        prompt: text for all, with ``{group}`` where the group's name goes, "Prostate, MRI" for example; None needs each
            sample's own. A sample's own ``prompt`` is read instead wherever there is one.
        learned_prompts: texts of samples that a base without a text encoder learns an embedding of each, beside
            those that the data module tells of (``prompts``). Such a base knows no others.
        negative_prompt: what guidance leads away from.
        prompt_mixture: weights of the texts whose embeddings, summed, samples are drawn with, or a preset, see
            :class:`PromptMixture`; None takes the prompt alone.
        text_dropout: share of training samples that see the empty prompt, which guidance needs.
        min_snr_gamma: bound of the min-SNR weights; None weighs all steps alike.
        guidance_scale: of classifier-free guidance; 1 is none, and half the work.
        num_steps: sampling steps.
        shared_noises: how many noises all conditions share: the k-th sample of each takes the k-th noise, and after the
            last the first again. None gives each sample its own, of its seed.
        scheduler: diffusers' scheduler of the training noise (variance-preserving), on the base's schedule.
        scheduler_args: its arguments; the sampler follows them where it has them too.
        sampler: diffusers' scheduler that samples.
        sampler_args: its arguments.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        adherence: checkpoint of a :class:`Segmenter` or :class:`DMoESegmenter`, which validation finds the requested
            mask with; what it finds then chooses the best checkpoint.
        num_validation_samples: samples that each validation generates, over all devices.
        reference_behaviour: restore what the table below says, FairDiff's for masks and DiffBoost's for edges.
        compile: compile UNet and control branch in place before the first step.
        optimizer: built on the trainable parameters.
        lr_scheduler: built on the optimizer.
        lr_interval: when the scheduler steps.

    Shapes:
        image (B, C, H, W) in [0, 1]; mask (B, 1, H, W) class indices; edge (B, 1, H, W) in [0, 1]; latents
        (B, c, H / f, W / f); prompts (B, L, D).

    Logs:
        ``train/loss``, ``val/loss`` and, with ``adherence``, ``val/adherence`` and ``val/adherence/class_<k>``: Dice of
        the requested mask and the one found in the generated image, mean over samples and foreground classes.

    Differences from the reference:
        ==================  =============================  =============================  =============================
        What                Reference code                 Here                           To restore
        ==================  =============================  =============================  =============================
        groups              one model for each             one model, group in the        ``prompt`` without ``{group}``
                                                           prompt                         and ``groups`` of the data
        quality words       "low quality, blurry" in the   in ``negative_prompt``         ``reference_behaviour``, or
                            positive prompt (FairDiff)                                    ``prompt_mixture: fairdiff``
        prompt of samples   4.5 % of the embedding, 95 %   all of it                      ``reference_behaviour``, or
                            "gray, sketch" (DiffBoost)                                    ``prompt_mixture: diffboost``
        empty prompt        never trained, yet guided by   ``text_dropout``               ``reference_behaviour``
        mask resizing       bilinear, mixes colours; any   nearest; aspect ratio kept     ``reference_behaviour``
                            aspect ratio
        grey images         BT.601 of three channels       their mean (DiffBoost)         not offered
        sampling noise      one seed for a whole run       each sample's own seed         not offered
                            50 for every slice             each sample's own              ``reference_behaviour``, or
                            (DiffBoost)                                                   ``shared_noises: 50``
        checkpoints         all weights                    the trained ones               not offered
        ==================  =============================  =============================  =============================
    """

    def __init__(
        self,
        base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        base_args: dict[str, Any] | None = None,
        pretrained: bool = True,
        controlnet: str | None = None,
        trained: Literal["controlnet", "controlnet+decoder", "all"] = "controlnet",
        num_classes: int = 2,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 512,
        num_groups: dict[str, int] | None = None,
        attribute: str | None = None,
        group_names: list[str] | None = None,
        condition: Literal["one_hot", "colours", "edge"] = "one_hot",
        prompt: str | None = "",
        learned_prompts: list[str] | None = None,
        negative_prompt: str = "",
        prompt_mixture: dict[str, float] | Preset | None = None,
        text_dropout: float = 0.1,
        min_snr_gamma: float | None = None,
        guidance_scale: float = 9.0,
        num_steps: int = 20,
        shared_noises: int | None = None,
        scheduler: str = "DDPMScheduler",
        scheduler_args: dict[str, Any] | None = None,
        sampler: str = "DDIMScheduler",
        sampler_args: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        adherence: str | None = None,
        num_validation_samples: int = 8,
        reference_behaviour: bool = False,
        compile: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["step", "epoch"] = "step",
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_interval, num_validation_samples)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if base == TINY and trained != "all":
            raise ValueError(f"trained='{trained}': base='{TINY}' has no trained weights to keep; train 'all' of it.")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.text_dropout = 0.0 if reference_behaviour else text_dropout
        named = GROUP in (prompt or "")
        self.attribute = chosen_attribute(attribute, num_groups or {}, needed=named)
        self._named_groups = {str(self.attribute): (num_groups or {})[str(self.attribute)]} if named else {}
        parts = load_base(base, in_channels, base_args or {}, pretrained)
        self.unet, self.vae, self.factor = parts.unet, parts.vae, parts.factor
        parts.check_images(self.image_size, in_channels)
        if reference_behaviour and prompt_mixture is None and parts.prompts is not None:
            prompt_mixture = "diffboost" if condition == "edge" else "fairdiff"
        mixture = None if prompt_mixture is None else PromptMixture(prompt_mixture)
        self.shared_noises = SHARED_NOISES if reference_behaviour and condition == "edge" else shared_noises
        if self.shared_noises is not None and self.shared_noises < 1:
            raise ValueError(f"shared_noises={shared_noises}: give 1 or more, or None for each sample's own noise.")
        count, width = sum(self._named_groups.values()), self.unet.config.cross_attention_dim
        learned = (parts.texts, parts.learned)
        self.prompts = Prompts(prompt, count, parts.prompts, width, negative_prompt, mixture, *learned)
        if learned_prompts is not None:
            self.learn_prompts(learned_prompts)
        self.prompts.names = group_names
        if parts.learned is None:
            self.prompts.check_guidance(guidance_scale, self.text_dropout)
        self.condition = Condition(condition, num_classes, self.image_size, blended=reference_behaviour)
        self.controlnet = build_controlnet(
            controlnet, self.unet, self.factor, self.condition.channels, silent=parts.trained
        )
        self._schedule = SimpleNamespace(config={**parts.noise, **(scheduler_args or {})})
        self.training_cases = saved_training_cases(base, controlnet)
        self.noise = build_training_scheduler(scheduler, scheduler_args, like=self._schedule)
        self.make_sampler()  # so that a wrong name or argument is found now
        self._freeze(trained)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.controlnet.enable_gradient_checkpointing()
        if adherence is not None and num_validation_samples:
            self.monitor, self.monitor_mode = "val/adherence", "max"
        self._judge: MaskJudge | None = None
        self._checked = False

    def make_sampler(self) -> Any:
        """A new scheduler for sampling, along the noise of training."""
        return build_scheduler(self.hparams["sampler"], self.hparams["sampler_args"], like=self._schedule)

    def setup(self, stage: str) -> None:
        """Check that the data are what the networks were built for, learn the groups' names, and compile."""
        data: Any = getattr(self.trainer, "datamodule", None)
        h, self._checked = self.hparams, False
        facts = {name: h[name] for name in ("num_classes", "in_channels")}
        check_data(data, self._named_groups, **facts, image_size=self.image_size)
        if stage == "predict" and self._named_groups:
            check_requests(data, self.attribute)
        if h["group_names"] is None and self._named_groups and hasattr(data, "attribute_groups"):
            h["group_names"] = self.prompts.names = list(data.attribute_groups[self.attribute])
        if stage == "fit" and self.prompts.encoder is None:
            self.learn_prompts_of(data)
        if stage in ("fit", "validate") and h["adherence"] is not None and self._judge is None:
            self._judge = MaskJudge(h["adherence"], h["num_classes"], h["in_channels"])
        if h["compile"]:
            self.unet.compile()
            self.controlnet.compile()

    def forward(self, noisy: Tensor, steps: Tensor, prompts: Tensor, condition: Tensor) -> Tensor:
        """What the network predicts (B, c, h, w) for noisy latents at steps (B,)."""
        noisy, prompts, condition = (given.to(self.unet.dtype) for given in (noisy, prompts, condition))
        down, middle = self.controlnet(noisy, steps, prompts, condition, return_dict=False)
        predicted: Tensor = self.unet(
            noisy,
            steps,
            prompts,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return predicted

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Mean squared error of the prediction, weighted by step when ``min_snr_gamma`` is given."""
        self._check_batch(batch)
        random = self.draws(batch)
        clean = self.encode(batch["image"], random)
        noise = gaussian(clean, random)
        steps = timesteps(clean, self.noise.config.num_train_timesteps, random)
        prompts = self._prompts_of(batch)
        if self.training:
            prompts = self.prompts.drop(prompts, self.text_dropout)
            if self.prompts.learned is not None:
                self.prompts.mark_trained(self.prompts.rows(self._own_prompts(batch)), self.text_dropout)
        predicted = self(add_noise(self.noise, clean, noise, steps), steps, prompts, self.condition(batch))
        error = F.mse_loss(predicted.float(), training_target(self.noise, clean, noise, steps), reduction="none")
        each, gamma = error.flatten(1).mean(1), self.hparams["min_snr_gamma"]
        return {"loss": (each if gamma is None else each * min_snr_weights(self.noise, steps, gamma)).mean()}

    def validation_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        """Losses, a few samples, and how well these follow their masks."""
        output = super().validation_step(batch, batch_idx)
        if self._judge is not None and output["generated"] is not None:
            self._judge.update(output["generated"])
        return output

    def on_validation_epoch_end(self) -> None:
        """Log how well the samples followed their masks."""
        super().on_validation_epoch_end()
        if self._judge is not None and self.num_validation_samples and not self.trainer.sanity_checking:
            values = {f"val/{name}": value for name, value in self._judge.compute().items()}
            self.log_dict(values, sync_dist=True)

    @torch.no_grad()
    def generate(self, requests: Sample) -> dict[str, Any]:
        """Images (B, C, H, W) in [0, 1] for requests with condition, ``seed`` and ``round``, and masks of that size."""
        self._check_keys(requests)
        self.condition.check_values(requests)
        mixture, shared = self.prompts.mixture, self.shared_noises
        rounds = rounds_of(requests, needed=bool(shared or (mixture and mixture.counts_rounds)))
        seeds = requests["seed"] if shared is None else rounds % shared
        if self.prompts.learned is not None:
            rows = self.prompts.rows(self._own_prompts(requests))
            self.check_trained(rows, guided=self.hparams["guidance_scale"] != 1)
        images = self.sample(self.condition(requests), self._prompts_of(requests, rounds), seeds)
        made = {"image": images}
        return made | ({"mask": resize_labels(requests["mask"], self.image_size)} if "mask" in requests else {})

    @torch.no_grad()
    def sample(self, condition: Tensor, prompts: Tensor, seeds: Tensor, num_steps: int | None = None) -> Tensor:
        """Draw images, each from its own seed.

        Args:
            condition: what the control branch sees (B, K, H, W), see ``condition``.
            prompts: embeddings (B, L, D).
            seeds: int64 (B,).
            num_steps: sampling steps; ``num_steps`` of the module when None.

        Returns:
            (B, C, H, W) in [0, 1].
        """
        scale, count = self.hparams["guidance_scale"], len(seeds)
        if scale != 1:
            negative = self.prompts.negative(self.device).expand_as(prompts)
            condition, prompts = torch.cat([condition, condition]), torch.cat([negative, prompts])

        def predict(noisy: Tensor, step: Tensor) -> Tensor:
            both = torch.cat([noisy] * (len(prompts) // count))
            predicted: Tensor = self(both, step.expand(len(both)), prompts, condition).float()
            return guide(predicted, scale) if scale != 1 else predicted

        height, width = (side // self.factor for side in self.image_size)
        shape = (count, self.unet.config.in_channels, height, width)
        random = generators(seeds)
        start = gaussian(torch.empty(shape, dtype=torch.float32, device=self.device), random)
        return self.decode(denoise(self.make_sampler(), predict, start, num_steps or self.hparams["num_steps"], random))

    @torch.no_grad()
    def encode(self, image: Tensor, generator: Generators | None = None) -> Tensor:
        """Scaled latents of images (B, C, H, W) in [0, 1], a sample of the autoencoder's posterior."""
        pixels = (image * 2 - 1).expand(-1, self.vae.config.in_channels, -1, -1)
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        drawn: Tensor = posterior.sample(list(generator) if generator is not None else None)
        return drawn.float() * float(self.vae.config.scaling_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of scaled latents."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pixels: Tensor = self.vae.decode(scaled, return_dict=False)[0]
        if self.hparams["in_channels"] == 1:
            pixels = pixels.mean(1, keepdim=True)
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def load_reference_weights(self, source: Source) -> LoadReport:
        """Load a whole checkpoint in the original ``cldm`` layout, as FairDiff's and DiffBoost's code writes it.

        Control branch and UNet must be there; autoencoder and text encoder are loaded where they are. When anything
        does not fit, nothing is loaded.

        Raises:
            ValueError: when a part is missing altogether.
            CheckpointMismatchError: naming every missing, unexpected or misshapen tensor.
        """
        state, name, before = read_state_dict(source), describe(source), self._fingerprint()
        report = load_cldm([self.controlnet, self.unet], state, name, self.vae, self.prompts.encoder)
        if not torch.equal(before, self._fingerprint()):
            rank_zero_warn(
                f"{name} changed weights that are frozen here and that checkpoints do not hold. Call "
                f"save_pretrained(folder) and go on with base=folder, or train with trained='all'."
            )
        return report

    def reference_weights(self) -> dict[str, Tensor]:
        """Control branch and UNet in the original ``cldm`` layout; :meth:`load_reference_weights` reads them."""
        return to_cldm(self.controlnet, self.unet)

    def to_pipeline(self) -> Any:
        """A ``StableDiffusionControlNetPipeline`` of these networks (not of copies).

        A base without a text encoder has no tokenizer either: give ``prompt_embeds``, rows of ``prompts.learned``.
        """
        return make_pipeline(self.unet, self.vae, self.controlnet, self.make_sampler(), self.prompts.encoder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the pipeline in diffusers' layout, with learned prompts as ``prompts.safetensors``.

        ``StableDiffusionControlNetPipeline.from_pretrained(folder)`` reads it; a base without a text encoder, as the
        tiny one, needs ``text_encoder=None, tokenizer=None`` there. This module reads it with
        ``base=folder, controlnet=folder/controlnet``, learned prompts included. Either folder tells which cases were
        trained on, where that is known.
        """
        save_pipeline(Path(folder), self.to_pipeline(), self.prompts, self.training_cases)

    def _prompts_of(self, batch: Sample, rounds: Tensor | None = None) -> Tensor:
        """Embeddings (B, L, D) of the samples' prompts; with rounds (B,), in sampling, of what the mixture makes."""
        rounds = rounds if self.prompts.mixture is not None else None
        own = self._own_prompts(batch)
        if not isinstance(own, Tensor):
            return self.prompts.encode(own, self.device, rounds)
        if rounds is not None:
            return self.prompts.encode(self.prompts.texts(own), self.device, rounds)
        prompts: Tensor = self.prompts(own)
        return prompts

    def _own_prompts(self, batch: Sample) -> list[str] | Tensor:
        """The texts that samples bring, where these are read, or their groups (B,), which tell the prompt."""
        if self.prompts.reads_texts and "prompt" in batch:
            return list(batch["prompt"])
        if self._named_groups:
            return group_of(batch, str(self.attribute))
        return torch.zeros(len(batch["id"]), dtype=torch.int64, device=self.device)

    def _freeze(self, trained: str) -> None:
        if trained == "all":
            self.freeze_parts(self.vae)
        elif trained == "controlnet":
            self.freeze_parts(self.vae, self.unet)
        else:
            decoder = (self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out)
            self.freeze_parts(self.vae, self.unet, but=decoder)

    def _fingerprint(self) -> Tensor:
        """A number for each tensor that checkpoints do not hold."""
        frozen = [p for p in self.parameters() if not p.requires_grad]
        frozen += self.prompts.encoder.encoder.parameters() if self.prompts.encoder else []
        return torch.tensor([float(p.double().sum()) for p in frozen])

    def _check_batch(self, batch: Sample) -> None:
        """Check a training batch; on an accelerator only the first one's values, which would make every step wait."""
        self._check_keys(batch)
        self.condition.check_sizes(batch)
        if not self._checked or batch["image"].device.type == "cpu":
            self.condition.check_values(batch)
            self._checked = True

    def _check_keys(self, batch: Sample) -> None:
        self.condition.check_key(batch)
        self.prompts.check_batch(batch)
