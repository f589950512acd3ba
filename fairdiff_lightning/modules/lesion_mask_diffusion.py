"""LeFusion's DiffMask: lesion masks of an asked size and place, inside of a boundary."""

from __future__ import annotations

import warnings
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.data.seeding import derive_seed
from fairdiff_lightning.diffusion import (
    add_noise,
    class_masks,
    gaussian,
    generators,
    inpaint,
    timesteps,
    training_target,
)
from fairdiff_lightning.diffusion.control_sphere import (
    SphereEncoding,
    check_room,
    check_spheres,
    control_sphere,
    draw_spheres,
    encode_spheres,
    sphere_agreement,
)
from fairdiff_lightning.diffusion.lesion_cleanup import REFERENCE_ZOOM, clean_lesions
from fairdiff_lightning.losses.lesion import Norm
from fairdiff_lightning.modules.data_facts import check_data
from fairdiff_lightning.modules.lesion_diffusion import LesionDiffusion
from fairdiff_lightning.modules.training_pass import over_training
from fairdiff_lightning.networks.checkpoint import LoadReport, Source
from fairdiff_lightning.networks.lesion_backbones import Backbone, build_lesion_network
from fairdiff_lightning.networks.lesion_weights import Weights
from fairdiff_lightning.networks.sphere_bank import SphereBank

REFERENCE: dict[str, Any] = {
    "loss": "l1",
    "num_steps": 300,
    "sampler": "DDPMScheduler",
    "eta": 0.0,
    "sphere_encoding": "uint8_wrap",
    "cleanup": True,
}
"""What the authors' code does."""

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
ATTEMPTS = 3
"""Draws of a mask that comes out empty, the first included."""


class LesionMaskDiffusion(LesionDiffusion):
    """Lesion masks by diffusion, steered by a sphere for size and place and by a boundary that they stay inside of.

    DiffMask of Zhang et al., *LeFusion: Controllable Pathology Synthesis via Lesion-Focused Diffusion Models*, ICLR
    2025, arXiv:2403.14066. What :class:`~fairdiff_lightning.modules.LeFusionInpaint` paints into scans can come from
    here.

    Args:
        image_size: height, width and depth of the masks, voxels.
        num_classes: classes of the mask, the background included.
        lesion_classes: classes that are synthesised, each in a channel of its own; all but the background and those of
            ``boundary_classes`` when None. One sphere is around all of them.
        boundary_classes: with the lesion classes, the region that a lesion may lie in, such as (2,), the myocardium of
            Emidec. Where a lesion was, a mask that is followed becomes the first of them. None for no such region.
        width: channels of the network at full resolution.
        multipliers: of the width at each level.
        backbone: ``lesion_unet``, LeFusion's own, or ``diffusion_unet``, MONAI's, which halves the depth too.
        network_args: further arguments of the network, such as ``heads``.
        loss: absolute (``l1``) or squared error (``l2``), over the whole volume.
        sphere_encoding: values of the sphere's channel, see
            :func:`~fairdiff_lightning.diffusion.control_sphere.encode_spheres`.
        cleanup: smooth what is generated and keep its largest part, see
            :func:`~fairdiff_lightning.diffusion.lesion_cleanup.clean_lesions`.
        radius_scale: of the spheres that are taken over from masks; above 1 asks for larger lesions.
        num_steps: levels of the sampling chain.
        eta: noise that DDIM adds on its way, 1 being as much as DDPM; None is 1 for DDIM and 0 for the others.
        scheduler: diffusers' scheduler of the training noise.
        scheduler_args: its arguments; without any of the noise, it is the cosine schedule of 300 steps.
        sampler: diffusers' scheduler that samples.
        sampler_args: its arguments.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        compile: compile the network in place before the first step.
        num_validation_samples: held-out lesions whose spheres each validation follows, over all devices.
        reference_behaviour: restore what the table below says.
        optimizer: built on the trainable parameters; Adam with lr 3e-4 in the authors' code.
        lr_scheduler: built on the optimizer.
        lr_interval: when the scheduler steps.

    Shapes:
        mask (B, 1, H, W, D) class indices; sphere (B, 4), the centre along H, W and D and the radius, voxels; boundary
        (B, 1, H, W, D), other than 0 where a lesion may lie.

    Logs:
        ``train/loss``, ``val/loss``; of masks that follow the spheres of held-out lesions: ``val/volume_ratio``, volume
        of the lesion by that of the sphere, and ``val/outside_sphere``, share of its voxels more than one voxel outside
        of the sphere, 0 for an empty one.

    Differences from the reference:
        ==================  ============================  ============================  ================================
        What                Reference code                Here                          To restore
        ==================  ============================  ============================  ================================
        sphere's channel    255 outside, bytes wrap       -1 outside                    ``sphere_encoding="uint8_wrap"``
        sphere of a lesion  cut to integers               exact, holds every voxel      ``reference_behaviour``
        boundary            none; the paper has one       at every step                 give none
        classes             one                           any number                    one lesion class
        sampling            300 levels                    50 levels of DDIM             ``num_steps``, ``sampler``
        grid of the result  1.5 times larger              that of the volume            ``reference_behaviour``
        empty prediction    the whole volume is lesion    empty, with a warning         not offered
        mask in bytes       background 255 in training    -1                            not offered
        loss "l2"           absolute error                squared error                 ``loss="l1"``
        weights             raw                           averaged with TrainableEMA    no callback
        all that is offered                                                             ``reference_behaviour``
        ==================  ============================  ============================  ================================

    Raises:
        ValueError: for classes that the mask does not have, sides that the network cannot halve, an unknown option, or
            ``reference_behaviour`` with a boundary or several lesion classes.
    """

    reference = REFERENCE
    measures = ("volume_ratio", "outside_sphere")

    def __init__(
        self,
        image_size: tuple[int, int, int] = (64, 64, 32),
        num_classes: int = 2,
        lesion_classes: tuple[int, ...] | None = None,
        boundary_classes: tuple[int, ...] | None = None,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 4, 8),
        backbone: Backbone = "lesion_unet",
        network_args: dict[str, Any] | None = None,
        loss: Norm = "l1",
        sphere_encoding: SphereEncoding = "signed",
        cleanup: bool = True,
        radius_scale: float = 1.0,
        num_steps: int = 50,
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
        self.boundary_classes = tuple(boundary_classes or ())
        self.adopt((k for k in range(1, num_classes) if k not in self.boundary_classes), self.boundary_classes)
        self._check_arguments()
        self.network = build_lesion_network(
            backbone,
            len(self.classes) + 1,
            len(self.classes),
            width=width,
            multipliers=multipliers,
            cond_dim=None,
            checkpointing=gradient_checkpointing,
            arguments=network_args,
            image_size=self.image_size,
        )
        self.bank = SphereBank()

    def setup(self, stage: str) -> None:
        """Check that the data are what the network was built for, and compile."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        check_data(data, {}, num_classes=self.hparams["num_classes"], image_size=self.image_size)
        if self.hparams["compile"]:
            self.network.compile()

    def on_fit_start(self) -> None:
        """Measure the spheres of the real lesions among the training samples, once."""
        if not len(self.bank.radii):
            (spheres,) = over_training(self, lambda batch: (self.spheres(batch["mask"]),))
            self.bank.measure(spheres)

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Error of the predicted noise of the lesion channels, given the sphere around the lesions."""
        random, masks = self.draws(batch), class_masks(batch["mask"], self.classes)
        clean, inside = masks.float() * 2 - 1, draw_spheres(self.spheres(batch["mask"]), masks.shape[2:])
        noise, steps = gaussian(clean, random), timesteps(clean, self.noise.config.num_train_timesteps, random)
        predicted = self._predict(add_noise(self.noise, clean, noise, steps), steps, self._encoded(inside))
        wanted = training_target(self.noise, clean, noise, steps)
        return {"loss": LOSSES[self.settings["loss"]](predicted, wanted)}

    def spheres(self, mask: Tensor) -> Tensor:
        """Spheres (B, 4) of the lesions in masks (B, 1, H, W, D) of class indices."""
        return control_sphere(class_masks(mask, self.classes), truncate=self.hparams["reference_behaviour"])

    @torch.no_grad()
    def generate(self, requests: Sample) -> dict[str, Any]:
        """Make lesion masks: ``mask`` (B, 1, H, W, D) int64 class indices.

        Args:
            requests: ``seed`` (B,), and ``mask`` (B, 1, H, W, D), ``sphere`` (B, 4) or both. Without ``sphere`` the new
                lesions follow the spheres of those in ``mask``; its classes that are no lesions stay in the result. For
                a ``mask`` without a lesion the size of a training lesion is drawn, and a place in the boundary, or the
                middle of the block.
                ``boundary`` (B, 1, H, W, D) says where lesions may lie, as does a ``mask`` if the module has
                ``boundary_classes``; of the two, what both allow.

        Raises:
            ValueError: for requests without sphere and mask, a sphere that asks for nothing, shapes that do not fit, or
                a boundary that leaves nothing of a sphere.
        """
        given = dict[str, Any](requests)
        mask, spheres = given.get("mask"), given.get("sphere")
        self._check_size("mask", mask, len(given["seed"]))
        self._check_size("boundary", given.get("boundary"), len(given["seed"]))
        boundary = self._boundary(given)
        if spheres is None:
            spheres = self._followed(mask, boundary, given)
        else:
            check_spheres(spheres, self.image_size)
        lesions = self._found(spheres, boundary, given["seed"].cpu())
        _warn_of_empty(lesions, given.get("id"))
        return {"mask": lesions if mask is None else self._placed(lesions, mask)}

    @torch.no_grad()
    def sample(self, spheres: Tensor, boundary: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        """Lesions in spheres.

        Args:
            spheres: (B, 4), the centre along H, W and D and the radius, voxels.
            boundary: (B, 1, H, W, D), other than 0 where a lesion may lie; everywhere when None.
            seeds: (B,) int64, of all noise of each sample; PyTorch's global generator when None.

        Returns:
            (B, 1, H, W, D) int64, lesion classes and 0.

        Raises:
            ValueError: as :meth:`generate`.
        """
        check_spheres(spheres, self.image_size)
        return self._draw(spheres, boundary, seeds)

    def validation_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        """Losses, and masks that follow the spheres of the first held-out lesions."""
        # without the images, so that nobody scores them as generated ones
        masks = cast(Sample, {key: value for key, value in batch.items() if key != "image"})
        output = super().validation_step(masks, batch_idx)
        made = output["generated"]
        if made is not None:
            self._measure(self.spheres(batch["mask"][: len(made["id"])]), made["mask"])
        return output

    def load_reference_weights(self, source: Source, weights: Weights = "raw") -> LoadReport:
        """Load the authors' ``diffmask.pt``; they generate with the ``raw`` weights and need ``uint8_wrap``.

        Raises:
            CheckpointMismatchError: naming every missing, unexpected or misshapen tensor.
        """
        if self.settings["sphere_encoding"] != "uint8_wrap":
            rank_zero_warn("The authors' network knows spheres in bytes alone: set sphere_encoding='uint8_wrap'.")
        return super().load_reference_weights(source, weights)

    def _draw(self, spheres: Tensor, boundary: Tensor | None, seeds: Tensor | None) -> Tensor:
        """Lesion classes (B, 1, H, W, D) in spheres that are known to be sound."""
        s, inside = self.settings, draw_spheres(spheres.float().to(self.device), self.image_size)
        free = self._free(inside, boundary)
        check_room(inside, free)
        channels = inpaint(
            self._predict,
            background=torch.full((len(inside), len(self.classes), *self.image_size), -1.0, device=self.device),
            mask=free,
            scheduler=self.make_sampler(),
            condition=self._encoded(inside),
            seeds=seeds,
            compose="after",
            **{name: s[name] for name in ("num_steps", "eta")},
        )
        lesions, strongest = (channels > 0).any(1, keepdim=True), channels.argmax(1, keepdim=True)
        if s["cleanup"]:
            zoom = REFERENCE_ZOOM if self.hparams["reference_behaviour"] else 1.0
            lesions = clean_lesions(lesions, free, zoom)
        classes = torch.tensor(self.classes, device=self.device)
        # the reference's larger grid has one class
        return lesions * (classes[strongest] if len(classes) > 1 else classes)

    def _found(self, spheres: Tensor, boundary: Tensor | None, seeds: Tensor) -> Tensor:
        """Lesions in spheres; one that comes out empty is drawn again, from a seed derived from its own."""
        lesions = self._draw(spheres, boundary, seeds)
        for attempt in range(1, ATTEMPTS):
            empty = (~(lesions > 0).flatten(1).any(1)).nonzero().flatten()
            if not len(empty):
                break
            again = torch.tensor([derive_seed("again", attempt, seed) for seed in seeds[empty.cpu()].tolist()])
            region = None if boundary is None else boundary[empty.to(boundary.device)]
            lesions[empty] = self._draw(spheres[empty.to(spheres.device)], region, again)
        return lesions

    def _followed(self, mask: Tensor | None, boundary: Tensor | None, given: dict[str, Any]) -> Tensor:
        """Spheres of the lesions of masks; where there are none, a drawn place in the boundary, or the middle."""
        if mask is None:
            raise ValueError(
                "the requests have neither 'sphere' (B, 4) nor 'mask' (B, 1, H, W, D); give the spheres that lesions "
                "are to lie in, or masks with lesions whose spheres are taken over."
            )
        scale = torch.tensor([1, 1, 1, self.hparams["radius_scale"]], device=mask.device)
        spheres = self.spheres(mask) * scale
        lacking = (spheres[:, 3] < 0).nonzero().flatten().cpu()
        if len(lacking):
            places = self._middle(len(mask)) if boundary is None else boundary
            seeds = torch.tensor([derive_seed("sphere", seed) for seed in given["seed"].cpu()[lacking].tolist()])
            spheres[lacking] = self.bank.draw(places[lacking].cpu(), generators(seeds)).to(spheres)
        return spheres

    def _middle(self, count: int) -> Tensor:
        """The middle voxel alone, (B, 1, H, W, D) bool: blocks are centred on their lesions."""
        places = torch.zeros(count, 1, *self.image_size, dtype=torch.bool)
        row, column, depth = (side // 2 for side in self.image_size)
        places[..., row, column, depth] = True
        return places

    def _boundary(self, given: dict[str, Any]) -> Tensor | None:
        """Where the lesions of requests may lie; None for everywhere."""
        boundary, mask = given.get("boundary"), given.get("mask")
        if mask is None or not self.boundary_classes:
            return boundary
        region = class_masks(mask, self.boundary_classes + self.classes).any(1, keepdim=True)
        return region if boundary is None else region & (boundary.to(region.device) != 0)

    def _free(self, inside: Tensor, boundary: Tensor | None) -> Tensor:
        """Where lesions may lie, (B, 1, H, W, D) bool."""
        if boundary is None:
            return torch.ones_like(inside)
        if self.hparams["reference_behaviour"]:
            raise ValueError("reference_behaviour=True has no boundary, as the authors' code; leave one of them out.")
        self._check_size("boundary", boundary, len(inside))
        return boundary.to(inside.device) != 0

    def _placed(self, lesions: Tensor, mask: Tensor) -> Tensor:
        """New lesions in masks, instead of the old ones."""
        if lesions.shape != mask.shape:  # the reference's larger grid
            return lesions
        healthy, old = self.boundary_classes[0] if self.boundary_classes else 0, class_masks(mask, self.classes)
        around = mask.masked_fill(old.any(1, keepdim=True), healthy).to(lesions)
        return torch.where(lesions > 0, lesions, around)

    def _measure(self, spheres: Tensor, mask: Tensor) -> None:
        """Compare generated masks with the spheres that they were asked to follow."""
        lesions = class_masks(mask, self.classes).any(1, keepdim=True).float()
        lesions = F.interpolate(lesions, self.image_size, mode="nearest-exact")  # the reference's masks are larger
        found = sphere_agreement(lesions, spheres)
        for metric, values in zip(self.metrics.values(), found, strict=True):
            cast(MeanMetric, metric).update(values)

    def _predict(self, noisy: Tensor, step: Tensor, sphere: Tensor | None) -> Tensor:
        """The network's prediction, given encoded spheres."""
        assert sphere is not None
        predicted: Tensor = self.network(torch.cat([noisy, sphere], 1), step).float()
        return predicted

    def _encoded(self, inside: Tensor) -> Tensor:
        return encode_spheres(inside, self.settings["sphere_encoding"])

    def _check_arguments(self) -> None:
        if self.settings["loss"] not in LOSSES:
            raise ValueError(f"loss={self.settings['loss']!r}; expected is {' or '.join(LOSSES)}.")
        encode_spheres(torch.ones(1, dtype=torch.bool), self.settings["sphere_encoding"])
        if self.hparams["reference_behaviour"] and (self.boundary_classes or len(self.classes) > 1):
            raise ValueError(
                f"reference_behaviour=True with lesion_classes {self.classes} and boundary_classes "
                f"{self.boundary_classes}; the authors' code has one lesion class and no boundary."
            )

    def _check_size(self, name: str, volume: Tensor | None, count: int) -> None:
        expected = (count, 1, *self.image_size)
        if volume is not None and volume.shape != expected:
            raise ValueError(
                f"{name} has shape {tuple(volume.shape)}; expected is {expected}, one volume of the module's "
                "image_size for each sample."
            )


def _warn_of_empty(lesions: Tensor, ids: Any) -> None:
    """Name the samples that came out without a lesion."""
    empty = _without(lesions > 0, ids)
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(lesions)} masks came out without a lesion: {', '.join(empty)}. Ask for a larger "
            "radius or a wider boundary there, or train for longer.",
            stacklevel=2,
        )


def _without(lesions: Tensor, ids: Any) -> list[str]:
    """The samples of (B, ...) bool that have nothing, by their ids or else by their places in the batch."""
    empty = (~lesions.flatten(1).any(1)).nonzero().flatten().tolist()
    return [f"sample {k}" if ids is None else str(ids[k]) for k in empty]
