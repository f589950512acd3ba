"""HED against the numbers of DiffBoost's code, and both published layouts of its weights."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fairdiff_lightning.data.busi import BUSIDataModule
from fairdiff_lightning.data.edges import edges_of, label_contour
from fairdiff_lightning.networks.checkpoint import CheckpointMismatchError
from fairdiff_lightning.networks.hed import DEPTHS, HED, MEAN_RGB, WIDTHS, bsds_tensors, controlnet_tensors

WORDS = ("One", "Two", "Thr", "Fou", "Fiv")


def pseudo_noise(k: int, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    """The n-th tensor of the surrogate weights, by the recipe of the reference file."""
    index = np.arange(math.prod(shape), dtype=np.float64)
    f = np.sin(12.9898 * index + 78.233 * k) * 43758.5453
    return torch.from_numpy(((2 * (f - np.floor(f)) - 1) * scale).astype(np.float32)).view(shape)


def surrogate_weights() -> dict[str, torch.Tensor]:
    """What stands in for ``network-bsds500.pth``: its names and shapes, other values."""
    specs: list[tuple[str, tuple[int, ...], float]] = []
    for stage, word in enumerate(WORDS):
        channels = WIDTHS[stage]
        for layer in range(DEPTHS[stage]):
            name = f"moduleVgg{word}.{2 * layer + (stage > 0)}"
            specs += [(f"{name}.weight", (WIDTHS[stage + 1], channels, 3, 3), (6 / (9 * channels)) ** 0.5)]
            specs += [(f"{name}.bias", (WIDTHS[stage + 1],), 0.01)]
            channels = WIDTHS[stage + 1]
    for word, width in zip(WORDS, WIDTHS[1:], strict=True):
        specs += [(f"moduleScore{word}.weight", (1, width, 1, 1), 0.02 / width**0.5)]
        specs += [(f"moduleScore{word}.bias", (1,), 0.01)]
    specs += [("moduleCombine.0.weight", (1, 5, 1, 1), 0.5), ("moduleCombine.0.bias", (1,), 0.1)]
    return {name: pseudo_noise(k, shape, scale) for k, (name, shape, scale) in enumerate(specs)}


def controlnet_weights(bsds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What stands in for ``ControlNetHED.pth``: the same trunk under its names, a mean colour of its own, no fusion."""
    weights = {"norm": torch.tensor([120.0, 110.0, 100.0]).view(1, 3, 1, 1)}
    for block, word in enumerate(WORDS, start=1):
        for part in ("weight", "bias"):
            for layer in range(DEPTHS[block - 1]):
                old = f"moduleVgg{word}.{2 * layer + (block > 1)}.{part}"
                weights[f"block{block}.convs.{layer}.{part}"] = bsds[old]
            weights[f"block{block}.projection.{part}"] = 5 * bsds[f"moduleScore{word}.{part}"]
    return weights


def synthetic_image() -> np.ndarray:
    """Grey 64 x 64 uint8, by the recipe of the reference file."""
    y, x = np.mgrid[:64, :64].astype(np.float64)
    v = 40 + 0.8 * x + 30 * np.sin(y / 5)
    v[(x - 32) ** 2 + (y - 32) ** 2 < 256] += 90
    return np.round(v).clip(0, 255).astype(np.uint8)


def as_images(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture / np.float32(255))[None, None]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return surrogate_weights()


@pytest.fixture(scope="module")
def network(weights) -> HED:
    return HED(weights).eval()


def test_it_has_as_many_parameters_as_the_reference(network, reference):
    assert sum(p.numel() for p in network.parameters()) == reference("diffboost")["hed"]["n_params"] == 14_716_171


def test_edges_of_a_preprocessed_picture_are_those_of_the_reference(network, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path / "cache"))
    y, x = np.mgrid[:48, :80].astype(np.float64)
    disc = (x - 40) ** 2 + (y - 24) ** 2 < 144
    picture = np.round(40 + 0.8 * x + 30 * np.sin(y / 5) + 90 * disc).clip(0, 255).astype(np.uint8)
    (tmp_path / "benign").mkdir()
    Image.fromarray(picture).save(tmp_path / "benign" / "benign (1).png")
    Image.fromarray(disc.astype(np.uint8) * 255).save(tmp_path / "benign" / "benign (1)_mask.png")
    data = BUSIDataModule(str(tmp_path), image_size=64, percentiles="input", edges=network)
    sample = data.make_dataset(data.dataset.index(tmp_path).records)[0]
    want = reference("diffboost")["preprocess_2d"]["edge"]
    assert list(sample["edge"].shape) == want["shape"]
    assert int(label_contour(sample["mask"]).sum()) == want["n_mask_boundary"]
    assert int((sample["edge"] == 1).sum()) == want["n_equal_1"]
    assert sample["edge"].mean().item() == pytest.approx(want["mean_with_det_hed"], abs=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_probabilities_are_those_of_the_reference(network, reference, grad):
    numbers, picture = reference("diffboost"), synthetic_image()
    assert int(picture.sum()) == numbers["synthetic_image"]["sum"]
    with torch.set_grad_enabled(grad):
        edges = network(as_images(picture)).detach()
    want = numbers["hed"]["det_weights_forward_float"]
    assert list(edges.shape) == want["shape"]
    assert edges.mean().item() == pytest.approx(want["mean"], abs=2e-6)
    assert edges.std(unbiased=False).item() == pytest.approx(want["std"], abs=1e-5)
    for y, x in ((0, 0), (32, 16), (10, 50)):
        assert edges[0, 0, y, x].item() == pytest.approx(want[f"v[{y},{x}]"], abs=2e-6)


def test_levels_of_hed_are_those_of_the_reference_and_contours_are_at_full_strength(network, reference):
    want, image = reference("diffboost")["hed"]["det_weights_call_uint8"], as_images(synthetic_image())[0]
    edge = edges_of(image, None, network)
    levels = (edge[0] * 255).round()
    assert list(levels.shape) == want["shape"]
    torch.testing.assert_close(edge[0] * 255, levels)
    assert levels.mean().item() == pytest.approx(want["mean"], abs=2e-3)
    assert levels.std(unbiased=False).item() == pytest.approx(want["std"], abs=2e-3)
    assert (levels.min(), levels.max()) == (want["min"], want["max"])
    for (y, x), level in zip(((0, 0), (32, 16), (10, 50), (63, 63)), want["px"], strict=True):
        assert levels[y, x].item() == pytest.approx(level, abs=1)
    mask = torch.zeros(1, 64, 64, dtype=torch.int64)
    mask[:, 20:41, 7:30] = 1
    joined, contour = edges_of(image, mask, network), label_contour(mask).bool()
    assert (joined[contour] == 1).all()
    assert torch.equal(joined[~contour], edge[~contour])


def test_the_picture_is_that_of_the_reference(reference):
    want, picture = reference("diffboost")["synthetic_image"], synthetic_image()
    assert (picture.sum(), picture.min(), picture.max()) == (want["sum"], want["min"], want["max"])
    assert picture.mean() == pytest.approx(want["mean"], abs=1e-6)
    assert [picture[y, x] for y, x in ((0, 0), (32, 32), (10, 50))] == [
        want[f"px[{place}]"] for place in ("0,0", "32,32", "10,50")
    ]


def test_a_batch_of_grey_pictures_has_the_edges_of_one_and_colours_matter_as_in_the_reference(network, reference):
    """The reference reads single images as RGB and batches as BGR; of its picture in colour only one number is told."""
    want, grey = reference("diffboost")["hed"], as_images(synthetic_image())
    batch = edges_of(grey.expand(2, 1, 64, 64), None, network)
    assert (list(batch.shape), want["batch_edge_equals_call_for_gray"]) == (want["batch_edge_shape"], True)
    torch.testing.assert_close(batch[1], edges_of(grey[0], None, network), atol=1.01 / 255, rtol=0)
    colour = torch.cat([grey, grey, 1 - grey], 1)
    rgb, bgr = (255 * edges_of(image, None, network) for image in (colour, colour.flip(1)))
    assert (rgb - bgr).abs().max().item() == pytest.approx(want["colour_flip_max_abs_diff"], abs=1)


def test_a_batch_is_its_images_one_by_one_at_odd_sizes(network):
    images = torch.rand(3, 1, 37, 50)
    with torch.inference_mode():
        batch = network(images)
        single = torch.cat([network(image[None]) for image in images])
    assert batch.shape == (3, 1, 37, 50)
    torch.testing.assert_close(batch, single, atol=1e-6, rtol=0)
    with torch.enable_grad():  # the layout of the layers between is another one
        torch.testing.assert_close(network(images).detach(), batch.clone(), atol=1e-6, rtol=0)


def test_grey_is_repeated_and_colours_are_read_as_rgb(network, weights):
    grey, colour = torch.rand(1, 1, 32, 40), torch.rand(1, 3, 32, 40)
    with torch.inference_mode():
        torch.testing.assert_close(network(grey), network(grey.repeat(1, 3, 1, 1)), atol=1e-6, rtol=0)
        found = network(colour)
        assert (found - network(colour.flip(1))).abs().max() > 0.01
    torch.testing.assert_close(found.clone(), plain_bsds(weights, colour), atol=1e-5, rtol=0)


def trunk(x: torch.Tensor, name, weights) -> list[torch.Tensor]:
    """Outputs of the five stages, by the reference's description; ``name(stage, layer)`` names a convolution."""
    outputs = []
    for stage, depth in enumerate(DEPTHS):
        x = F.max_pool2d(x, 2) if stage else x
        for layer in range(depth):
            key = name(stage, layer)
            x = F.relu(F.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"], padding=1))
        outputs.append(x)
    return outputs


def plain_bsds(weights, images: torch.Tensor) -> torch.Tensor:
    """The published network read plainly: BGR, of 255, less its mean colour."""
    x = 255 * images.flip(1) - torch.tensor(MEAN_RGB[::-1]).view(1, 3, 1, 1)
    outputs = trunk(x, lambda stage, layer: f"moduleVgg{WORDS[stage]}.{2 * layer + (stage > 0)}", weights)
    sides = [
        F.conv2d(x, weights[f"moduleScore{w}.weight"], weights[f"moduleScore{w}.bias"])
        for w, x in zip(WORDS, outputs, strict=True)
    ]
    sides = [F.interpolate(side, images.shape[-2:], mode="bilinear") for side in sides]
    fused = F.conv2d(torch.cat(sides, 1), weights["moduleCombine.0.weight"], weights["moduleCombine.0.bias"])
    return fused.sigmoid()


def test_later_weights_draw_the_sigmoid_of_the_mean_of_the_sides(tmp_path, weights):
    weights, image = controlnet_weights(weights), torch.rand(1, 3, 48, 41)
    torch.save(weights, tmp_path / "ControlNetHED.pth")
    network = HED(tmp_path / "ControlNetHED.pth")
    with torch.inference_mode():
        found = network(image)[0, 0].numpy()
    outputs = trunk(255 * image - weights["norm"], lambda stage, layer: f"block{stage + 1}.convs.{layer}", weights)
    sides = [
        F.conv2d(x, weights[f"block{b}.projection.weight"], weights[f"block{b}.projection.bias"])[0, 0].numpy()
        for b, x in enumerate(outputs, start=1)
    ]
    logits = np.mean([cv2.resize(s, (41, 48), interpolation=cv2.INTER_LINEAR) for s in sides], axis=0)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), atol=1e-5)
    assert np.ptp(found) > 0.05


@pytest.mark.parametrize("legacy", [True, False])
def test_the_published_file_loads_from_a_path(tmp_path, weights, legacy):
    path = tmp_path / "network-bsds500.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    network = HED()
    report = network.load_reference_weights(path)
    assert set(report.loaded) == set(weights)
    assert len(report.loaded) == 38
    last = network.stages[4][5].weight
    torch.testing.assert_close(last.detach(), weights["moduleVggFiv.5.weight"])


def test_loading_the_older_file_after_the_later_one_leaves_nothing_of_it(network, weights):
    again = HED(controlnet_weights(weights))
    again.load_reference_weights(weights)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_both_files_cover_every_parameter(network):
    filled = {tensor.data_ptr() for tensor in bsds_tensors(network).values()}
    assert filled == {p.data_ptr() for p in network.parameters()}
    later = {tensor.data_ptr() for tensor in controlnet_tensors(network).values()}
    assert filled - later == {p.data_ptr() for p in network.fuse.parameters()}


def test_an_edge_model_that_is_not_hed_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3), "conv1.bias": torch.zeros(3)}, tmp_path / "pidinet.pth")
    with pytest.raises(ValueError, match=r"pidinet.pth' is no edge model of HED: it holds conv1.weight, conv1.bias"):
        HED(tmp_path / "pidinet.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="cannot be read as a PyTorch checkpoint"):
        HED(tmp_path / "page.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        HED(tmp_path / "absent.pth")


def test_a_file_with_a_part_missing_or_of_another_shape_is_refused_whole(weights):
    wrong = {name: tensor for name, tensor in weights.items() if name != "moduleScoreThr.bias"}
    wrong["moduleCombine.0.weight"] = torch.zeros(1, 6, 1, 1)
    network = HED()
    before = network.fuse.bias.clone()
    with pytest.raises(CheckpointMismatchError, match=r"missing: moduleScoreThr.bias[^.]*\n.*\(1, 6, 1, 1\)"):
        network.load_reference_weights(wrong)
    assert torch.equal(network.fuse.bias, before)


@pytest.mark.parametrize("shape", [(1, 2, 32, 32), (3, 32, 32), (1, 1, 15, 64)])
def test_images_of_another_shape_are_refused(network, shape):
    with pytest.raises(ValueError, match=r"HED takes \(B, 1 or 3, H, W\)"):
        network(torch.rand(shape))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_edges_on_a_gpu_are_those_of_the_cpu(network):
    images = torch.rand(2, 1, 48, 64)
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        on_gpu = HED().cuda()
        on_gpu.load_state_dict(network.state_dict())
        torch.testing.assert_close(on_gpu(images.cuda()).cpu(), network(images), atol=1e-5, rtol=0)
