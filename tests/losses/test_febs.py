import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss
from torch.nn import functional as F

from fairdiff_lightning.losses import FEBSLoss

TANH_1 = math.tanh(1)


def sine_logits(samples):
    k = torch.arange(samples * 48, dtype=torch.float64)
    return (2 * torch.sin(0.77 * k)).mul(1e6).round().div(1e6).float().reshape(samples, 3, 4, 4)


def plain_dice(probabilities, mask, reduction="mean"):
    return DiceLoss(to_onehot_y=True, squared_pred=True, batch=True, reduction=reduction)(probabilities, mask)


def febs_by_definition(logits, mask, group, gamma):
    """The loss as the paper says it, one group and one sample at a time."""
    probabilities = logits.softmax(1)
    losses = {}
    for value in set(group.tolist()) - {-1}:
        members = group == value
        losses[value] = plain_dice(probabilities[members], mask[members], "sum").item()
    weights = [
        TANH_1 if value == -1 else math.tanh((min(losses.values()) / losses[value]) ** gamma)
        for value in group.tolist()
    ]
    return plain_dice(probabilities * torch.tensor(weights).reshape(-1, 1, 1, 1), mask)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    logits, mask = 2 * torch.randn(5, 3, 6, 7), torch.randint(0, 3, (5, 1, 6, 7))
    return logits, mask, torch.tensor([0, 2, 2, -1, 0])  # group 1 of 3 absent


@pytest.mark.parametrize("reference_behaviour", [False, True])
def test_dice_term_equals_the_reference_when_all_groups_are_present(reference, reference_behaviour):
    expected = reference("dmoe")["D2_febs_dice_term"]["all_groups_present"]
    logits, mask = sine_logits(3), ((torch.arange(48) * 7 // 3) % 3).reshape(3, 1, 4, 4)
    assert plain_dice(logits.softmax(1), mask).item() == pytest.approx(expected["plain_dice_loss"], abs=1e-6)
    for gamma, value in expected["febs_by_gamma"].items():
        loss = FEBSLoss(3, gamma=float(gamma), reference_behaviour=reference_behaviour)
        term = loss.dice_term(logits, mask, torch.tensor(expected["attr"]))
        assert term.dtype == (torch.float64 if reference_behaviour else torch.float32)
        assert term.item() == pytest.approx(value, abs=1e-6), gamma


def test_dice_term_equals_the_reference_with_absent_groups(reference):
    labels = torch.tensor(reference("dmoe")["D1_ce_dice"]["labels"])[:, None]
    for key, value in reference("dmoe")["D2_febs_dice_term"]["values"].items():
        gamma, groups = key.removeprefix("gamma").split("_attr")
        loss = FEBSLoss(3, gamma=float(gamma), reference_behaviour=True)
        group = torch.tensor([int(g) for g in groups.strip("[]").split(", ")])
        assert loss.dice_term(sine_logits(2), labels, group).item() == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_value_and_gradient_equal_the_definition(batch, gamma):
    logits, mask, group = batch
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    FEBSLoss(3, gamma, ce_weight=0.2, dice_weight=0.8)(ours, mask, group).backward()
    expected = 0.2 * F.cross_entropy(theirs, mask[:, 0]) + 0.8 * febs_by_definition(theirs, mask, group, gamma)
    expected.backward()
    torch.testing.assert_close(FEBSLoss(3, gamma, 0.2, 0.8)(logits, mask, group), expected.detach())
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_absent_group_leaves_a_gradient_that_the_reference_loses(batch):
    logits, mask, _ = batch
    group = torch.tensor([0, 2, 2, 0, 0])
    gradients = {}
    for reference_behaviour in (False, True):
        leaf = logits.clone().requires_grad_()
        FEBSLoss(3, reference_behaviour=reference_behaviour).dice_term(leaf, mask, group).backward()
        gradients[reference_behaviour] = leaf.grad.abs().amax(dim=(1, 2, 3))
    assert (gradients[False] > 1e-5).all()
    assert (gradients[True] == 0).all()


def test_gamma_zero_scales_all_predictions_by_tanh_1(batch):
    logits, mask, group = batch
    expected = plain_dice(TANH_1 * logits.softmax(1), mask)
    torch.testing.assert_close(FEBSLoss(3, gamma=0.0).dice_term(logits, mask, group), expected)


def test_a_single_or_only_unknown_group_scales_by_tanh_1(batch):
    logits, mask, _ = batch
    expected = plain_dice(TANH_1 * logits.softmax(1), mask)
    for value in (-1, 1):
        group = torch.full((5,), value)
        torch.testing.assert_close(FEBSLoss(3, gamma=2.0).dice_term(logits, mask, group), expected)


def test_the_reference_takes_unknown_for_the_last_group(batch):
    logits, mask, group = batch
    loss = FEBSLoss(3, reference_behaviour=True)
    last = torch.where(group < 0, 2, group)
    assert loss(logits, mask, group) == loss(logits, mask, last)


def test_the_worse_group_gets_the_smaller_weight():
    mask = torch.randint(0, 2, (4, 1, 9, 5), generator=torch.Generator().manual_seed(0))
    good = F.one_hot(mask[:, 0], 2).movedim(-1, 1).float()
    logits = torch.cat([4 * good[:2], 0.5 * good[2:]])
    weights = FEBSLoss(2).sample_weights(_sums(logits, mask), torch.tensor([0, 0, 1, 1]))
    assert weights[0] == weights[1] == pytest.approx(TANH_1)
    assert weights[2] == weights[3] < 0.5 * TANH_1


def _sums(logits, mask):
    probabilities, truth = logits.softmax(1), F.one_hot(mask[:, 0], logits.shape[1]).movedim(-1, 1)
    return torch.stack([(x).flatten(2).sum(-1) for x in (probabilities * truth, probabilities**2, truth)])


def test_a_perfectly_segmented_group_gives_a_finite_loss():
    mask = torch.randint(0, 3, (2, 1, 5, 6), generator=torch.Generator().manual_seed(0))
    logits = 1e4 * F.one_hot(mask[:, 0], 3).movedim(-1, 1).float()
    logits[1] = 0
    logits.requires_grad_()
    loss = FEBSLoss(2)(logits, mask, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(5)), group=st.lists(st.integers(-1, 2), min_size=5, max_size=5))
def test_batch_order_does_not_matter(order, group):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 3, 4, 6, generator=generator)
    mask, group = torch.randint(0, 3, (5, 1, 4, 6), generator=generator), torch.tensor(group)
    loss = FEBSLoss(3)
    torch.testing.assert_close(loss(logits[order], mask[order], group[order]), loss(logits, mask, group))


def test_bfloat16_logits_are_computed_in_float32(batch):
    logits, mask, group = batch
    loss = FEBSLoss(3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(logits.bfloat16(), mask, group)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, loss(logits.bfloat16().float(), mask, group))


def test_volumes_are_accepted():
    logits, mask = torch.randn(2, 2, 3, 4, 5), torch.randint(0, 2, (2, 1, 3, 4, 5))
    flat = FEBSLoss(2)(logits.reshape(2, 2, 12, 5), mask.reshape(2, 1, 12, 5), torch.tensor([0, 1]))
    torch.testing.assert_close(FEBSLoss(2)(logits, mask, torch.tensor([0, 1])), flat)


@pytest.mark.parametrize("reference_behaviour", [False, True])
def test_loss_never_waits_for_the_device(reference_behaviour):
    """On the meta device, reading a value back raises."""
    logits = torch.empty(3, 3, 5, 7, device="meta", requires_grad=True)
    mask, group = (torch.empty(s, dtype=torch.int64, device="meta") for s in ((3, 1, 5, 7), (3,)))
    FEBSLoss(2, reference_behaviour=reference_behaviour)(logits, mask, group).backward()
    assert logits.grad.shape == logits.shape


def test_wrong_groups_are_named(batch):
    logits, mask, group = batch
    with pytest.raises(ValueError, match=r"holds \[0, 2, 2, -1, 0\], expected values in \[-1, 2\)"):
        FEBSLoss(2)(logits, mask, group)
    with pytest.raises(ValueError, match=r"shape \(5, 1\), expected \(5,\)"):
        FEBSLoss(3)(logits, mask, group[:, None])
