"""Which networks DiffBoost's code takes from MONAI, and what the last of them gives."""

import pytest
import torch

from fairdiff_lightning.networks.build import build_network

LEVELS = {"channels": [16, 32, 64, 128, 128, 256], "strides": [2] * 5}


@pytest.fixture
def backbones(reference):
    return reference("diffboost")["model_sizes"]["segmentation_backbones_monai_1.6.1"]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("attention_unet", LEVELS, "2DAttentionUnet"),
        ("unet", {**LEVELS, "num_res_units": 0}, "2DUNet"),
        ("unet", {**LEVELS, "num_res_units": 1}, "2DResUNet"),
        ("unetr", {}, "2DUNETR"),
    ],
)
def test_networks_are_those_of_monai_that_the_authors_take(backbones, name, arguments, expected):
    with torch.device("meta"):
        network = build_network(name, 1, 2, 384, arguments)
    assert type(network).__module__.startswith("monai.networks.nets")
    assert type(network).__name__ == backbones[expected]["class"]


def test_swin_unetr_gives_logits_of_the_images_size_where_the_authors_code_fails(backbones):
    assert backbones["2DSwinUNETR"].startswith("TypeError")
    network = build_network("swin_unetr", 1, 2, 384, {}).to("meta")
    assert (
        list(network(torch.rand(1, 1, 384, 384, device="meta")).shape)
        == backbones["2DSwinUNETR_without_img_size"]["out"]
    )
