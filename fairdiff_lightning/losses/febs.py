"""Fair error-bound scaling: a Dice loss that counts the errors of worse served groups more."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SMOOTH = 1e-5


class FEBSLoss(nn.Module):
    """Cross-entropy plus a Dice loss whose predictions are scaled by how well each group is served.

    Tian et al., *FairSeg*, ICLR 2024, fair error-bound scaling. With L_g the Dice losses of all classes summed on the
    batch's samples of group g, a sample's softmax is multiplied by ``w_g = tanh((min_h L_h / L_g)^gamma)`` before the
    Dice loss of the whole batch is taken. The best group keeps tanh(1) = 0.76 of its predictions, a worse one less.
    No gradient flows through the weights.

    Args:
        num_groups: number of groups of the attribute.
        gamma: strength of the scaling; 0 treats all groups alike, with weight tanh(1).
        ce_weight: factor of the cross-entropy; 0.2 for SAMed.
        dice_weight: factor of the scaled Dice loss; 0.8 for SAMed.
        reference_behaviour: reproduce the authors' code, defects included (see the table).

    Shapes:
        logits (B, K, ...), mask (B, 1, ...) class indices, group (B,) in [-1, num_groups), -1 unknown; a scalar.

    Differences from the reference:
        =================  ====================================  ======================================
        What               Reference code                        Here
        =================  ====================================  ======================================
        absent group       counts as a loss of 0: all weights    left out of the minimum
                           and the Dice gradient become 0
        unknown group      takes the last group's place          weight tanh(1), no part in the minimum
        result             Dice term in float64                  float32, or the logits' dtype if wider
        =================  ====================================  ======================================

        ``reference_behaviour=True`` restores all three.
    """

    def __init__(
        self,
        num_groups: int,
        gamma: float = 1.0,
        ce_weight: float = 0.5,
        dice_weight: float = 0.5,
        reference_behaviour: bool = False,
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.gamma = gamma
        self.ce_weight = ce_weight
        self.dice_weight = dice_weight
        self.reference_behaviour = reference_behaviour

    def forward(self, logits: Tensor, mask: Tensor, group: Tensor) -> Tensor:
        """Return the scalar loss.

        Raises:
            ValueError: ``group`` is not (B,), or, on the CPU, where looking costs nothing, holds a value out of range.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cross_entropy = F.cross_entropy(logits, mask.squeeze(1))
        return self.ce_weight * cross_entropy + self.dice_weight * self.dice_term(logits, mask, group)

    def dice_term(self, logits: Tensor, mask: Tensor, group: Tensor) -> Tensor:
        """Return the scaled Dice loss alone, in [0, 1]."""
        self._check(logits, group)
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
        if self.reference_behaviour:
            probabilities = probabilities.double()
        sums = _dice_sums(probabilities, mask)
        weight = self.sample_weights(sums, group)
        # A sample's weight multiplies all its pixels, so it can be applied to the sums over them.
        scale = torch.stack([weight, weight.square(), torch.ones_like(weight)])
        return _dice_loss((sums * scale[..., None]).sum(1)).mean()

    @torch.no_grad()
    def sample_weights(self, sums: Tensor, group: Tensor) -> Tensor:
        """Return the weight (B,) in [0, tanh(1)] of each sample.

        Args:
            sums: (3, B, K) sums over the pixels of p t, p^2 and t for each sample and class.
            group: (B,) group of each sample.
        """
        unknown = self.num_groups - 1 if self.reference_behaviour else self.num_groups
        row = torch.where(group < 0, unknown, group)
        group_sums = sums.new_zeros(3, self.num_groups + 1, sums.shape[-1]).index_add_(1, row, sums)
        loss = _dice_loss(group_sums).sum(-1)[: self.num_groups]  # 0 for an absent group
        if self.reference_behaviour:
            best = loss.amin()
        else:
            present = torch.zeros(self.num_groups + 1, dtype=torch.bool, device=row.device).index_fill(0, row, True)
            loss = loss.clamp_min(torch.finfo(loss.dtype).eps)  # a perfect group must not give 0 / 0
            best = loss.where(present[: self.num_groups], torch.inf).amin()
        ratio = F.pad(best / loss, (0, 1), value=1.0)
        return torch.tanh(ratio**self.gamma)[row]

    def _check(self, logits: Tensor, group: Tensor) -> None:
        if group.shape != logits.shape[:1]:
            raise ValueError(
                f"FEBSLoss: group has shape {tuple(group.shape)}, expected ({logits.shape[0]},): one index per sample."
            )
        if group.device.type == "cpu" and bool(((group < -1) | (group >= self.num_groups)).any()):
            raise ValueError(
                f"FEBSLoss: group holds {group.tolist()}, expected values in [-1, {self.num_groups}), -1 for unknown. "
                "Set num_groups to the number of groups of the attribute."
            )


def _dice_sums(probabilities: Tensor, mask: Tensor) -> Tensor:
    """Sums over the pixels of p t, p^2 and t: (3, B, K)."""
    truth = torch.zeros_like(probabilities).scatter_(1, mask, 1.0)
    products = (probabilities * truth, probabilities.square(), truth)
    return torch.stack([product.flatten(2).sum(-1) for product in products])


def _dice_loss(sums: Tensor) -> Tensor:
    """Dice loss (...) of sums (3, ...)."""
    overlap, predicted, true = sums.unbind(0)
    return 1 - (2 * overlap + _SMOOTH) / (predicted + true + _SMOOTH)
