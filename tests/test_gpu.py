"""What only a CUDA device can show; skipped, and said so, elsewhere."""

import pytest
import torch
from lightning.pytorch import Trainer

from fairdiff_lightning import DMoESegmenter, FairSegDataModule
from fairdiff_lightning.networks import DistributionAwareMoE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_experts_on_the_gpu_equal_those_on_the_cpu(dtype, tolerance):
    layer = DistributionAwareMoE(64, num_experts=6, num_groups=3).eval()
    with torch.no_grad():
        layer.router.bias[:, 0, [0, 3, 5]] = -100.0  # experts without rows, the first and the last among them
    tokens, group = torch.randn(5, 33, 64), torch.tensor([0, 2, 2, 1, 0])
    expected = layer(tokens, group)
    wanted = torch.autograd.grad(expected.square().sum(), list(layer.experts.parameters()))
    layer.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = layer(tokens.cuda(), group.cuda())
    gradients = torch.autograd.grad(found.float().square().sum(), list(layer.experts.parameters()))
    torch.testing.assert_close(found.cpu().float(), expected, atol=tolerance, rtol=tolerance)
    for ours, exact in zip(gradients, wanted, strict=True):
        assert float((ours.cpu().float() - exact).norm()) <= tolerance * max(float(exact.norm()), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mixture_never_waits_for_the_gpu(dtype):
    layer = DistributionAwareMoE(64, num_groups=3).cuda()
    tokens, group = torch.randn(5, 33, 64, device="cuda"), torch.tensor([0, 2, 2, 1, 0], device="cuda")

    def step():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            layer(tokens, group).float().sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


@pytest.mark.parametrize("compile", [False, True])
def test_bf16_training_lowers_the_loss(tmp_path, compile):
    data = FairSegDataModule(image_size=64, batch_size=16)
    model = DMoESegmenter(
        network="tiny", num_classes=3, in_channels=1, image_size=64, num_groups={"race": 3}, compile=compile
    )
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="gpu", devices=1, precision="bf16-mixed", max_epochs=5, logger=False
    )
    trainer.validate(model, data, verbose=False)
    before = float(trainer.callback_metrics["val/loss"])
    trainer.fit(model, data)
    assert float(trainer.callback_metrics["val/loss"]) < 0.7 * before
