import math

import monai.losses
import pytest
import torch
from torch.nn import functional as F

from fairdiff_lightning.losses import FocalLoss, dice_ce_loss


@pytest.fixture
def dmoe_batch(reference):
    """Logits and mask of the dMoE checks D1 and D3."""
    logits = (2 * torch.sin(0.77 * torch.arange(96, dtype=torch.float64))).mul(1e6).round().div(1e6)
    labels = torch.tensor(reference("dmoe")["D1_ce_dice"]["labels"])
    return logits.float().reshape(2, 3, 4, 4), labels[:, None]


@pytest.fixture
def fairdiff_batch(reference):
    """Logits and mask of the FairDiff checks ls01 and ls02."""
    k = torch.arange(768, dtype=torch.float64)
    logits = (2 * torch.sin(0.37 * k) + torch.cos(0.011 * k**2 / 768)).float().reshape(4, 3, 8, 8)
    mask = ((7 * torch.arange(256)) % 11 % 3).reshape(4, 1, 8, 8)
    assert mask.flatten().bincount().tolist() == reference("fairdiff")["ls01_seg_losses"]["expected"]["target_hist"]
    return logits, mask


def test_dice_ce_equals_the_dmoe_reference(reference, dmoe_batch):
    logits, mask = dmoe_batch
    expected = reference("dmoe")["D1_ce_dice"]
    assert dice_ce_loss(1, 0)(logits, mask).item() == pytest.approx(expected["ce"], abs=1e-6)
    assert dice_ce_loss(0, 1)(logits, mask).item() == pytest.approx(expected["dice"], abs=1e-6)
    logits.requires_grad_()
    loss = dice_ce_loss()(logits, mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected["total"], abs=1e-6)
    assert logits.grad.norm().item() == pytest.approx(expected["grad_norm"], abs=1e-6)
    assert logits.grad.flatten()[:8].tolist() == pytest.approx(expected["grad_first8"], abs=1e-6)


def test_dice_of_each_class_equals_the_dmoe_reference(reference, dmoe_batch):
    logits, mask = dmoe_batch
    dice = dice_ce_loss().dice
    dice.reduction = "none"
    expected = reference("dmoe")["D1_ce_dice"]["per_class_dice_loss"]
    assert dice(logits, mask).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_dice_without_background_is_that_of_the_other_classes(reference, dmoe_batch):
    expected = reference("dmoe")["D1_ce_dice"]
    dice = sum(expected["per_class_dice_loss"][1:]) / 2
    assert dice_ce_loss(0, 1, dice_background=False)(*dmoe_batch).item() == pytest.approx(dice, abs=1e-6)
    total = 0.5 * expected["ce"] + 0.5 * dice
    assert dice_ce_loss(dice_background=False)(*dmoe_batch).item() == pytest.approx(total, abs=1e-6)


def test_dice_ce_equals_the_fairdiff_reference_in_both_weightings(reference, fairdiff_batch):
    expected = reference("fairdiff")["ls01_seg_losses"]["expected"]
    weights = {"ce": (1, 0), "dice": (0, 1), "transunet_05_05": (0.5, 0.5), "samed_02_08": (0.2, 0.8)}
    for name, (ce, dice) in weights.items():
        assert dice_ce_loss(ce, dice)(*fairdiff_batch).item() == pytest.approx(expected[name], abs=1e-6), name


def test_focal_equals_the_dmoe_reference(reference, dmoe_batch):
    assert FocalLoss()(*dmoe_batch).item() == pytest.approx(reference("dmoe")["D3_focal"]["value"], abs=1e-6)


def test_focal_equals_the_fairdiff_reference(reference, fairdiff_batch):
    assert FocalLoss()(*fairdiff_batch).item() == pytest.approx(
        reference("fairdiff")["ls02_focal"]["expected"], abs=1e-6
    )


def test_focal_is_class_count_times_monai(fairdiff_batch):
    theirs = monai.losses.FocalLoss(to_onehot_y=True, use_softmax=True, alpha=[0.3, 0.7, 0.7], gamma=1.5)
    torch.testing.assert_close(FocalLoss(alpha=0.3, gamma=1.5)(*fairdiff_batch), 3 * theirs(*fairdiff_batch))


def test_focal_without_focus_is_weighted_cross_entropy():
    logits, mask = torch.randn(3, 2, 5, 7, 3), torch.randint(0, 2, (3, 1, 5, 7, 3))
    torch.testing.assert_close(FocalLoss(alpha=0.5, gamma=0)(logits, mask), 0.5 * F.cross_entropy(logits, mask[:, 0]))


@pytest.mark.parametrize("loss", [dice_ce_loss(), FocalLoss()], ids=["dice_ce", "focal"])
def test_bfloat16_logits_lose_only_their_own_rounding(loss):
    torch.manual_seed(0)
    logits, mask = torch.randn(3, 3, 61, 67).bfloat16(), torch.randint(0, 3, (3, 1, 61, 67))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(logits, mask)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, loss(logits.float(), mask))


def test_uniform_prediction_has_the_closed_form_loss():
    logits, mask = torch.zeros(2, 2, 4, 6), torch.zeros(2, 1, 4, 6, dtype=torch.int64)
    pixels = mask.numel()
    background = 1 - (pixels + 1e-5) / (pixels / 4 + pixels + 1e-5)
    absent = 1 - 1e-5 / (pixels / 4 + 1e-5)
    expected = 0.5 * math.log(2) + 0.25 * (background + absent)
    assert dice_ce_loss()(logits, mask).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", [dice_ce_loss(), FocalLoss()], ids=["dice_ce", "focal"])
def test_loss_never_waits_for_the_device(loss):
    """On the meta device, reading a value back raises."""
    logits = torch.empty(3, 3, 5, 7, device="meta", requires_grad=True)
    loss(logits, torch.empty(3, 1, 5, 7, dtype=torch.int64, device="meta")).backward()
    assert logits.grad.shape == logits.shape
