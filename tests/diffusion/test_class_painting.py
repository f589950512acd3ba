import pytest
import torch
from diffusers import DDPMScheduler

from fairdiff_lightning.diffusion.class_painting import paint_classes
from fairdiff_lightning.diffusion.cosine import cosine_betas
from fairdiff_lightning.diffusion.lesion_channels import class_masks

CHAIN = {
    "scheduler": DDPMScheduler(num_train_timesteps=20, trained_betas=cosine_betas(20), prediction_type="sample"),
    "num_steps": 5,
    "stride": 1,
}


def knows(value, seen=None):
    """A network that finds one value everywhere, and notes what it is shown at the last step."""

    def network(noisy, step, condition):
        if seen is not None and step == 0:
            seen.append(noisy)
        return torch.full_like(noisy, value if condition is None else condition[0, 0].item())

    return network


@pytest.fixture
def scene():
    """Two scans; in the first both classes touch, in the second there is the latter alone."""
    scan = torch.rand(2, 1, 8, 7, 5) * 1.2 - 0.6
    label = torch.zeros(2, 1, 8, 7, 5, dtype=torch.int64)
    label[:, :, 2:6, 1:5, 1:4] = 4
    label[0, :, 2:4, 1:5, 1:4] = 3
    return scan, label


@pytest.mark.parametrize("roi", ["volume", "lesion"])
@pytest.mark.parametrize("compose", ["before", "after"])
def test_each_voxel_comes_from_the_network_of_its_class_and_is_painted_once(scene, roi, compose):
    scan, label = scene
    networks, seeds = [knows(0.9), knows(-0.9)], [torch.arange(2), torch.arange(2) + 7]
    found = paint_classes(
        networks, scan, class_masks(label, (3, 4)), None, seeds, roi=roi, context=1, compose=compose, **CHAIN
    )
    assert torch.equal(found[label == 0], scan[label == 0])
    expected = torch.where(label == 3, 0.9, torch.where(label == 4, -0.9, scan))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_later_network_sees_what_the_earlier_ones_painted(scene):
    scan, label = scene
    seen = []
    paint_classes(
        [knows(0.9), knows(-0.9, seen)], scan, class_masks(label, (3, 4)), None, [torch.arange(2)] * 2, **CHAIN
    )
    (shown,) = seen
    torch.testing.assert_close(shown[label == 3], torch.full_like(shown[label == 3], 0.9), rtol=0, atol=0.25)
    around = label == 0
    torch.testing.assert_close(shown[around], scan[around], rtol=0, atol=0.25)  # the noise of the last level


def test_each_network_gets_the_condition_of_its_class(scene):
    scan, label = scene
    condition = torch.tensor([[0.3, 0.0, -0.4, 0.0]]).expand(2, -1)
    masks, seeds = class_masks(label, (3, 4)), [torch.arange(2)] * 2
    found = paint_classes([knows(9), knows(9)], scan, masks, condition, seeds, **CHAIN)
    expected = torch.where(label == 3, 0.3, torch.where(label == 4, -0.4, scan))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_scans_without_a_lesion_stay_as_they_are(scene, count):
    scan, label = scene
    label[1] = 0
    seeds = [torch.arange(2)] * count
    found = paint_classes([knows(0.9)] * count, scan, class_masks(label, (3, 4)), None, seeds, **CHAIN)
    assert torch.equal(found[1], scan[1])
    torch.testing.assert_close(found[0][label[0] > 0], torch.tensor(0.9).expand(48), rtol=0, atol=1e-6)
