"""dMoE: segmentation whose experts are chosen by a router of the sample's own group."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.losses import load_balance_loss
from fairdiff_lightning.metrics import ExpertUsage
from fairdiff_lightning.modules.segmenter import Segmenter
from fairdiff_lightning.networks.build import TransUNetName
from fairdiff_lightning.networks.moe import UnknownGroup


class DMoESegmenter(Segmenter):
    """TransUNet or 3-D residual U-Net with distribution-aware mixtures of experts, behind every block or encoder stage.

    Oh et al., *Distribution-aware Fairness Learning in Medical Image Segmentation From a Control-Theoretic
    Perspective*, ICML 2025, arXiv:2502.00619.

    Args:
        network: variant of the TransUNet, or ``resunet3d`` for volumes.
        network_args: further arguments of the network.
        num_classes: number of classes, the background included.
        in_channels: channels of the image.
        image_size: side, or height and width (and depth, of volumes), of the image, pixels or voxels.
        num_groups: attribute -> number of its groups; metrics are logged for each.
        attribute: whose groups have a router each; the first of ``num_groups`` when None.
        routing: ``group`` (dMoE) or ``shared``, one router for all (MoE).
        num_experts: experts, shared by all groups.
        top_k: experts that a token is sent to.
        moe_sharing: one mixture for all blocks, the paper's 2-D setting and its default, or one per block, the paper's
            3-D setting and the only one there.
        unknown_group: what routes a sample of unknown group (-1): an ``error``, the ``mean`` of the routers, or their
            mean weighted by the groups' shares of the training set (``prior``).
        balance_weight: weight of the load-balance loss, which the paper does not have.
        reference_behaviour: restore what the table below says.
        **kwargs: the other arguments of :class:`Segmenter`.

    Shapes:
        image (B, C, H, W[, D]) in [0, 1]; mask (B, 1, H, W[, D]) class indices; group (B,); logits (B, K, H, W[, D]).

    Differences from the reference:
        ==================  =============================  =============================  =========================
        What                Reference code                 Here                           To restore
        ==================  =============================  =============================  =========================
        router noise        in evaluation too, so that     while training only            ``reference_behaviour``
                            predictions are random
        empty truth         false positive scores 1, an    no score when both are empty,  ``reference_behaviour``
                            empty prediction 0             false positive scores 0
        unknown group       routed by the last router      ``unknown_group``              not offered
        unused routers      MoE allocates one per group    MoE has one router             not offered
        class mean          averages a class that does     mean over the foreground       not offered
                            not exist
        learning rate       lags one step                  does not                       ``PolynomialDecay(lag)``
        image resize        cubic, leaves [0, 1]           area average                   ``resize: zoom`` (data)
        ==================  =============================  =============================  =========================
    """

    def __init__(
        self,
        network: TransUNetName | Literal["resunet3d"] = "vit_b16",
        network_args: dict[str, Any] | None = None,
        num_classes: int = 2,
        in_channels: int = 3,
        image_size: int | tuple[int, int] | tuple[int, int, int] | None = 224,
        num_groups: dict[str, int] | None = None,
        attribute: str | None = None,
        routing: Literal["group", "shared"] = "group",
        num_experts: int = 8,
        top_k: int = 2,
        moe_sharing: Literal["shared", "per_block"] | None = None,
        unknown_group: UnknownGroup = "error",
        balance_weight: float = 0.0,
        reference_behaviour: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            network=network,
            network_args=network_args,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            num_groups=num_groups,
            attribute=attribute,
            reference_behaviour=reference_behaviour,
            **kwargs,
        )
        self.expert_usage = ExpertUsage(num_experts, self.num_routed_groups)

    @property
    def moe_sharing(self) -> str:
        """Whether all blocks share one mixture."""
        default = "per_block" if self.hparams["network"] == "resunet3d" else "shared"
        return self.hparams["moe_sharing"] or default

    @property
    def num_routed_groups(self) -> int:
        """Number of routers."""
        if self.hparams["routing"] == "shared":
            return 1
        if self.attribute is None:
            raise ValueError(
                "DMoESegmenter routes by a group, but num_groups is empty: give num_groups={'race': 3} (the CLI takes "
                "it from the data module's `attributes`), or routing='shared' for one router."
            )
        return self.num_groups[self.attribute]

    def network_arguments(self) -> dict[str, Any]:
        """Arguments of the network, the mixture's included."""
        h = self.hparams
        mixture = {name: h[name] for name in ("num_experts", "top_k", "unknown_group")}
        mixture |= {"moe_sharing": self.moe_sharing, "num_groups": self.num_routed_groups}
        mixture |= {"noise_in_eval": h["reference_behaviour"]}
        return super().network_arguments() | mixture

    def setup(self, stage: str) -> None:
        """Check the data, among them for unknown groups that nothing would route, and learn the groups' shares."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.hparams["routing"] == "shared" or not hasattr(data, "group_counts"):
            return
        unknown = {part: table[self.attribute]["unknown"] for part, table in data.counts().items()}
        if self.hparams["unknown_group"] == "error" and any(unknown.values()):
            raise ValueError(
                f"'{self.attribute}' is unknown for some samples ({unknown}) and unknown_group='error': set "
                "`unknown_group` to mean or prior, or `drop_unknown: true` in the data."
            )
        if stage == "fit":
            self.network.set_group_prior(torch.tensor(data.group_counts[self.attribute], dtype=torch.float32))  # type: ignore[operator]

    def forward(self, image: Tensor, group: Tensor | None = None) -> Tensor:
        """Logits (B, K, H, W); tokens are routed by the samples' groups (B,)."""
        logits: Tensor = self.network(image, self._routed(image, group))
        return logits

    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """The segmentation loss, and the load balance when it has a weight.

        The balance is that of real and synthetic images together in a batch with ``partner``, see
        :meth:`Segmenter.losses`.
        """
        weight = self.hparams["balance_weight"]
        if not weight:
            return super().losses(batch)
        group = self.group(batch)
        logits, gates = self._with_gates(batch["image"], group)
        if "partner" in batch:
            others, further = self._with_gates(batch["partner"], group)
            logits, gates = torch.where(batch["keep_real"], logits, others), torch.cat([gates, further], 1)
        pools = [gates] if self.moe_sharing == "shared" else gates.unbind()
        segmentation, balance = self.objective(logits, batch), torch.stack([*map(load_balance_loss, pools)]).mean()
        return {"loss": segmentation + weight * balance, "segmentation": segmentation, "balance": balance}

    def on_validation_epoch_end(self) -> None:
        """Log the scores, and start counting the experts anew (callbacks have read them before)."""
        super().on_validation_epoch_end()
        self.expert_usage.reset()

    def _infer_upright(self, batch: Sample, stage: str) -> Tensor:
        """Logits of a batch that is not mirrored; validation on whole images also counts which experts are used."""
        if stage != "val" or self.hparams["inference"] == "sliding":
            return super()._infer_upright(batch, stage)
        group = self.group(batch)
        logits, gates = self._with_gates(batch["image"], group)
        self.expert_usage.update(gates, self._routed(batch["image"], group))
        return logits

    def _with_gates(self, image: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits, and the gates (L, B, N, E) of all blocks."""
        logits, gates = self.network(image, self._routed(image, group), return_gates=True)
        return logits, gates

    def _routed(self, image: Tensor, group: Tensor | None) -> Tensor:
        if self.hparams["routing"] == "shared":
            return torch.zeros(len(image), dtype=torch.int64, device=image.device)
        if group is None:
            raise ValueError(f"a group-routed network needs the samples' groups of '{self.attribute}'.")
        return group
