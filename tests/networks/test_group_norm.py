import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairdiff_lightning.networks.group_norm import ChannelsLastGroupNorm, replace_group_norms
from fairdiff_lightning.networks.guided_unet import GuidedUNet


def both(x, groups=4, channels=8):
    """Outputs and gradients of PyTorch's norm and of ours for the same values (B, C, H, W)."""
    torch.manual_seed(0)
    plain = nn.GroupNorm(groups, channels, 1e-6)
    nn.init.normal_(plain.weight)
    ours = ChannelsLastGroupNorm(groups, channels, 1e-6)
    ours.load_state_dict(plain.state_dict())
    upstream, made = torch.randn_like(x), []
    for norm in (plain.to(x.dtype), ours.to(x.dtype)):
        given = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        output = norm(given)
        made.append((output, *torch.autograd.grad(output, (given, *norm.parameters()), upstream)))
    return made


@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (1, 8, 1, 3), (3, 8, 6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_pytorch(shape, dtype):
    x = (3 + 2 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))).to(
        memory_format=torch.channels_last
    )
    for theirs, found in zip(*both(x), strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=2e-5 if dtype == torch.float32 else 1e-12)
    assert both(x)[1][1].is_contiguous(memory_format=torch.channels_last)


def test_gradients_pass_the_check_by_differences():
    norm = ChannelsLastGroupNorm(2, 4).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))


def test_half_precision_sums_in_full():
    x = torch.randn(1, 8, 64, 64).bfloat16().to(memory_format=torch.channels_last)
    norm, upstream = ChannelsLastGroupNorm(4, 8), torch.randn(1, 8, 64, 64)
    exact = copy.deepcopy(norm)
    given, wide = x.clone().requires_grad_(), x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        norm(given).backward(upstream.bfloat16())
    F.group_norm(wide, 4, exact.weight, exact.bias).backward(upstream.bfloat16().float())
    torch.testing.assert_close(given.grad.float(), wide.grad, rtol=1e-2, atol=1e-2)
    for ours, theirs in zip(norm.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-3)


def test_contiguous_tensors_and_other_sizes_are_left_to_pytorch():
    norm = ChannelsLastGroupNorm(2, 4)
    assert type(norm(torch.randn(2, 4, 6, 6)).grad_fn).__name__ == "NativeGroupNormBackward0"
    assert type(norm(torch.randn(2, 4, 9)).grad_fn).__name__ == "NativeGroupNormBackward0"


def test_a_network_in_channels_last_trains_to_the_same_gradients_and_leaves_that_order_nowhere():
    torch.manual_seed(0)
    plain = GuidedUNet(image_size=16, widths=(32, 64)).train()
    last = copy.deepcopy(plain)
    last.use_channels_last()
    assert last.state_dict().keys() == plain.state_dict().keys()
    orders = []
    for module in last.unet.modules():
        if isinstance(module, nn.Conv2d) and module is not last.unet.conv_in:
            module.register_forward_hook(
                lambda m, given, made: orders.append(given[0].is_contiguous(memory_format=torch.channels_last))
            )
    noisy, guide = torch.randn(2, 2, 1, 16, 16)
    steps = torch.tensor([3, 500])
    losses = [net.train()(noisy, guide, steps).square().mean() for net in (plain, last)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(last.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert all(orders)
    assert last.training
    assert last.eval().unet.training is False


def test_every_norm_of_a_network_is_replaced_with_its_weights():
    network = nn.Sequential(nn.GroupNorm(1, 2), nn.Sequential(nn.GroupNorm(2, 4, affine=False)), nn.Conv2d(1, 1, 1))
    weight = network[0].weight
    replace_group_norms(network)
    assert [type(m) for m in (network[0], network[1][0])] == [ChannelsLastGroupNorm] * 2
    assert network[0].weight is weight
    assert network[1][0](torch.randn(1, 4, 2, 2)).shape == (1, 4, 2, 2)
