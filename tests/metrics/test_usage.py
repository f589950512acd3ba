import pytest
import torch

from fairdiff_lightning.metrics import ExpertUsage


def test_shares_equal_their_definition():
    torch.manual_seed(0)
    gates, group = torch.rand(2, 4, 5, 3).softmax(-1), torch.tensor([0, 2, 0, -1])
    metric = ExpertUsage(num_experts=3, num_groups=3)
    metric.update(gates[:, :1], group[:1])
    metric.update(gates[:, 1:], group[1:])
    usage = metric.compute()
    for row, value in enumerate((0, 1, 2, -1)):
        members = gates[:, group == value]
        expected = members.sum((0, 1, 2)) / members.sum() if members.numel() else torch.full((3,), float("nan"))
        torch.testing.assert_close(usage[row], expected, equal_nan=True)
    torch.testing.assert_close(usage.sum(1)[[0, 2, 3]], torch.ones(3))


def test_one_layer_needs_no_layer_dimension():
    gates, group = torch.rand(4, 5, 3), torch.tensor([0, 1, 1, 0])
    one, stacked = ExpertUsage(3, 2), ExpertUsage(3, 2)
    one.update(gates, group)
    stacked.update(gates[None], group)
    torch.testing.assert_close(one.compute(), stacked.compute(), equal_nan=True)


def test_half_precision_gates_are_summed_in_float32():
    metric = ExpertUsage(2, 1)
    metric.update(torch.full((3, 1000, 2), 0.5).bfloat16(), torch.zeros(3, dtype=torch.int64))
    assert metric.compute()[0].tolist() == [0.5, 0.5]


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(4, 5, 3\), expected \(L, B, N, 8\) or \(B, N, 8\)"):
        ExpertUsage(8, 2).update(torch.rand(4, 5, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"group holds \[0, 5\]"):
        ExpertUsage(3, 2).update(torch.rand(2, 5, 3), torch.tensor([0, 5]))
