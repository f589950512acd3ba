"""ControlNet: images for masks or edges, by any Stable Diffusion of diffusers or a tiny one in pixels."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from fairdiff_lightning.data.native import atomic_path
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.diffusion import build_scheduler, gaussian, generators, timesteps, training_target
from fairdiff_lightning.diffusion.guidance import guide
from fairdiff_lightning.diffusion.noise import Generators
from fairdiff_lightning.diffusion.weighting import min_snr_weights
from fairdiff_lightning.modules.adherence import MaskJudge
from fairdiff_lightning.modules.data_facts import check_data, chosen_attribute
from fairdiff_lightning.modules.generative import GenerativeModule
from fairdiff_lightning.networks.checkpoint import LoadReport, Source, check_state_dict, describe, read_state_dict
from fairdiff_lightning.networks.cldm import load_cldm, load_cldm_autoencoder, load_cldm_text_encoder, to_cldm
from fairdiff_lightning.networks.condition import blended_colours, check_labels, colours, one_hot, resize_labels
from fairdiff_lightning.networks.controlnet import build_controlnet
from fairdiff_lightning.networks.latent_diffusion import TINY, load_base
from fairdiff_lightning.networks.prompts import GROUP, Prompts

REFERENCE_SUFFIX = ", low quality, blurry"
"""What FairDiff's sampling script adds to the positive prompt."""
PROMPT_FILE = "prompts.safetensors"


class ControlNetSynth(GenerativeModule):
    """Image synthesis under masks or edge maps, with a prompt that names the patient's group.

    Li et al., *FairDiff: Fair Segmentation with Point-Image Diffusion*, MICCAI 2024, arXiv:2407.06250 (masks), and
    Zhang et al., *DiffBoost: Enhancing Medical Image Segmentation via Text-Guided Diffusion Model*, IEEE TMI 2024,
    arXiv:2310.12868 (edges); both are ControlNets (Zhang et al., ICCV 2023, arXiv:2302.05543) on Stable Diffusion 1.5.

    Args:
        base: hub id or local folder of a Stable Diffusion in diffusers' layout, or ``tiny``, a small one in pixels that
            is built from its configuration and trains on a CPU (with ``trained="all"``).
        base_args: of the tiny base: arguments of ``UNet2DConditionModel``, ``patch_size`` and ``scaling_factor``.
        pretrained: load the weights of UNet and autoencoder of ``base``; False needs their configurations alone.
        controlnet: what the control branch starts from: None grows it from the UNet; else a folder or hub id of
            diffusers, or a file in the original ``cldm`` layout.
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
        prompt: text for all, with ``{group}`` where the group's name goes; None takes each sample's own ``prompt``.
        negative_prompt: what guidance leads away from.
        text_dropout: share of training samples that see the empty prompt, which guidance needs.
        min_snr_gamma: bound of the min-SNR weights; None weighs all steps alike.
        guidance_scale: of classifier-free guidance; 1 is none, and half the work.
        num_steps: sampling steps.
        scheduler: diffusers' scheduler of the training noise, on the base's schedule.
        scheduler_args: its arguments; the sampler follows them where it has them too.
        sampler: diffusers' scheduler that samples.
        sampler_args: its arguments.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        adherence: checkpoint of a :class:`Segmenter` or :class:`DMoESegmenter`, which validation finds the requested
            mask with.
        num_validation_samples: samples that each validation generates, over all devices.
        reference_behaviour: restore what the table below says.
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
        What                Reference code (FairDiff)      Here                           To restore
        ==================  =============================  =============================  =============================
        groups              one model for each             one model, group in the        ``prompt`` without ``{group}``
                                                           prompt                         and ``groups`` of the data
        quality words       "low quality, blurry" in the   in ``negative_prompt``         ``reference_behaviour``
                            positive prompt
        empty prompt        never trained, yet guided by   ``text_dropout``               ``reference_behaviour``
        mask resizing       bilinear, mixes colours; any   nearest; aspect ratio kept     ``reference_behaviour``
                            aspect ratio
        grey images         BT.601 of three channels       their mean (DiffBoost)         not offered
        sampling noise      one seed for a whole run       each sample's own seed         not offered
        checkpoints         all weights                    the trained ones               ``trained="all"``
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
        negative_prompt: str = "",
        text_dropout: float = 0.1,
        min_snr_gamma: float | None = None,
        guidance_scale: float = 9.0,
        num_steps: int = 20,
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
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.text_dropout = 0.0 if reference_behaviour else text_dropout
        if base == TINY and trained != "all":
            raise ValueError(f"trained='{trained}': base='{TINY}' has no trained weights to keep; train 'all' of it.")
        parts = load_base(base, in_channels, base_args or {}, pretrained)
        self.unet, self.vae, self.factor = parts.unet, parts.vae, parts.factor
        self.prompts = Prompts(
            prompt,
            sum(self._prompted_groups().values()),
            parts.prompts,
            self.unet.config.cross_attention_dim,
            negative_prompt,
            REFERENCE_SUFFIX if reference_behaviour else "",
        )
        self.prompts.names = group_names
        channels = num_classes if condition == "one_hot" else 3
        self.controlnet = build_controlnet(controlnet, self.unet, self.factor, channels, silent=parts.trained)
        self._check_sizes()
        self._schedule = SimpleNamespace(config={**parts.noise, **(scheduler_args or {})})
        self.noise = build_scheduler(scheduler, scheduler_args, like=self._schedule)
        self.make_sampler()  # so that a wrong name or argument is found now
        self._frozen = self._freeze(trained)
        self.train(self.training)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.controlnet.enable_gradient_checkpointing()
        self._judge: MaskJudge | None = None
        self._checked = False

    def make_sampler(self) -> Any:
        """A new scheduler for sampling, along the noise of training."""
        return build_scheduler(self.hparams["sampler"], self.hparams["sampler_args"], like=self._schedule)

    def setup(self, stage: str) -> None:
        """Check that the data are what the networks were built for, learn the groups' names, and compile."""
        data: Any = getattr(self.trainer, "datamodule", None)
        facts = {name: self.hparams[name] for name in ("num_classes", "in_channels")}
        check_data(data, self._prompted_groups(), **facts, image_size=self.image_size)
        self._checked = False
        h = self.hparams
        if h["group_names"] is None and self.prompts.num_groups and hasattr(data, "attribute_groups"):
            h["group_names"] = self.prompts.names = list(data.attribute_groups[self.attribute])
        if h["adherence"] is not None and self._judge is None:
            self._judge = MaskJudge(h["adherence"], h["num_classes"], h["in_channels"])
        if h["compile"]:
            self.unet.compile()
            self.controlnet.compile()

    @property
    def attribute(self) -> str | None:
        """The attribute whose groups the prompt names."""
        chosen: str | None = self.hparams["attribute"]
        return chosen or next(iter(self.hparams["num_groups"] or {}), None)

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
        random = generators(batch["seed"]) if "seed" in batch else None
        clean = self.encode(batch["image"], random)
        noise = gaussian(clean, random)
        steps = timesteps(clean, self.noise.config.num_train_timesteps, random)
        prompts = self._prompts_of(batch)
        if self.training:
            prompts = self._drop(prompts)
        predicted = self(self.noise.add_noise(clean, noise, steps), steps, prompts, self.condition(batch))
        error = F.mse_loss(predicted.float(), training_target(self.noise, clean, noise, steps), reduction="none")
        each, gamma = error.flatten(1).mean(1), self.hparams["min_snr_gamma"]
        return {"loss": (each if gamma is None else each * min_snr_weights(self.noise, steps, gamma)).mean()}

    def validation_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        """Losses, a few samples, and how well these follow their masks."""
        output = super().validation_step(batch, batch_idx)
        if self._judge is not None and output["generated"] is not None:
            dice = self._judge(output["generated"])
            named = {f"val/adherence/class_{k + 1}": value for k, value in enumerate(dice.nanmean(0))}
            named["val/adherence"] = dice.nanmean(1).nanmean()
            self.log_dict(named, batch_size=len(dice), sync_dist=True)
        return output

    @torch.no_grad()
    def generate(self, requests: Sample) -> dict[str, Any]:
        """Images (B, C, H, W) in [0, 1] for requests with ``seed`` and a condition, and their masks at that size."""
        self._check_keys(requests)
        self._check_values(requests)
        images = self.sample(self.condition(requests), self._prompts_of(requests, sampling=True), requests["seed"])
        made = {"image": images}
        return made | ({"mask": resize_labels(requests["mask"], self.image_size)} if "mask" in requests else {})

    @torch.no_grad()
    def sample(self, condition: Tensor, prompts: Tensor, seeds: Tensor, num_steps: int | None = None) -> Tensor:
        """Draw images, each from its own seed.

        Args:
            condition: what the control branch sees (B, K, H, W), see :meth:`condition`.
            prompts: embeddings (B, L, D).
            seeds: int64 (B,).
            num_steps: sampling steps; ``num_steps`` of the module when None.

        Returns:
            (B, C, H, W) in [0, 1].
        """
        random, sampler = generators(seeds), self.make_sampler()
        sampler.set_timesteps(num_steps or self.hparams["num_steps"], device=self.device)
        scale = self.hparams["guidance_scale"]
        if scale != 1:
            negative = self.prompts.negative(self.device).expand_as(prompts)
            condition, prompts = torch.cat([condition, condition]), torch.cat([negative, prompts])
        height, width = (side // self.factor for side in self.image_size)
        latents = torch.empty(len(seeds), self.unet.config.in_channels, height, width, device=self.device)
        latents = gaussian(latents, random) * sampler.init_noise_sigma
        for step in sampler.timesteps:
            noisy = sampler.scale_model_input(torch.cat([latents] * (len(prompts) // len(latents))), step)
            predicted = self(noisy, step.expand(len(noisy)), prompts, condition).float()
            latents = _step(sampler, guide(predicted, scale) if scale != 1 else predicted, step, latents, random)
        return self.decode(latents)

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

    def condition(self, batch: Sample) -> Tensor:
        """What the control branch sees (B, K, H, W) in [0, 1], at the size of the images."""
        kind, num_classes = self.hparams["condition"], self.hparams["num_classes"]
        if kind == "edge":
            return batch["edge"].expand(-1, 3, -1, -1)
        if kind == "colours" and self.hparams["reference_behaviour"]:
            return blended_colours(batch["mask"], num_classes, self.image_size)
        mask = resize_labels(batch["mask"], self.image_size)
        return colours(mask, num_classes) if kind == "colours" else one_hot(mask, num_classes)

    def train(self, mode: bool = True) -> ControlNetSynth:
        """Switch to training; what is frozen stays in evaluation."""
        super().train(mode)
        for module in getattr(self, "_frozen", ()):
            module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained; the rest comes from ``base`` again."""
        kept = self._trained_names()
        checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say by name what does not fit when the checkpoint is of another part or architecture; add what is frozen."""
        kept, state = self._trained_names(), self.state_dict()
        check_state_dict(checkpoint["state_dict"], {name: state[name] for name in kept}, "checkpoint")
        checkpoint["state_dict"] = {**state, **checkpoint["state_dict"]}

    def load_reference_weights(self, source: Source) -> LoadReport:
        """Load a whole checkpoint in the original ``cldm`` layout, as FairDiff's and DiffBoost's code writes it.

        Control branch and UNet must be there; autoencoder and text encoder are loaded where they are.

        Raises:
            ValueError: when a part is missing altogether.
            CheckpointMismatchError: naming every missing, unexpected or misshapen tensor.
        """
        state, name, before = read_state_dict(source), describe(source), self._fingerprint()
        loaded = (*load_cldm(self.controlnet, state, name), *load_cldm(self.unet, state, name))
        loaded += load_cldm_autoencoder(self.vae, state, name)
        if self.prompts.encoder is not None:
            loaded += load_cldm_text_encoder(self.prompts.encoder, state, name)
        if not torch.equal(before, self._fingerprint()):
            rank_zero_warn(
                f"{name} changed weights that are frozen here and that checkpoints do not hold. Call "
                f"save_pretrained(folder) and go on with base=folder, or train with trained='all'."
            )
        return LoadReport(name, loaded, tuple(key for key in state if key not in set(loaded)))

    def reference_weights(self) -> dict[str, Tensor]:
        """Control branch and UNet in the original ``cldm`` layout; :meth:`load_reference_weights` reads them."""
        return to_cldm(self.controlnet, self.unet)

    def to_pipeline(self) -> Any:
        """A ``StableDiffusionControlNetPipeline`` of these networks (not of copies).

        A base without a text encoder has no tokenizer either: give ``prompt_embeds``, rows of ``prompts.learned``.
        """
        from diffusers import StableDiffusionControlNetPipeline

        return StableDiffusionControlNetPipeline(  # type: ignore[no-untyped-call]
            vae=self.vae,
            text_encoder=getattr(self.prompts.encoder, "encoder", None),
            tokenizer=getattr(self.prompts.encoder, "tokenizer", None),
            unet=self.unet,
            controlnet=self.controlnet,
            scheduler=self.make_sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the pipeline in diffusers' layout, with learned prompts as ``prompts.safetensors``.

        ``StableDiffusionControlNetPipeline.from_pretrained(folder)`` reads it, and so does this module with
        ``base=folder, controlnet=folder/controlnet``.
        """
        from safetensors.torch import save_file

        self.to_pipeline().save_pretrained(str(folder))
        if self.prompts.learned is not None:
            with atomic_path(Path(folder) / PROMPT_FILE) as temporary:
                save_file({"prompts": self.prompts.learned.detach().cpu().contiguous()}, str(temporary))

    def _prompts_of(self, batch: Sample, sampling: bool = False) -> Tensor:
        """Embeddings (B, L, D) of the samples' prompts."""
        if self.prompts.template is None:
            return self.prompts.encode(list(batch["prompt"]), self.device)
        group = torch.zeros(len(batch["id"]), dtype=torch.int64, device=self.device)
        if self.prompts.num_groups:
            group = batch["attributes"][str(self.attribute)]
        prompts: Tensor = self.prompts(group, sampling)
        return prompts

    def _drop(self, prompts: Tensor) -> Tensor:
        """The empty prompt instead of a share of the prompts."""
        if not self.text_dropout:
            return prompts
        dropped = torch.rand(len(prompts), 1, 1, device=prompts.device) < self.text_dropout
        return torch.where(dropped, self.prompts.empty(self.device), prompts)

    def _freeze(self, trained: str) -> tuple[nn.Module, ...]:
        """Freeze what is not trained, and name the modules that stay in evaluation."""
        self.vae.requires_grad_(False)
        if trained == "all":
            return (self.vae,)
        self.unet.requires_grad_(False)
        if trained == "controlnet":
            return (self.vae, self.unet)
        for module in (self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out):
            module.requires_grad_(True)
        return (self.vae, self.unet.down_blocks, self.unet.mid_block)

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _fingerprint(self) -> Tensor:
        """A number for each tensor that checkpoints do not hold."""
        frozen = [p for p in self.parameters() if not p.requires_grad]
        frozen += self.prompts.encoder.encoder.parameters() if self.prompts.encoder else []
        return torch.tensor([float(p.double().sum()) for p in frozen])

    def _prompted_groups(self) -> dict[str, int]:
        """The attribute that the prompt names and its number of groups; empty when it names none."""
        if GROUP not in (self.hparams["prompt"] or ""):
            return {}
        num_groups: dict[str, int] = self.hparams["num_groups"] or {}
        attribute = chosen_attribute(self.hparams["attribute"], num_groups, needed=True)
        return {str(attribute): num_groups[str(attribute)]}

    def _check_sizes(self) -> None:
        if any(side % self.factor for side in self.image_size):
            raise ValueError(f"image_size {self.image_size}: the base needs sides that are multiples of {self.factor}.")
        wanted, given = self.vae.config.in_channels, self.hparams["in_channels"]
        if given not in (1, wanted):
            raise ValueError(
                f"in_channels {given}: the base makes images of {wanted} channels, which serve 1 or {wanted}."
            )

    def _check_batch(self, batch: Sample) -> None:
        """Check a training batch; on an accelerator only the first one's values, which would make every step wait."""
        self._check_keys(batch)
        for name in ("image", self._condition_key):
            size = tuple(batch[name].shape[-2:])  # type: ignore[literal-required]
            if size != self.image_size and not self._any_aspect(name):
                raise ValueError(
                    f"'{name}' of sample {batch['id'][0]!r} has size {size}; image and {self._condition_key} must have "
                    f"image_size, {self.image_size}."
                )
        if not self._checked or batch["image"].device.type == "cpu":
            self._check_values(batch)
            self._checked = True

    def _check_keys(self, batch: Sample) -> None:
        wanted = {self._condition_key: f"condition='{self.hparams['condition']}'"}
        if self.hparams["prompt"] is None:
            wanted["prompt"] = "prompt=None"
        for key, reason in wanted.items():
            if key not in batch:
                raise ValueError(f"'{batch['id'][0]}' has {sorted(batch)}; {reason} needs '{key}'.")

    def _check_values(self, batch: Sample) -> None:
        """Check what the control branch is given; this waits for the device."""
        key = self._condition_key
        where = f"'{key}' of {batch['id'][0]!r}"
        if key == "mask":
            check_labels(batch["mask"], self.hparams["num_classes"], self.image_size, where, self._any_aspect(key))
        elif tuple(batch["edge"].shape[1:]) != (1, *self.image_size):
            raise ValueError(f"{where} has shape {tuple(batch['edge'].shape)}; expected is (B, 1, *{self.image_size}).")

    @property
    def _condition_key(self) -> str:
        return "edge" if self.hparams["condition"] == "edge" else "mask"

    def _any_aspect(self, key: str) -> bool:
        """The reference resizes masks of any size and aspect ratio."""
        return key == "mask" and bool(self.hparams["reference_behaviour"])


def _step(sampler: Any, predicted: Tensor, step: Tensor, latents: Tensor, generator: list[torch.Generator]) -> Tensor:
    """One step of the sampler, with the samples' own noise where it draws any."""
    draws = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
    moved: Tensor = sampler.step(predicted, step, latents, **draws, return_dict=False)[0]
    return moved
