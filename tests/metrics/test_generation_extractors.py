import pickle

import pytest
import timm
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
import torchvision
from torch import nn

from fairdiff_lightning.metrics import FeatureExtractor
from fairdiff_lightning.metrics.extractors import IMAGENET_MEAN, IMAGENET_STD, check_unit_range
from fairdiff_lightning.networks.checkpoint import CheckpointMismatchError


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    def download(*_, **__):
        raise AssertionError("tried to download")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", download)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file with random weights of Inception's names and shapes."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict(), path)
    return path


def test_inception_without_weights_says_where_they_belong(tmp_path):
    expected = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(FileNotFoundError, match="nothing is downloaded") as caught:
        FeatureExtractor()
    assert f"'{expected}'" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at 'elsewhere\.pth'"):
        FeatureExtractor(weights="elsewhere.pth")


def test_inception_reads_bytes_as_they_were_and_repeats_grey(inception_weights):
    """An 8-bit image that was divided by 255 gives the features of the 8-bit image."""
    extractor = FeatureExtractor(weights=str(inception_weights))
    assert extractor.name == "inception"
    grey = torch.randint(0, 256, (2, 1, 21, 33), dtype=torch.uint8)
    features = extractor(grey / 255)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, extractor.network(grey.expand(-1, 3, -1, -1)))


def test_inception_is_found_in_the_folder_of_torch_hub(inception_weights, tmp_path):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "weights-inception-2015-12-05-6726825d.pth").symlink_to(inception_weights)
    weight = FeatureExtractor().network.state_dict()["Mixed_5b.branch1x1.conv.weight"]
    assert torch.equal(weight, torch.load(inception_weights)["Mixed_5b.branch1x1.conv.weight"])


def test_weights_that_are_a_program_are_refused(tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="cannot be read as a PyTorch checkpoint of plain tensors"):
        FeatureExtractor(weights=str(path))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_backbones_take_a_local_checkpoint_and_imagenet_statistics(library, tmp_path):
    if library == "torchvision":
        model = torchvision.models.squeezenet1_1(weights=None).eval()
        name, width, expected = "squeezenet1_1", 1000, model
    else:
        model = timm.create_model("mobilenetv3_small_050", pretrained=False).eval()
        name, width, expected = (
            "mobilenetv3_small_050",
            model.num_classes,
            lambda x: model.forward_head(model.forward_features(x), pre_logits=True),
        )
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    extractor = FeatureExtractor(f"{library}/{name}", str(tmp_path / "weights.pth"), image_size=64)
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        torch.testing.assert_close(extractor(images), expected((images - mean) / std).flatten(1))
    assert extractor.name == name
    assert extractor(torch.rand(1, 1, 30, 50)).shape[0] == 1
    assert library == "timm" or extractor(images).shape[1] == width


@pytest.mark.parametrize("network", ["torchvision/resnet18", "timm/resnet18"])
def test_backbones_without_weights_are_refused(network):
    with pytest.raises(ValueError, match="nothing is downloaded: give weights="):
        FeatureExtractor(network)


@pytest.mark.parametrize("network", ["resnet18", "torchvision", "huggingface/vit"])
def test_unknown_extractors_are_refused(network):
    with pytest.raises(ValueError, match=f"extractor '{network}' is unknown"):
        FeatureExtractor(network, "weights.pth")


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.conv(x)).mean((2, 3), keepdim=True)


def test_a_module_is_frozen_for_good_and_takes_images_as_they_are(tmp_path):
    module = Pool()
    extractor = FeatureExtractor(module, name="pooled").train()
    assert not extractor.training
    assert not module.training
    assert not any(p.requires_grad for p in extractor.parameters())
    images = torch.rand(3, 3, 7, 9)
    torch.testing.assert_close(extractor(images), module(images).flatten(1))
    assert FeatureExtractor(module).name == "Pool"
    torch.save({"conv.weight": module.conv.weight.detach()}, tmp_path / "part.pth")
    with pytest.raises(CheckpointMismatchError, match=r"missing: conv\.bias"):
        FeatureExtractor(Pool(), str(tmp_path / "part.pth"))


def test_images_and_features_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"torch\.uint8 of shape .* expected floating point"):
        FeatureExtractor(Pool())(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"'Conv2d' gave features of shape \(1, 5, 6, 6\), expected \(N, D\)"):
        FeatureExtractor(nn.Conv2d(3, 5, 3))(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("images", [torch.tensor([-0.1, 0.5]), torch.tensor([0.2, torch.nan]), torch.tensor([0, 1])])
def test_ranges_other_than_zero_to_one_are_refused(images):
    with pytest.raises(ValueError, match=r"made by it: images are torch.* expected floating point in \[0, 1\]"):
        check_unit_range(images, "made by it")


def test_inception_takes_no_scaling_that_it_would_ignore(inception_weights):
    with pytest.raises(ValueError, match="leave out image_size, std"):
        FeatureExtractor(weights=str(inception_weights), image_size=64, std=[0.5])
