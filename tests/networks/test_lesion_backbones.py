import pytest
import torch

from fairdiff_lightning.modules import LeFusionInpaint, LesionMaskDiffusion
from fairdiff_lightning.networks.lesion_backbones import VolumeUNet, build_lesion_network

SIZES = {"width": 8, "multipliers": (1, 2), "image_size": (8, 8, 4)}


@pytest.mark.parametrize(("backbone", "conditioning"), [("lesion_unet", "film"), ("diffusion_unet", "cross_attention")])
def test_networks_are_called_alike(backbone, conditioning):
    torch.manual_seed(0)
    network = build_lesion_network(backbone, 2, 2, cond_dim=16, conditioning=conditioning, **SIZES).eval()
    noisy, condition = torch.randn(3, 2, 8, 8, 4), torch.rand(3, 16)
    with torch.no_grad():
        found = network(noisy, torch.tensor(5), condition)
        assert found.shape == noisy.shape
        alone = network(noisy[1:2], torch.tensor([5]), condition[1:2])
        torch.testing.assert_close(found[1:2], alone, atol=1e-4, rtol=1e-4)
        dropped = torch.tensor([True, False, True])
        mixed = network(noisy, torch.tensor(5), condition, dropped)
        torch.testing.assert_close(mixed[0], network(noisy, torch.tensor(5))[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mixed[1], found[1], atol=1e-4, rtol=1e-4)


def test_the_null_condition_is_trained():
    network = VolumeUNet(1, 1, 8, (1, 2), 16)
    torch.nn.init.normal_(network.network.out[2].conv.weight)
    dropped = torch.tensor([True, False])
    network(torch.randn(2, 1, 8, 8, 4), torch.tensor([3, 4]), torch.rand(2, 16), dropped).sum().backward()
    assert network.null_condition.grad is not None


def test_lesions_and_masks_by_monais_network():
    shared = {"image_size": (8, 8, 4), "width": 8, "multipliers": (1, 2), "backbone": "diffusion_unet", "num_steps": 3}
    painter = LeFusionInpaint(
        **shared, conditioning="cross_attention", jump_length=1, jump_n_sample=1, textures=1, roi="lesion"
    ).eval()
    mask = torch.zeros(2, 1, 8, 8, 4, dtype=torch.int64)
    mask[:, :, 2:6, 2:6, 1:3] = 1
    asked = {"id": ["a", "b"], "image": torch.rand(2, 1, 8, 8, 4), "mask": mask, "seed": torch.arange(2)}
    painter.bank.measure(painter.histograms({**asked, "attributes": {}}))
    made = painter.generate({**asked, "attributes": {}})["image"]
    assert torch.equal(made[mask == 0], asked["image"][mask == 0])
    masks = LesionMaskDiffusion(**shared).eval()
    assert masks.sample(torch.tensor([[4.0, 4.0, 2.0, 2.0]]), seeds=torch.tensor([1])).shape == (1, 1, 8, 8, 4)
    with pytest.raises(TypeError, match="no weights for MONAI's network"):
        masks.load_reference_weights({})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"backbone": "unet"}, "expected is 'lesion_unet' or 'diffusion_unet'"),
        ({"backbone": "diffusion_unet", "conditioning": "film"}, "by conditioning='cross_attention' alone"),
        ({"backbone": "diffusion_unet", "cond_dim": None, "image_size": (8, 8, 5)}, r"multiples of \(2, 2, 2\)"),
        ({"backbone": "lesion_unet", "image_size": (7, 8, 5)}, r"multiples of \(2, 2, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        build_lesion_network(**{"channels": 1, "out_channels": 1, "cond_dim": 16, **SIZES, **arguments})
