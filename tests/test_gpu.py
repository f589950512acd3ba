"""What only a CUDA device can show; skipped, and said so, elsewhere."""

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_stable_diffusion import write_stable_diffusion
from torch.utils.data import DataLoader

from fairdiff_lightning import DMoESegmenter, FairSegDataModule
from fairdiff_lightning.callbacks import TrainableEMA
from fairdiff_lightning.modules import ControlNetSynth, PairedGuidedDiffusion, PointDiffusion
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


def points(**arguments):
    """PointDiffusion on the phantom's frame; its clouds scatter widely enough to outline something."""
    torch.manual_seed(0)
    module = PointDiffusion(
        **{"image_size": 64, "num_points": 48, "num_groups": {"race": 3}, "num_steps": 5, "num_validation_samples": 4},
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-5),
        **arguments,
    )
    with torch.no_grad():
        for parameter in module.network.denoiser.layers[-1].parameters():
            parameter.mul_(0.1)
        module.network.prior_mean.weight.normal_()
        module.statistics.scale.mul_(4)
    return module


def tiny_controlnet(**arguments):
    torch.manual_seed(0)
    small = {"block_out_channels": (16, 32), "attention_head_dim": 4, "norm_num_groups": 4}
    facts = {"num_classes": 3, "in_channels": 1, "image_size": 64, "num_groups": {"race": 3}, "num_steps": 4}
    return ControlNetSynth(
        **{"base": "tiny", "base_args": small, "trained": "all", "prompt": "{group}", "num_validation_samples": 4}
        | facts
        | arguments
    )


def batch(count=8):
    random = torch.Generator().manual_seed(3)
    return {
        "id": [f"s{i}" for i in range(count)],
        "image": torch.rand(count, 1, 64, 64, generator=random),
        "mask": torch.randint(3, (count, 1, 64, 64), generator=random),
        "points": torch.rand(count, 48, 3, generator=random) * 60,
        "attributes": {"race": torch.arange(count) % 3},
        "seed": torch.arange(count) + 100,
    }


def pairs(**arguments):
    sizes = {"image_size": 64, "widths": (32, 64), "num_classes": 3, "num_steps": 4}
    return PairedGuidedDiffusion(**{**sizes, "num_groups": {"race": 3}, "attributes": ("race",), **arguments})


def rows(value, i):
    return {k: rows(v, i) for k, v in value.items()} if isinstance(value, dict) else value[i : i + 1]


def on_gpu(value):
    if isinstance(value, dict):
        return {key: on_gpu(part) for key, part in value.items()}
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    "make",
    [
        points,
        lambda: points(reference_behaviour=True),
        tiny_controlnet,
        lambda: tiny_controlnet(condition="colours", min_snr_gamma=5.0, scheduler="DPMSolverMultistepScheduler"),
        pairs,
        lambda: pairs(variant="two_channel", gradient_checkpointing=True),
    ],
    ids=["points", "points-reference", "one_hot", "colours", "pairs", "two_channel"],
)
def test_a_generators_training_step_never_waits_for_the_gpu(make):
    module, given = make().cuda().train(), on_gpu(batch())

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = module.losses(given)["loss"]
        loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["points", "controlnet", "pairs"])
def test_generators_train_in_bf16_with_an_average_and_generate(tmp_path, kind):
    module = {"points": points, "controlnet": tiny_controlnet, "pairs": pairs}[kind]()
    facts = {"num_points": 48} if kind == "points" else {}
    data = FairSegDataModule(image_size=64, batch_size=8, attributes=["race"], augment=False, **facts)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=8,
        limit_val_batches=1,
        logger=False,
        callbacks=[TrainableEMA(0.9)],
    )
    trainer.fit(module, data)
    assert bool(trainer.callback_metrics["train/loss"].isfinite())
    if kind == "points":  # a few steps make no outlines: scatter the clouds again
        module.statistics.scale.mul_(4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    asked = {key: value for key, value in batch().items() if kind != "pairs" or key not in ("image", "mask", "points")}
    loader = DataLoader([asked], batch_size=None)
    (made,) = trainer.predict(module, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    if kind == "points":
        assert made["mask"].shape == (8, 1, 64, 64)
        assert made["points"].dtype == torch.float32
    else:
        assert made["image"].dtype == torch.float32
        assert bool(made["image"].isfinite().all())


def test_masks_are_the_same_on_the_gpu_alone_and_in_a_batch():
    module = points().eval()
    asked = {key: value for key, value in batch().items() if key in ("id", "seed", "attributes")}
    expected = module.generate(asked)["mask"]
    module.cuda()
    together = module.generate(on_gpu(asked))["mask"].cpu()
    alone = torch.cat([module.generate(on_gpu(rows(asked, i)))["mask"].cpu() for i in range(8)])
    assert torch.equal(together, expected)
    assert torch.equal(alone, expected)


def test_the_authors_weights_load_into_modules_on_the_gpu(tmp_path):
    source, module = points(reference_behaviour=True), points(reference_behaviour=True).cuda()
    module.losses(on_gpu(batch()))  # moves the schedule to the device
    tensors = {name: tensor + 1 for name, tensor in source.network.reference_tensors().items()}
    module.load_reference_weights(tensors, {"mean": torch.zeros(1, 3), "std": torch.ones(1)})
    for name, tensor in module.network.reference_tensors().items():
        assert torch.equal(tensor.cpu(), tensors[name])
    base = str(write_stable_diffusion(tmp_path))
    facts = {"num_classes": 3, "in_channels": 1, "image_size": (24, 16)}
    original = ControlNetSynth(base, **facts).reference_weights()
    branch = ControlNetSynth(base, **facts).cuda()
    assert branch.load_reference_weights(original).loaded


def test_prompts_are_encoded_after_a_pipeline_has_moved_the_text_encoder(tmp_path):
    module = ControlNetSynth(str(write_stable_diffusion(tmp_path)), image_size=(24, 16), prompt=None).cuda()
    before = module.prompts.encode(["left eye"], module.device)
    module.to_pipeline().to("cuda")
    assert module.prompts.encoder.encoder.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16):
        after = module.prompts.encode(["right eye", "left eye"], module.device)
    assert after.dtype == torch.float32
    assert after.device.type == "cuda"
    assert torch.equal(after[1:], before)


def test_images_of_a_request_agree_within_a_grey_level_in_any_batch():
    module = tiny_controlnet().cuda().eval()
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        together = module.generate(on_gpu(batch()))["image"]
        alone = torch.cat([module.generate(on_gpu(rows(batch(), i)))["image"] for i in range(8)])
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed
    assert float((together - alone).abs().max()) <= 1 / 255
