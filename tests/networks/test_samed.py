import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SamConfig, SamModel
from transformers.models.sam.modeling_sam import SamMaskDecoder

from fairdiff_lightning.networks.build import build_network
from fairdiff_lightning.networks.checkpoint import CheckpointMismatchError
from fairdiff_lightning.networks.samed import SAMed, SplitProjection

TINY = {
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "window_size": 2,
        "global_attn_indexes": [1],
        "output_channels": 16,
        "num_pos_feats": 8,
        "mlp_dim": 64,
    },
    "prompt_encoder_config": {"hidden_size": 16, "patch_size": 8},
    "mask_decoder_config": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "mlp_dim": 32,
        "iou_head_hidden_dim": 16,
    },
}


def tiny(**arguments):
    torch.manual_seed(0)
    return SAMed(**{"num_classes": 3, "in_channels": 1, "image_size": 32, "config": TINY, **arguments})


@pytest.fixture
def folder(tmp_path):
    """SAM as transformers saves it, for images of 64 pixels, with weights all of which matter."""
    torch.manual_seed(1)
    parts = {name: dict(part) for name, part in TINY.items()}
    for name in ("vision_config", "prompt_encoder_config"):
        parts[name]["image_size"] = 64
    sam = SamModel(SamConfig(**parts))
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.normal_(std=0.3)
    sam.save_pretrained(tmp_path / "sam")
    return tmp_path / "sam"


def count(parameters):
    return sum(p.numel() for p in parameters)


def test_sizes_are_those_of_the_authors_code(reference):
    expected = reference("fairdiff")["sn01_params"]["expected"]["samed_vit_b_512_rank4_2cls"]
    with torch.device("meta"):
        network = SAMed(num_classes=3, image_size=512, rank=4)
    assert count(network.parameters()) == expected["total"] == 91_350_543
    assert count(p for p in network.parameters() if p.requires_grad) == expected["trainable"] == 4_071_695
    encoder, prompts, decoder = network.sam.vision_encoder, network.sam.prompt_encoder, network.sam.mask_decoder
    assert count(p for p in encoder.parameters() if p.requires_grad) == expected["lora"]
    assert count(prompts.parameters()) == expected["prompt_encoder"]
    assert count(decoder.parameters()) == expected["mask_decoder"]
    assert encoder.pos_embed.shape[1:3] == (expected["img_embedding_size"],) * 2


@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (3, 4)])
def test_logits_have_the_size_of_the_image(channels, classes):
    network = build_network("samed", channels, classes, 32, {"config": TINY, "rank": 2})
    assert network(torch.rand(3, channels, 32, 32)).shape == (3, classes, 32, 32)


def test_grey_image_is_one_of_equal_colours():
    image = torch.rand(2, 1, 32, 32)
    grey, colour = tiny(), tiny(in_channels=3)
    assert torch.equal(grey(image), colour(image.expand(-1, 3, -1, -1)))


def test_normalization_is_that_of_sam():
    image = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    raw = tiny(in_channels=3, normalize=False)
    torch.testing.assert_close(tiny(in_channels=3)(image), raw((255 * image - mean) / std))


@pytest.mark.parametrize("bias", [True, False])
def test_split_projection_is_the_fused_one(bias):
    fused, x = torch.nn.Linear(6, 18, bias), torch.randn(2, 5, 6)
    torch.testing.assert_close(SplitProjection(fused)(x), fused(x))


def test_low_rank_updates_change_nothing_at_the_start():
    network, image = tiny(), torch.rand(2, 1, 32, 32)
    before = network(image)
    for name, parameter in network.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter)
    assert torch.equal(network(image), before)


def test_low_rank_updates_are_products_added_to_query_and_value_only():
    network, x = tiny(rank=2), torch.randn(2, 5, 32)
    projection = network.sam.vision_encoder.layers[0].attn.qkv
    expected = [p.get_submodule("base_layer")(x) if p is not projection.key else p(x) for p in projection.children()]
    for i, adapted in ((0, projection.query), (2, projection.value)):
        down, up = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
        torch.nn.init.normal_(up)
        assert down.shape == (2, 32)
        expected[i] = expected[i] + x @ (up @ down).T
    torch.testing.assert_close(projection(x), torch.cat(expected, -1))
    assert type(projection.key) is torch.nn.Linear


def test_decoder_gives_all_masks_that_transformers_cuts_in_two():
    sam = tiny().sam
    features, positions = torch.randn(2, 16, 4, 4), sam.get_image_wide_positional_embeddings()
    ours = sam.mask_decoder(features, positions)
    both = [
        SamMaskDecoder.forward(
            sam.mask_decoder, features, positions.expand(2, -1, -1, -1), None, torch.zeros(1), multimask_output=several
        )[0][:, 0]
        for several in (False, True)
    ]
    torch.testing.assert_close(ours, torch.cat(both, dim=1))


def test_only_updates_prompt_encoder_and_decoder_learn():
    network = tiny()
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    network(torch.rand(2, 1, 32, 32)).square().mean().backward()
    learning = {name.removeprefix("sam.") for name, p in network.named_parameters() if p.grad is not None}
    updates = {
        f"vision_encoder.layers.{i}.attn.qkv.{q}.lora_{k}.default.weight"
        for i in (0, 1)
        for q in ("query", "value")
        for k in "AB"
    }
    used = {f"mask_decoder.{name}" for name, _ in network.sam.mask_decoder.named_parameters() if "iou_pred" not in name}
    assert learning == updates | used | {"prompt_encoder.no_mask_embed.weight"}
    assert all(
        p.grad.abs().sum() > 0 for name, p in network.named_parameters() if "attn.qkv" in name and p.requires_grad
    )


def test_random_encoder_sees_the_image():
    network = tiny()
    features = [network.sam.vision_encoder(torch.rand(1, 3, 32, 32)).last_hidden_state for _ in range(2)]
    assert (features[0] - features[1]).abs().mean() > 0.05


def test_folder_gives_the_encoder_that_transformers_loads(folder):
    published = SamModel.from_pretrained(folder, local_files_only=True)
    network = SAMed(3, 3, 64, pretrained=str(folder), normalize=False)
    image = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(
        network.sam.vision_encoder(image).last_hidden_state, published.vision_encoder(image).last_hidden_state
    )
    torch.testing.assert_close(
        network.sam.get_image_wide_positional_embeddings(), published.get_image_wide_positional_embeddings()
    )
    decoder, expected = network.sam.mask_decoder.state_dict(), published.mask_decoder.state_dict()
    same = {
        name
        for name, tensor in decoder.items()
        if tensor.shape == expected[name].shape and torch.equal(tensor, expected[name])
    }
    fresh = {name for name in decoder if name.startswith(("mask_tokens", "output_hyper", "iou_prediction"))}
    assert same == decoder.keys() - fresh


def test_positions_of_the_folder_are_resampled(folder):
    published = load_file(folder / "model.safetensors")
    encoder = SAMed(2, 1, 32, pretrained=str(folder)).sam.vision_encoder
    grid = published["vision_encoder.pos_embed"]
    pooled = grid.unflatten(2, (4, 2)).unflatten(1, (4, 2)).mean((2, 4))  # half the side: the mean of 2 x 2
    torch.testing.assert_close(encoder.pos_embed, pooled, check_device=False)
    table = published["vision_encoder.layers.1.attn.rel_pos_h"].numpy()  # global block: 15 to 7 relative positions
    places = np.clip((np.arange(7) + 0.5) * 15 / 7 - 0.5, 0, 14)
    expected = np.stack([np.interp(places, np.arange(15), column) for column in table.T], 1)
    np.testing.assert_allclose(encoder.layers[1].attn.rel_pos_h.detach(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(encoder.layers[0].attn.rel_pos_h, published["vision_encoder.layers.0.attn.rel_pos_h"])


@pytest.mark.parametrize("kept", ["shared_image_embedding", "prompt_encoder.shared_embedding"])
def test_tied_positions_are_found_under_either_name(folder, kept):
    weights = load_file(folder / "model.safetensors")
    names = [f"{part}.positional_embedding" for part in ("shared_image_embedding", "prompt_encoder.shared_embedding")]
    (frequencies,) = [weights.pop(name) for name in names if name in weights][:1]
    weights = {name: tensor for name, tensor in weights.items() if name not in names}
    save_file({**weights, f"{kept}.positional_embedding": frequencies}, folder / "model.safetensors")
    network = SAMed(2, 1, 32, pretrained=str(folder))
    assert torch.equal(network.sam.shared_image_embedding.positional_embedding, frequencies)


def test_checkpoint_restores_the_network(tmp_path):
    network, image = tiny(), torch.rand(1, 1, 32, 32)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(5)
    other = SAMed(3, 1, 32, config=TINY)
    assert not torch.equal(other(image), network(image))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(image), network(image))


def test_folder_with_tensors_missing_or_misshapen_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["vision_encoder.neck.conv1.weight"]
    weights["vision_encoder.patch_embed.projection.bias"] = torch.zeros(5)
    weights["vision_encoder.extra"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointMismatchError, match=r"model\.safetensors' does not fit") as caught:
        SAMed(2, 1, 32, pretrained=str(folder))
    assert caught.value.missing == ["vision_encoder.neck.conv1.weight"]
    assert caught.value.unexpected == ["vision_encoder.extra"]
    assert caught.value.misshapen == {"vision_encoder.patch_embed.projection.bias": ((5,), (32,))}


def test_folder_without_sam_is_refused_with_what_was_expected(tmp_path, folder):
    with pytest.raises(ValueError, match=r"no config\.json and no model\.safetensors; expected is a folder with"):
        SAMed(pretrained=str(tmp_path))
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="model_type 'vit'; expected"):
        SAMed(pretrained=str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"in_channels": 2}, "grey.* or 3 .*RGB.* is 2"),
        ({"image_size": 30}, "multiple of 8, but image_size=30"),
        ({"image_size": (32, 40)}, r"square images .* image_size=\(32, 40\)"),
        ({"image_size": 0}, "multiple of 8"),
        ({"rank": 0}, "rank must be positive"),
        ({"config": {"vision": {}}}, "config has no vision; it takes vision_config"),
        ({"config": {"vision_config": {"depth": 3}}}, r"config has no vision_config\.depth"),
        ({"pretrained": "somewhere"}, "exclude each other"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 32, 24)])
def test_image_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"built for \(1, 32, 32\)"):
        tiny()(torch.rand(shape))
