"""Experts are balanced over real and synthetic images alike when their logits are merged."""

import pytest
import torch

from fairdiff_lightning.losses import load_balance_loss
from fairdiff_lightning.modules import DMoESegmenter

SMALL = {"network": "tiny", "image_size": 32, "num_groups": {"race": 3}, "num_experts": 4}


def batch_of(keep_real):
    draws = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(2, 3, 32, 32, generator=draws),
        "partner": torch.rand(2, 3, 32, 32, generator=draws),
        "keep_real": keep_real,
        "mask": torch.randint(2, (2, 1, 32, 32), generator=draws),
        "attributes": {"race": torch.tensor([0, 2])},
        "id": ["a", "b"],
    }


@pytest.mark.parametrize("sharing", ["shared", "per_block"])
def test_the_balance_weight_does_not_take_the_partners_away(sharing):
    torch.manual_seed(0)
    made = DMoESegmenter(**SMALL, balance_weight=0.5, moe_sharing=sharing).eval()
    batch = batch_of(torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1)) < 0.5)
    group, losses = batch["attributes"]["race"], made.losses(batch)
    real, synthetic = made(batch["image"], group), made(batch["partner"], group)
    merged = torch.where(batch["keep_real"], real, synthetic)
    assert float(losses["segmentation"]) == pytest.approx(float(made.objective(merged, batch)))
    assert abs(float(losses["segmentation"]) - float(made.objective(real, batch))) > 1e-6
    both = made.network(torch.cat([batch["image"], batch["partner"]]), torch.cat([group] * 2), return_gates=True)[1]
    pools = [both] if sharing == "shared" else list(both)
    expected = torch.stack([load_balance_loss(pool) for pool in pools]).mean()
    assert float(losses["balance"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses["loss"]) == pytest.approx(float(losses["segmentation"] + 0.5 * losses["balance"]))


def test_only_synthetic_pixels_move_the_segmentation_loss_where_nothing_real_is_kept():
    made = DMoESegmenter(**SMALL, balance_weight=0.5).eval()
    batch = batch_of(torch.zeros(2, 1, 32, 32, dtype=torch.bool))
    other = batch | {"image": batch["image"].flip(0)}
    assert float(made.losses(batch)["segmentation"]) == pytest.approx(float(made.losses(other)["segmentation"]))
