import pytest
import torch
from test_segmenter import SMALL, sample

from fairdiff_lightning import DMoESegmenter, Segmenter
from fairdiff_lightning.data import collate
from fairdiff_lightning.modules.sliding import group_channel, read_group_channel

VOLUMES = {
    "network": "resunet3d",
    "network_args": {"feature_size": 2, "chunk_tokens": 1000},
    "in_channels": 1,
    "num_classes": 3,
    "image_size": None,
    "num_groups": {"race": 3},
    "num_experts": 3,
    "inference": "sliding",
    "roi_size": (64, 32, 32),
}


def test_sliding_windows_carry_the_group_of_their_image():
    module = DMoESegmenter(
        **SMALL | {"image_size": 16}, num_groups={"race": 3}, num_experts=3, inference="sliding", roi_size=16
    ).eval()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 1.0
    module.train()(torch.rand(8, 1, 16, 16), torch.arange(8) % 3)  # statistics with which differences are not flattened
    module.eval()
    batch = collate([sample(i, 40) for i in range(3)])
    with torch.no_grad():
        together = module.infer(batch, "test")
        alone = torch.cat([module.infer(collate([sample(i, 40)]), "test") for i in range(3)])
        moved = {**batch, "attributes": {"race": batch["attributes"]["race"].roll(1)}}
        other = module.infer(moved, "test")
    assert together.shape == (3, 3, 40, 40)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)
    assert (other - together).abs().amax((1, 2, 3)).min() > 0.05, "another group, another prediction"


def test_one_window_as_large_as_the_image_is_the_whole_image():
    arguments = SMALL | {"num_groups": {"race": 3}}
    whole = Segmenter(**arguments).eval()
    sliding = Segmenter(**arguments, inference="sliding", roi_size=32).eval()
    sliding.load_state_dict(whole.state_dict())
    batch = collate([sample(i) for i in range(2)])
    with torch.no_grad():
        torch.testing.assert_close(sliding.infer(batch, "test"), whole.infer(batch, "test"), atol=1e-5, rtol=1e-5)


def test_groups_survive_as_a_padded_channel():
    group = torch.tensor([-1, 0, 4])
    channel = group_channel(group, torch.zeros(3, 1, 5, 7))
    padded = torch.nn.functional.pad(channel, (3, 3, 3, 3))
    assert torch.equal(read_group_channel(padded[:, 0]), group)


def one_and_three_windows_at_a_time(dtype):
    """Two modules of the same weights, and volumes of three groups."""
    torch.manual_seed(0)
    single, several = (DMoESegmenter(**VOLUMES, window_batch_size=count).eval().to(dtype) for count in (1, 3))
    several.load_state_dict(single.state_dict())
    image = torch.rand(3, 1, 71, 31, 29)
    return single, several, {"image": image.to(dtype), "attributes": {"race": torch.tensor([2, 0, 1])}}


def test_windows_at_a_time_do_not_change_the_prediction_of_a_volume():
    """In float64, so that no near tie of experts is decided by the last bit."""
    single, several, batch = one_and_three_windows_at_a_time(torch.float64)
    seen = {}
    for module in (single, several):
        module.network.register_forward_pre_hook(
            lambda _, given, module=module: seen.setdefault(module, []).append(given[1].tolist())
        )
    with torch.no_grad():
        expected, found = single.infer(batch, "test"), several.infer(batch, "test")
        other = several.infer({**batch, "attributes": {"race": torch.tensor([0, 1, 2])}}, "test")
    assert seen[single] == [[2], [2], [0], [0], [1], [1]]
    assert seen[several][:2] == [[2, 2, 0], [0, 1, 1]], "windows of two groups go together"
    assert found.shape == (3, 3, 71, 31, 29)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (other - expected).abs().amax((1, 2, 3, 4)).min() > 1e-3, "another group, another prediction"


def test_windows_at_a_time_do_not_change_the_masks_in_float32():
    single, several, batch = one_and_three_windows_at_a_time(torch.float32)
    moved = {**batch, "attributes": {"race": torch.tensor([0, 1, 2])}}
    with torch.no_grad():
        expected, found = (module.infer(batch, "test").argmax(1) for module in (single, several))
        other = several.infer(moved, "test").argmax(1)
    assert (found != expected).float().mean() < 1e-4, "equal, but for ties that the last bit may decide"
    assert (other != expected).float().mean() > 1e-2, "another group, another mask"


@pytest.mark.parametrize("inference", ["whole", "sliding"])
def test_validation_sees_the_mirrored_prediction_that_is_tested(inference):
    torch.manual_seed(0)
    arguments = SMALL | {"num_groups": {"race": 3}, "num_experts": 4, "inference": inference, "roi_size": 32}
    module = DMoESegmenter(**arguments, mirror=(0, 1)).eval()
    plain = DMoESegmenter(**arguments).eval()
    plain.load_state_dict(module.state_dict())
    batch = collate([sample(i) for i in range(3)])
    image, group = batch["image"], batch["attributes"]["race"]
    with torch.no_grad():
        validated, tested = module.infer(batch, "val"), module.infer(batch, "test")
        upright = plain.infer(batch, "val")
        ways = [module(image.flip(axes), group).flip(axes) for axes in ([], [2], [3], [2, 3])]
    torch.testing.assert_close(validated, tested, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(validated, torch.stack(ways).mean(0), atol=1e-5, rtol=1e-5)
    assert (validated - upright).abs().max() > 1e-3
    if inference == "whole":
        torch.testing.assert_close(module.expert_usage.compute(), plain.expert_usage.compute(), equal_nan=True)
