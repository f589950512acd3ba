import pytest
import torch

from fairdiff_lightning.losses import cv_squared, load_balance_loss


def test_cv_squared_equals_the_reference(reference):
    for case in reference("dmoe")["C1_cv_squared_reference_not_official"]["cases"]:
        assert cv_squared(torch.tensor(case["x"])).item() == pytest.approx(case["cv2"], abs=1e-6), case


def test_even_use_costs_nothing():
    assert load_balance_loss(torch.full((2, 3, 5, 4), 0.25)).item() == pytest.approx(0, abs=1e-12)


def test_one_expert_for_all_costs_the_number_of_experts():
    gates = torch.zeros(3, 5, 8)
    gates[..., 6] = 1
    assert load_balance_loss(gates).item() == pytest.approx(8)


def test_importance_is_the_sum_of_gates():
    gates = torch.rand(2, 3, 5, 4)
    torch.testing.assert_close(load_balance_loss(gates), cv_squared(gates.reshape(-1, 4).sum(0)))


def test_descent_evens_out_the_use():
    torch.manual_seed(0)
    logits = (torch.randn(40, 4) + torch.tensor([2.0, 0, 0, -1])).requires_grad_()
    before = load_balance_loss(logits.softmax(-1))
    for _ in range(50):
        (gradient,) = torch.autograd.grad(load_balance_loss(logits.softmax(-1)), logits)
        logits = (logits - 20 * gradient).detach().requires_grad_()
    assert load_balance_loss(logits.softmax(-1)) < 0.05 * before


def test_bfloat16_gates_are_summed_in_float32():
    gates = torch.full((1000, 2), 0.5).bfloat16()
    gates[:, 0] += 0.25
    assert load_balance_loss(gates).item() == pytest.approx(cv_squared(torch.tensor([750.0, 500.0])).item(), rel=1e-5)


def test_loss_never_waits_for_the_device():
    gates = torch.empty(2, 3, 5, 4, device="meta", requires_grad=True)
    load_balance_loss(gates).backward()
    assert gates.grad.shape == gates.shape
