"""TransUNet against the authors' parameter counts, names and outputs, timm's own weights, and plain properties."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from fairdiff_lightning.networks import CheckpointMismatchError, TransUNet, transunet

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "dmoe.json").read_text())
COUNTS = REFERENCE["I1_param_counts_2d"]["counts"]
KEYS = {name: tuple(shape) for name, shape in REFERENCE["I3_state_dict_keys_2d"]["keys"]}
H1 = REFERENCE["H1_transunet_dmoe_forward"]
SKIPS_OF_R50 = 9 * (512 * 256 + 256 * 128 + 64 * 64)  # weights that the skips add to three 3x3 convolutions


def tiny(**arguments) -> TransUNet:
    return TransUNet("tiny", **{"image_size": (32, 48), "num_classes": 3, **arguments})


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- the authors' numbers


@pytest.mark.parametrize("key", COUNTS)
def test_parameter_count_equals_the_reference(key):
    config, classes, routers = re.fullmatch(r"(.+)\|cls(\d+)\|dmoe(\d+)", key).groups()
    variant = {"ViT-B_16": "vit_b16", "R50-ViT-B_16": "r50_vit_b16"}[config]
    with torch.device("meta"):
        network = TransUNet(variant, num_classes=int(classes), num_groups=int(routers) or None)
    assert count(network) == COUNTS[key] + (SKIPS_OF_R50 if variant == "r50_vit_b16" else 0)


def test_parts_have_the_sizes_of_the_reference():
    with torch.device("meta"):
        network = TransUNet("vit_b16", num_classes=3, num_groups=3)
        hybrid = TransUNet("r50_vit_b16")
    parts = REFERENCE["I1_param_counts_2d"]["parts_ViT-B_16_cls3_dmoe3"]
    assert count(network.mixtures) == parts["sparseMoE"]
    assert count(network.mixtures[0].experts[0]) == parts["moe_one_expert"]
    assert count(network.decoder) == parts["decoder"]
    assert count(network.encoder.blocks) == parts["encoder_blocks"]
    assert count(network.segmentation_head) == parts["segmentation_head"]
    assert count(hybrid.encoder.patch_embed.backbone) == 11_894_848


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    with torch.device("meta"):
        network = TransUNet("vit_b16", num_classes=3, num_groups=3)
    assert {name: tuple(tensor.shape) for name, tensor in network.reference_tensors().items()} == KEYS


def filled_state() -> dict[str, Tensor]:
    """The fill rule of check H1."""
    state = {}
    for p, name in enumerate(sorted(KEYS)):
        shape = KEYS[name]
        k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        value = k.mul_(0.7).add_(1.3 * p).sin_().mul_(0.05).float().view(shape)
        if name.endswith("num_batches_tracked"):
            value = torch.zeros((), dtype=torch.int64)
        elif "running_" in name:
            value = torch.full(shape, float(name.endswith("var")))
        elif "noise_linear" in name:
            value = torch.full(shape, -100.0 if name.endswith("bias") else 0.0)
        elif name.endswith(".weight") and len(shape) == 1:
            value += 1
        state[name] = value
    return state


@pytest.fixture(scope="module")
def published() -> TransUNet:
    with torch.device("meta"):
        network = TransUNet("vit_b16", num_classes=3, num_groups=3)
    network.to_empty(device="cpu").eval()
    report = network.load_reference_weights({"state_dict": {f"module.{name}": t for name, t in filled_state().items()}})
    assert sorted(report.loaded) == sorted(KEYS)
    return network


@pytest.mark.parametrize("case", [key for key in H1 if key.startswith("attr")])
def test_forward_equals_the_reference(published, case):
    expected, ids = H1[case], re.findall(r"\d", case)
    group = torch.tensor([int(i) for i in ids]) if ids else None
    k = torch.arange(2 * 3 * 224 * 224, dtype=torch.float64)
    image = (torch.sin(0.0137 * k) * 0.5 + 0.5).float().view(2, 3, 224, 224)
    with torch.inference_mode():
        logits = published(image, group).double()
    assert list(logits.shape) == expected["shape"]
    assert logits.mean().item() == pytest.approx(expected["mean"], rel=1e-4)
    assert logits.std().item() == pytest.approx(expected["std"], rel=1e-4)
    assert logits.norm().item() == pytest.approx(expected["l2"], rel=1e-4)
    assert logits.max().item() == pytest.approx(expected["max"], rel=1e-4)
    values = logits.flatten()[expected["flat_index"]]
    assert values.tolist() == pytest.approx(expected["flat_value"], rel=1e-4, abs=1e-4)


def test_checkpoint_of_another_network_is_refused_by_name():
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in KEYS.items()}
        network = TransUNet("vit_b16", num_classes=2, num_groups=2)
    with pytest.raises(CheckpointMismatchError) as caught:
        network.load_reference_weights(state)
    assert caught.value.misshapen["segmentation_head.0.weight"] == ((3, 16, 3, 3), (2, 16, 3, 3))
    assert "transformer.encoder.sparseMoE.router.2.noise_linear.bias" in caught.value.unexpected
    for variant, sharing in (("tiny", "shared"), ("vit_b16", "per_block")):
        with torch.device("meta"):
            other = TransUNet(variant, num_groups=3, moe_sharing=sharing)
        with pytest.raises(ValueError, match="variant='vit_b16' with moe_sharing='shared'"):
            other.load_reference_weights(state)


# ---- the network


@pytest.mark.parametrize("sharing", ["shared", "per_block"])
def test_logits_and_gates_have_their_shapes_and_every_parameter_a_gradient(sharing):
    network = tiny(num_groups=3, moe_sharing=sharing)
    logits, gates = network(torch.rand(3, 3, 32, 48), torch.tensor([2, 0, 2]), return_gates=True)
    assert logits.shape == (3, 3, 32, 48)
    assert gates.shape == (4, 3, 6, 8)
    torch.testing.assert_close(gates.sum(-1), torch.ones(4, 3, 6))
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_tiny_is_small():
    assert 1e6 < count(tiny(num_groups=3)) < 2.5e6


def test_experts_are_shared_by_the_blocks_or_each_blocks_own():
    assert len(tiny(num_groups=2).mixtures) == 1
    network = tiny(num_groups=2, moe_sharing="per_block").eval()
    assert len(network.mixtures) == 4
    image, group = torch.rand(1, 3, 32, 48), torch.tensor([1])
    before = network(image, group)
    with torch.no_grad():
        network.mixtures[3].experts[0].bias2.add_(1)
        network.mixtures[3].router.bias[:, 0, 0].add_(99)
    assert not torch.allclose(network(image, group), before)


def test_without_group_the_network_is_the_plain_one():
    routed, plain = tiny(num_groups=2).eval(), tiny().eval()
    plain.load_state_dict({name: t for name, t in routed.state_dict().items() if not name.startswith("mixtures")})
    image = torch.rand(2, 3, 32, 48)
    assert torch.equal(routed(image), plain(image))
    assert torch.equal(plain(image, torch.tensor([0, 1])), plain(image))
    assert not torch.allclose(routed(image, torch.tensor([0, 1])), plain(image))
    for call in (
        lambda: routed(image, return_gates=True),
        lambda: plain(image, torch.tensor([0, 1]), return_gates=True),
    ):
        with pytest.raises(ValueError, match="no gates to return"):
            call()


def test_evaluation_is_deterministic_and_follows_the_batch_order():
    network = tiny(num_groups=3).eval()
    image, group, order = torch.rand(4, 3, 32, 48), torch.tensor([2, 0, 1, 2]), torch.tensor([3, 1, 0, 2])
    with torch.no_grad():
        logits = network(image, group)
        assert torch.equal(network(image, group), logits)
        torch.testing.assert_close(network(image[order], group[order]), logits[order], rtol=1e-4, atol=1e-5)


def test_each_group_has_its_own_router():
    network = tiny(num_groups=2).eval()
    image = torch.rand(1, 3, 32, 48)
    assert not torch.allclose(network(image, torch.tensor([0])), network(image, torch.tensor([1])))


def test_group_prior_reaches_every_router():
    network = tiny(num_groups=2, moe_sharing="per_block", unknown_group="prior")
    network.set_group_prior(torch.tensor([1, 3]))
    assert all(mixture.router.group_prior.tolist() == [0.25, 0.75] for mixture in network.mixtures)


def test_gray_images_are_repeated_to_three_channels():
    gray, colour = tiny(in_channels=1).eval(), tiny().eval()
    colour.load_state_dict(gray.state_dict())
    image = torch.rand(2, 1, 32, 48)
    assert torch.equal(gray(image), colour(image.repeat(1, 3, 1, 1)))
    assert tiny(in_channels=4)(torch.rand(2, 4, 32, 48)).shape == (2, 3, 32, 48)


def test_another_image_size_interpolates_the_positions():
    network, other = tiny().eval(), tiny(image_size=(64, 32)).eval()
    state = network.state_dict()
    table = state["encoder.pos_embed"].view(1, 2, 3, 128).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, size=(4, 2), mode="bicubic", antialias=True)
    state["encoder.pos_embed"] = table.permute(0, 2, 3, 1).reshape(1, 8, 128)
    other.load_state_dict(state)
    image = torch.rand(1, 3, 64, 32)
    torch.testing.assert_close(network(image), other(image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 100}, "image_size must be one or two positive multiples of 16, but is 100"),
        ({"image_size": (32, 48, 64)}, "image_size"),
        ({"variant": "vit_l16"}, "variant must be one of"),
        ({"moe_sharing": "none"}, "moe_sharing"),
        ({"num_classes": 0}, "num_classes"),
        ({"num_groups": 0}, "num_groups"),
        ({"pretrained": True}, "no published weights for variant 'tiny'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransUNet(**{"variant": "tiny", **arguments})


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match="40 x 48 pixels, but both must be multiples of 16"):
        tiny()(torch.rand(1, 3, 40, 48))
    with pytest.raises(ValueError, match="1 channels, but the network's in_channels is 3"):
        tiny()(torch.rand(1, 1, 32, 48))


def test_dropout_is_that_of_the_reference():
    with torch.device("meta"):
        network = TransUNet("vit_b16", num_groups=2)
    rates = {name: m.p for name, m in network.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0}
    blocks = {f"encoder.blocks.{i}.mlp.drop{j}" for i in range(12) for j in (1, 2)}
    assert rates == dict.fromkeys({"encoder.pos_drop", "mixtures.0.dropout"} | blocks, 0.1)
    assert {block.norm1.eps for block in network.encoder.blocks} == {1e-6}


def test_bfloat16_autocast_trains():
    network = tiny(num_groups=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.rand(2, 3, 32, 48), torch.tensor([0, 1]))
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_graph_breaks_only_where_the_cpu_reads_sizes():
    torch.compiler.reset()
    image, group = torch.rand(2, 3, 32, 48), torch.tensor([0, 1])
    plain, routed = tiny().eval(), tiny(num_groups=2).eval()
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), plain(image))
    reasons = [str(reason.reason) for reason in torch._dynamo.explain(routed)(image, group).break_reasons]
    assert reasons
    assert all("_SplitExperts" in reason for reason in reasons)


# ---- ImageNet weights


@pytest.mark.parametrize(
    ("variant", "name"), [("vit_b16", "vit_base_patch16_224"), ("r50_vit_b16", "vit_base_r50_s16_224")]
)
def test_encoder_has_the_names_and_shapes_of_timm(variant, name):
    with torch.device("meta"):
        ours = TransUNet(variant).encoder.state_dict()
        theirs = timm.create_model(name, num_classes=0).state_dict()
    shapes = {key: tuple(t.shape) for key, t in theirs.items() if key != "cls_token"}
    assert shapes.pop("pos_embed") == (1, 197, 768)
    assert {key: tuple(t.shape) for key, t in ours.items() if key != "pos_embed"} == shapes


def timm_twin(size: tuple[int, int], seed: int = 1) -> torch.nn.Module:
    """The timm model, with class token and classifier, of our tiny encoder."""
    torch.manual_seed(seed)
    model = transunet._vision_transformer(transunet._VARIANTS["tiny"], size, 3, 0.0, class_token=True)
    model.reset_classifier(5)
    return model.eval()


def test_timm_state_dict_gives_the_features_of_timm():
    model, network = timm_twin((32, 32)), tiny(image_size=32).eval()
    report = network.load_pretrained(model.state_dict())
    assert report.ignored == ("cls_token", "head.weight", "head.bias")
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features, _, _ = network._encode(image, None)
        patches = model.patch_embed(image) + model.pos_embed[:, 1:]  # timm's blocks without the class token
        expected = model.norm(model.blocks(patches))
    torch.testing.assert_close(features.flatten(2).mT, expected)


def test_positions_of_another_size_are_resampled():
    model, network = timm_twin((64, 64)), tiny(image_size=(32, 48))
    network.load_pretrained({"state_dict": model.state_dict()})
    grid = model.state_dict()["pos_embed"][:, 1:].view(1, 4, 4, 128).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(2, 3), mode="bicubic", antialias=True)
    torch.testing.assert_close(network.encoder.pos_embed.detach(), grid.flatten(2).mT)


def test_first_convolution_adapts_to_the_channels():
    model, network = timm_twin((32, 48)), tiny(in_channels=2)
    network.load_pretrained(model.state_dict())
    ours = network.encoder.patch_embed.backbone.stem.conv.weight
    torch.testing.assert_close(ours.detach(), model.patch_embed.backbone.stem.conv.weight[:, :2].detach() * 1.5)


def test_weights_of_another_encoder_are_refused_by_name():
    state = timm_twin((32, 32)).state_dict()
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"][:, :-1]
    with pytest.raises(
        CheckpointMismatchError, match=r"blocks\.0\.attn\.qkv\.weight: found \(384, 127\), expected \(384, 128\)"
    ):
        tiny(image_size=32).load_pretrained(state)


def google_names(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Weights of a timm hybrid in the names and layouts of Google's file, written from the published format."""

    def kernel(weight: Tensor) -> np.ndarray:
        return weight.detach().permute(2, 3, 1, 0).numpy() if weight.ndim == 4 else weight.detach().T.numpy()

    def norm(prefix: str, module: torch.nn.Module) -> dict[str, np.ndarray]:
        return {f"{prefix}/scale": module.weight.detach().numpy(), f"{prefix}/bias": module.bias.detach().numpy()}

    backbone, file = model.patch_embed.backbone, {"cls": model.cls_token.detach().numpy()}
    file |= {"conv_root/kernel": kernel(backbone.stem.conv.weight)} | norm("gn_root", backbone.stem.norm)
    for s, stage in enumerate(backbone.stages, start=1):
        for u, block in enumerate(stage.blocks, start=1):
            unit = f"block{s}/unit{u}"
            for i in (1, 2, 3):
                file[f"{unit}/conv{i}/kernel"] = kernel(getattr(block, f"conv{i}").weight)
                file |= norm(f"{unit}/gn{i}", getattr(block, f"norm{i}"))
            file[f"{unit}/conv_proj/kernel"] = kernel(block.downsample.conv.weight)
            file |= norm(f"{unit}/gn_proj", block.downsample.norm)
    file["embedding/kernel"] = kernel(model.patch_embed.proj.weight)
    file["embedding/bias"] = model.patch_embed.proj.bias.detach().numpy()
    file["Transformer/posembed_input/pos_embedding"] = model.pos_embed.detach().numpy()
    file |= norm("Transformer/encoder_norm", model.norm)
    for i, block in enumerate(model.blocks):
        layer, heads = f"Transformer/encoderblock_{i}", block.attn.num_heads
        attention = f"{layer}/MultiHeadDotProductAttention_1"
        for j, part in enumerate(("query", "key", "value")):
            weight, bias = block.attn.qkv.weight.detach().chunk(3)[j], block.attn.qkv.bias.detach().chunk(3)[j]
            file[f"{attention}/{part}/kernel"] = weight.T.reshape(128, heads, -1).numpy()
            file[f"{attention}/{part}/bias"] = bias.view(heads, -1).numpy()
        file[f"{attention}/out/kernel"] = block.attn.proj.weight.detach().T.reshape(heads, -1, 128).numpy()
        file[f"{attention}/out/bias"] = block.attn.proj.bias.detach().numpy()
        for name, linear in (("Dense_0", block.mlp.fc1), ("Dense_1", block.mlp.fc2)):
            file[f"{layer}/MlpBlock_3/{name}/kernel"] = kernel(linear.weight)
            file[f"{layer}/MlpBlock_3/{name}/bias"] = linear.bias.detach().numpy()
        file |= norm(f"{layer}/LayerNorm_0", block.norm1) | norm(f"{layer}/LayerNorm_2", block.norm2)
    return file


def test_google_npz_gives_the_weights_it_holds(tmp_path):
    model = timm_twin((32, 32))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    np.savez(tmp_path / "R50+tiny.npz", **google_names(model))
    network = tiny(image_size=32)
    report = network.load_pretrained(tmp_path / "R50+tiny.npz")
    assert report.ignored == ("cls_token",)
    assert "R50+tiny.npz" in str(report)
    expected = {name: t for name, t in model.state_dict().items() if not name.startswith(("cls_token", "head"))}
    expected["pos_embed"] = expected["pos_embed"][:, 1:]
    torch.testing.assert_close(network.encoder.state_dict(), expected)


def test_pretrained_asks_timm_for_the_imagenet_21k_weights(monkeypatch):
    class Model:
        def state_dict(self) -> dict[str, Tensor]:
            return timm_twin((32, 32)).state_dict()

    def create_model(name: str, pretrained: bool, num_classes: int) -> Model:
        assert (name, pretrained, num_classes) == ("vit_base_r50_s16_224.orig_in21k", True, 0)
        return Model()

    assert transunet._VARIANTS["vit_b16"].pretrained == "vit_base_patch16_224.augreg_in21k"
    published = transunet._VARIANTS["r50_vit_b16"].pretrained
    small = dataclasses.replace(transunet._VARIANTS["tiny"], pretrained=published)
    monkeypatch.setitem(transunet._VARIANTS, "tiny", small)
    monkeypatch.setattr(timm, "create_model", create_model)
    loaded = tiny(image_size=32, pretrained=True).encoder.state_dict()
    torch.testing.assert_close(loaded["blocks.2.mlp.fc1.weight"], timm_twin((32, 32)).blocks[2].mlp.fc1.weight.detach())


def test_networks_import_without_timm():
    code = (
        "import sys, fairdiff_lightning.networks as n; n.DistributionAwareMoE; "
        "assert 'timm' not in sys.modules and 'lightning' not in sys.modules; n.TransUNet; assert 'timm' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
