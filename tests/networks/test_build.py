from typing import get_args

import pytest
import torch
from torch import nn

from fairdiff_lightning.networks.build import NetworkName, build_network

SIX_LEVELS = {"channels": (16, 32, 64, 128, 128, 256), "strides": (2,) * 5}
TWO_LEVELS = {"channels": (4, 8), "strides": (2,)}
SMALL_SWIN = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "window_size": 2}
SMALL_UNETR = {"feature_size": 4, "hidden_size": 8, "mlp_dim": 16, "num_heads": 2}
SMALLEST = [
    ("unet", (4, 6), {**TWO_LEVELS, "num_res_units": 1}),
    ("unet", (4, 2, 6), TWO_LEVELS),
    ("attention_unet", (4, 6), TWO_LEVELS),
    ("attention_unet", (4, 2, 6), TWO_LEVELS),
    ("dynunet", (16, 20), {"filters": (4, 6, 8)}),
    ("dynunet", (16, 7, 8), {"filters": (4, 6, 8)}),
    ("swin_unetr", (64, 32), SMALL_SWIN),
    ("swin_unetr", (64, 32, 32), SMALL_SWIN),
    ("unetr", (16, 32), SMALL_UNETR),
    ("unetr", (16, 32, 16), SMALL_UNETR),
    ("resnet_unet", (32, 64), {"encoder": "resnet18", "width": 8}),
    ("segresnet", (8, 16), {"blocks_down": (1, 1, 1, 1)}),
    ("segresnet", (8, 16, 8), {"blocks_down": (1, 1, 1, 1)}),
    ("tiny", (32, 16), {}),
]


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("attention_unet", SIX_LEVELS, "2DAttentionUnet"),
        ("unet", {**SIX_LEVELS, "num_res_units": 0}, "2DUNet"),
        ("unet", {**SIX_LEVELS, "num_res_units": 1}, "2DResUNet"),
        ("unetr", {}, "2DUNETR"),
        ("resnet_unet", {}, "ResNet50UNet"),
    ],
)
def test_networks_of_diffboost_have_the_sizes_of_the_authors_code(reference, name, arguments, expected):
    size = reference("diffboost")["model_sizes"]["segmentation_backbones_monai_1.6.1"][expected]
    with torch.device("meta"):
        network = build_network(name, 1, 2, 384, arguments)
    assert parameters(network) == size.get("params_excluding_unused_fc", size["params"])
    assert list(network(torch.rand(1, 1, 384, 384, device="meta")).shape) == size["out"]


def test_swin_unetr_of_diffboost_has_the_size_of_the_authors_code(reference):
    sizes = reference("diffboost")["model_sizes"]["segmentation_backbones_monai_1.6.1"]
    network = build_network("swin_unetr", 1, 2, 384, {})  # MONAI cannot build it on "meta"
    assert parameters(network) == sizes["2DSwinUNETR_without_img_size"]["params"]


def test_the_resnet_of_the_paper_is_an_argument_and_grey_is_seen_as_colour():
    with torch.device("meta"):
        widths = build_network("resnet_unet", 1, 2, 64, {"encoder": "resnet50"}).encoder.feature_info.channels()
    assert widths == [64, 256, 512, 1024, 2048]
    network = build_network("resnet_unet", 1, 2, 64, {"encoder": "resnet18", "width": 8}).eval()
    grey = torch.rand(2, 1, 64, 64)
    assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))
    assert build_network("resnet_unet", 4, 2, 64, {"encoder": "resnet18"}).encoder.conv1.in_channels == 4
    with torch.device("meta"), pytest.raises(ValueError, match=r"'convnext_atto': .* by \[4, 8, 16, 32\]"):
        build_network("resnet_unet", 1, 2, 64, {"encoder": "convnext_atto"})


@pytest.mark.parametrize(("name", "size", "arguments"), SMALLEST)
def test_smallest_image_goes_through_and_every_weight_learns(name, size, arguments):
    torch.manual_seed(0)
    network = build_network(name, 2, 3, size, arguments).train()
    logits = network(torch.rand(2, 2, *size))
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    frozen = {key for key, p in network.named_parameters() if not p.requires_grad}
    assert {key for key, p in network.named_parameters() if p.grad is None} == frozen, "DDP waits for every gradient"
    assert frozen == {key for key, _ in network.named_parameters() if name == "unetr" and "norm_cross_attn" in key}


@pytest.mark.parametrize("size", [32, (64, 64, 32)])
@pytest.mark.parametrize("name", ["unet", "attention_unet", "dynunet", "segresnet"])
def test_defaults_fit_images_and_volumes(name, size):
    sides = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):
        network = build_network(name, 1, 2, size, {})
        assert network(torch.empty(1, 1, *sides)).shape == (1, 2, *sides)


def strides(size):
    with torch.device("meta"):
        return build_network("dynunet", 1, 2, size, {}).strides


def test_dynunet_for_cubes_of_96_is_the_one_of_difftumor():
    with torch.device("meta"):
        ours = build_network("dynunet", 1, 3, (96, 96, 96), {})
        from monai.networks.nets import DynUNet

        theirs = DynUNet(3, 1, 3, (3,) * 5, (1, 2, 2, 2, 2), (2,) * 4)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.strides == ((1, 1, 1), *[(2, 2, 2)] * 4)
    assert not ours.deep_supervision
    assert list(ours.filters) == [32, 64, 128, 256, 320]


def test_dynunet_halves_an_axis_while_half_of_it_has_four_pixels():
    assert strides((64, 64, 32)) == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 1))
    assert strides((16, 7, 8)) == ((1, 1, 1), (2, 1, 2), (2, 1, 1))
    assert strides(1024) == ((1, 1), *[(2, 2)] * 4)


def test_dynunet_with_strides_of_the_user_gets_kernels_to_match():
    network = build_network(
        "dynunet", 1, 2, (12, 8, 3), {"strides": (1, (2, 2, 1), (2, 2, 1), (1, 2, 1)), "filters": (4,) * 4}
    )
    assert network(torch.rand(1, 1, 12, 16, 3)).shape == (1, 2, 12, 16, 3)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("dynunet", (64, 50, 32), r"side 1 .* 50 pixels.* multiple of 8: .* 48 or 56"),
        ("dynunet", 12, "at least 16 pixels"),
        ("unet", (32, 40), r"side 1 .* 40 pixels.* multiple of 16: .* 32 or 48"),
        ("attention_unet", (8, 32), r"side 0 .* 8 pixels.* multiple of 16: .* to 16\."),
        ("attention_unet", 16, "single one .* twice as large"),
        ("swin_unetr", 48, r"multiple of 32: .* 32 or 64"),
        ("segresnet", (16, 16, 12), r"side 2 .* multiple of 8"),
        ("unetr", (32, 24), r"side 1 .* multiple of 16: .* 16 or 32"),
        ("resnet_unet", 48, r"multiple of 32: .* 32 or 64"),
        ("resnet_unet", (32, 64, 64), "'resnet_unet' is 2-D"),
        ("tiny", (32, 32, 32), "multiples of 16"),
        ("samed", (32, 32, 32), "square images"),
        ("resunet3d", 64, "three sides"),
        ("unet", (32,), "three sides"),
    ],
)
def test_sides_that_do_not_fit_are_named_with_what_does(name, size, message):
    with pytest.raises(ValueError, match=message):
        build_network(name, 1, 2, size, {})


def test_image_that_does_not_fit_is_refused_before_it_fails():
    network = build_network("unet", 1, 2, 32, {})
    with pytest.raises(ValueError, match=r"side 1 .* 40 pixels.* multiple of 16"):
        network(torch.rand(1, 1, 32, 40))
    with pytest.raises(ValueError, match="is 2-D"):
        network(torch.rand(1, 1, 32, 32, 32))


def test_image_of_another_size_than_a_transformers_own_is_refused():
    network = build_network("unetr", 1, 2, 32, SMALL_UNETR)
    with pytest.raises(ValueError, match=r"\(32, 48\) pixels in network 'unetr', which is made for \(32, 32\)"):
        network(torch.rand(1, 1, 32, 48))


def test_strides_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"2 of them.* \(2, 2, 2\)"):
        build_network("unet", 1, 2, 32, {"channels": (4, 8), "strides": ((2, 2, 2),)})


def test_unknown_name_lists_all_names():
    with pytest.raises(ValueError, match="'vnet' is not known") as caught:
        build_network("vnet", 1, 2, 32, {})
    names = {name for part in get_args(NetworkName) for name in (get_args(part) or (part,))}
    assert names == set(str(caught.value).partition("one of ")[2].rstrip(".").split(", "))


@pytest.mark.parametrize(
    "name", ["unet", "attention_unet", "dynunet", "swin_unetr", "segresnet", "samed", "tiny", "unetr"]
)
@pytest.mark.parametrize("argument", ["depth", "in_channels"])
def test_unknown_argument_is_named_with_those_that_there_are(name, argument):
    with pytest.raises(ValueError, match=rf"{name}' takes no argument \['{argument}'\]; it takes "):
        build_network(name, 1, 2, 32, {argument: 3})


def test_deep_supervision_is_refused_by_name():
    arguments = {"filters": (4, 6, 8), "deep_supr_num": 1}
    with pytest.raises(ValueError, match=r"'dynunet' has deep_supervision=True.*leave deep_supervision out"):
        build_network("dynunet", 1, 2, (16, 16, 16), {**arguments, "deep_supervision": True})
    assert not build_network("dynunet", 1, 2, (16, 16, 16), {**arguments, "deep_supervision": False}).deep_supervision


def test_check_of_the_image_leaves_the_weights_alone():
    network = build_network("unet", 1, 2, 32, TWO_LEVELS)
    assert isinstance(network, nn.Module)
    build_network("unet", 1, 2, 48, TWO_LEVELS).load_state_dict(network.state_dict())
