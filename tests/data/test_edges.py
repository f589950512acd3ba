"""Edges: contours by the numbers of DiffBoost's code, gradients by scikit-image, and what the cache promises."""

from __future__ import annotations

import multiprocessing
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.signal import convolve2d
from skimage import filters
from skimage.feature import canny
from torch import nn

from fairdiff_lightning.data.edges import (
    CannyEdges,
    EdgeReader,
    ScharrEdges,
    edges_of,
    label_contour,
    say_no_weights,
    scharr,
)

KERNEL = np.array([[-3, 0, 3], [-10, 0, 10], [-3, 0, 3]])


@dataclass
class Counting:
    """The image itself as its edge; remembers the batches that it saw."""

    strength: float = 1.0

    def __post_init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        return images.mean(1, keepdim=True) * self.strength


def disk(side: int, radius: int) -> torch.Tensor:
    y, x = np.mgrid[:side, :side] - side // 2
    return torch.from_numpy((x**2 + y**2 < radius**2).astype(np.int64))[None]


def drawn_masks() -> dict[str, torch.Tensor]:
    square, half, two, pixel = (torch.zeros(1, side, side, dtype=torch.int64) for side in (64, 64, 64, 8))
    square[:, 16:48, 16:48] = 1
    half[:, :32] = 1
    two[:, 16:48, 16:32], two[:, 16:48, 32:48] = 1, 2
    pixel[:, 4, 4] = 1
    return {
        "square_16_48": square,
        "disk_r16": disk(64, 16),
        "disk384_r60": disk(384, 60),
        "half_plane_touching_border": half,
        "two_class_adjacent": two,
        "single_pixel_8x8": pixel,
    }


@pytest.mark.parametrize("name", sorted(drawn_masks()))
def test_contours_are_those_of_the_reference(name, reference):
    want, mask = reference("diffboost")["mask_boundary"][name], drawn_masks()[name]
    contour = label_contour(mask)
    assert contour.dtype == torch.float32
    assert contour.shape == mask.shape
    assert {255 * value for value in contour.unique().tolist()} == set(want.get("values", (0, 255)))
    assert int(contour.sum()) == want["n255"]
    if "row16_cols" in want:  # a run, told by its ends
        first, last = want["row16_cols"][0], want["row16_cols"][-1]
        assert contour[0, 16].nonzero()[:, 0].tolist() == list(range(first, last + 1))
    if "mask_area" in want:
        assert int(mask.sum()) == want["mask_area"]
    if "row32_cols" in want:
        assert contour[0, 32].nonzero()[:, 0].tolist() == want["row32_cols"]
    if "rows" in want:
        assert contour[0].any(1).nonzero()[:, 0].tolist() == want["rows"]
    if "pattern_rows_3_5" in want:
        assert (255 * contour[0, 3:6, 3:6]).tolist() == want["pattern_rows_3_5"]


def test_the_magnitude_under_a_contour_is_that_of_the_reference(reference):
    want = reference("diffboost")["mask_boundary"]["single_pixel_value_1_over_255"]["pattern_rows_3_5"]
    found = scharr(drawn_masks()["single_pixel_8x8"][None].float())
    np.testing.assert_allclose(found[0, 0, 3:6, 3:6], want, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    arrays(
        np.int64,
        st.tuples(st.integers(1, 3), st.just(1), st.integers(1, 9), st.integers(2, 9)),
        elements=st.integers(0, 3),
    )
)
def test_contours_of_a_batch_are_convolutions_slice_by_slice(masks):
    found = label_contour(torch.from_numpy(masks))[:, 0].numpy()
    for mask, contour in zip(masks[:, 0], found, strict=True):
        response = convolve2d(mask, KERNEL + 1j * KERNEL.T, mode="same", boundary="symm")
        np.testing.assert_array_equal(contour, np.abs(response).clip(0, 1))


def test_scharr_is_that_of_scikit_image_and_is_scaled_for_each_image_alone():
    images = torch.rand(3, 1, 19, 23) * torch.tensor([1.0, 0.5, 0.001]).view(3, 1, 1, 1)
    for image, magnitude, edge in zip(images, scharr(images), ScharrEdges()(images), strict=True):
        want = filters.scharr(image[0].numpy().astype(np.float64)) * 16 * 2**0.5
        np.testing.assert_allclose(magnitude[0], want, atol=1e-5)
        np.testing.assert_allclose(edge[0], want / max(want.max(), 16 / 255), atol=1e-5)
    assert not ScharrEdges()(torch.full((1, 3, 8, 9), 0.3)).any()


def test_canny_is_that_of_scikit_image_and_takes_its_settings():
    images = torch.stack([0.2 + 0.5 * disk(64, 16), 0.9 - 0.2 * disk(64, 25)])
    found = CannyEdges(sigma=2.0, low=0.02, high=0.1)(images)
    assert found.shape == (2, 1, 64, 64)
    for image, edge in zip(images, found, strict=True):
        want = canny(image[0].numpy(), sigma=2.0, low_threshold=0.02, high_threshold=0.1)
        assert want.any()
        np.testing.assert_array_equal(edge[0], want)


def test_a_batch_is_drawn_in_chunks_and_keeps_its_shape_and_type():
    detector, images = Counting(), torch.rand(5, 3, 6, 7)
    edges = edges_of(images, torch.zeros(5, 1, 6, 7, dtype=torch.int64), detector, batch_size=2)
    assert detector.batches == [2, 2, 1]
    assert edges.dtype == torch.float32
    assert edges.shape == (5, 1, 6, 7)
    torch.testing.assert_close(edges, (images.mean(1, keepdim=True) * 255).floor() / 255)
    edges.requires_grad_()  # an inference tensor would refuse


def test_no_edge_model_is_said_once():
    say_no_weights.cache_clear()
    with pytest.warns(UserWarning, match="no edge model is given: edges are image gradients"):
        edge = edges_of(torch.rand(1, 6, 7))
    assert edge.shape == (1, 6, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edges_of(torch.rand(1, 6, 7))
        edges_of(torch.rand(1, 6, 7), detector=ScharrEdges())


@pytest.mark.parametrize(
    ("image", "mask", "match"),
    [
        (torch.rand(1, 6, 7) * 2 - 1, None, r"in \[0, 1\].*\(image \+ 1\) / 2"),
        (torch.full((1, 6, 7), torch.nan), None, r"values in \[nan, nan\]"),
        (torch.zeros(1, 6, 7, dtype=torch.uint8), None, "torch.uint8; edges are drawn of floats"),
        (torch.rand(1, 1, 6, 7, 8), None, "Make the slices of a volume a batch"),
        (torch.rand(2, 1, 6, 7), torch.zeros(2, 1, 7, 6, dtype=torch.int64), r"expected is \(2, 1, 6, 7\)"),
        (torch.rand(1, 6, 7), torch.zeros(1, 6, 7), "expected are class indices"),
    ],
)
def test_a_wrong_image_or_mask_is_refused(image, mask, match):
    with pytest.raises(ValueError, match=match):
        edges_of(image, mask, ScharrEdges())


def test_stored_edges_are_the_drawn_ones_and_only_what_is_missing_is_drawn(tmp_path):
    images, masks = torch.rand(4, 1, 12, 9), torch.randint(3, (4, 1, 12, 9))
    images[3], masks[3] = images[0], masks[0]
    first = EdgeReader(Counting(), tmp_path)
    assert torch.equal(first(images[1], masks[1]), edges_of(images[1], masks[1], Counting()))
    assert torch.equal(first(images, masks), edges_of(images, masks, Counting()))
    assert first.detector.batches == [1, 2]  # of the four, one is stored and one is there twice
    again = EdgeReader(Counting(), tmp_path)
    assert torch.equal(again(images, masks), edges_of(images, masks, Counting()))
    assert again.detector.batches == []
    assert (again.cache.hits, again.cache.misses) == (3, 0)


def test_content_of_image_and_mask_and_settings_tell_edges_apart(tmp_path):
    image, mask = torch.rand(1, 12, 9), torch.randint(3, (1, 12, 9))
    wide = torch.rand(1, 9, 12)
    wide.view(-1).copy_(image.view(-1))
    reader = EdgeReader(CannyEdges(), tmp_path)
    keys = {reader.key(image, mask), reader.key(image, None), reader.key(wide, mask), reader.key(image, mask * 2)}
    keys |= {EdgeReader(detector, tmp_path).key(image, mask) for detector in (None, CannyEdges(2.0), Counting())}
    assert len(keys) == 7
    assert EdgeReader(CannyEdges(), tmp_path).key(image.clone(), mask.clone()) in keys


def test_weights_of_a_network_tell_edges_apart(tmp_path):
    image, network = torch.rand(1, 12, 9), nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Sigmoid())
    before = EdgeReader(network, tmp_path).key(image, None)
    assert EdgeReader(network, tmp_path).key(image, None) == before
    network[0].bias.data += 1
    assert EdgeReader(network, tmp_path).key(image, None) != before


def test_a_detector_without_visible_settings_is_not_cached(tmp_path):
    with pytest.raises(ValueError, match="shows no settings by which its edges could be kept"):
        EdgeReader(lambda images: images, tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"no archive at all",
        lambda data: data[:60] + bytes([data[60] ^ 255]) + data[61:],
    ],
    ids=["empty", "cut off", "another file", "a changed byte"],
)
def test_a_damaged_file_is_remade(tmp_path, damage):
    image = torch.rand(1, 12, 9)
    edge = EdgeReader(Counting(), tmp_path)(image)
    (file,) = tmp_path.rglob("*.npz")
    file.write_bytes(damage(file.read_bytes()))
    reader = EdgeReader(Counting(), tmp_path)
    assert torch.equal(reader(image), edge)
    assert (reader.cache.hits, reader.cache.misses) == (0, 1)
    assert torch.equal(reader(image), edge)
    assert reader.cache.hits == 1


def test_an_edge_of_another_size_or_type_is_remade(tmp_path):
    image = torch.rand(1, 12, 9)
    edge = EdgeReader(Counting(), tmp_path)(image)
    (file,) = tmp_path.rglob("*.npz")
    for wrong in (np.zeros((1, 9, 12), np.uint8), np.zeros((1, 12, 9))):
        np.savez_compressed(file, edge=wrong)
        assert torch.equal(EdgeReader(Counting(), tmp_path)(image), edge)


def test_a_folder_that_cannot_be_written_is_said_and_does_not_stop(tmp_path):
    (tmp_path / "file").write_text("")
    image = torch.rand(1, 12, 9)
    with pytest.warns(UserWarning, match="cannot store edges in"):
        edge = EdgeReader(Counting(), tmp_path / "file")(image)
    assert torch.equal(edge, edges_of(image, None, Counting()))


class Moving(nn.Module):
    """The image itself; remembers where it was asked to go, and where each batch was drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(1))
        self.places: list[str] = []

    def to(self, device: torch.device | str) -> Moving:
        self.places.append(str(device))
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.places.append(f"drew {len(images)}")
        return images.mean(1, keepdim=True) * self.one


def test_a_network_draws_on_the_accelerator_and_is_on_the_cpu_when_processes_start(tmp_path, monkeypatch):
    found = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    samples = [{"image": torch.rand(1, 12, 9), "mask": torch.zeros(1, 12, 9, dtype=torch.int64)} for _ in range(5)]
    reader = EdgeReader(Moving(), tmp_path, batch_size=3)
    keys = reader.prepare(samples)
    assert reader.detector.places == ["cuda", "drew 3", "drew 2", "cpu"]
    assert keys == [reader.key(s["image"], s["mask"]) for s in samples]
    broken = EdgeReader(Moving(), tmp_path / "other", batch_size=3)
    with pytest.raises(ValueError, match="edges are drawn of images in"):
        broken.prepare([{**samples[0], "image": samples[0]["image"] + 9}])
    assert broken.detector.places == ["cuda", "cpu"]
    found = None
    alone = EdgeReader(Moving(), tmp_path / "cpu", batch_size=5)
    alone.prepare(samples)
    assert alone.detector.places == ["drew 5"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_edges_are_prepared_on_the_gpu(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Sigmoid())
    devices = []
    network.register_forward_hook(lambda module, given, output: devices.append(output.device.type))
    EdgeReader(network, tmp_path).prepare([{"image": torch.rand(1, 12, 9), "mask": torch.zeros(1, 12, 9).long()}])
    assert devices == ["cuda"]
    assert next(network.parameters()).device.type == "cpu"


def test_a_list_holds_while_all_of_its_edges_are_there(tmp_path):
    reader = EdgeReader(Counting(), tmp_path)
    keys = reader.prepare(
        {"image": torch.full((1, 4, 5), i / 4), "mask": torch.zeros(1, 4, 5, dtype=torch.int64)} for i in (1, 2, 1)
    )
    assert len(keys) == 2
    assert not reader.cache.has_listed("scans")
    reader.cache.put_list("scans", keys)
    assert reader.cache.has_listed("scans")
    next(tmp_path.rglob(f"{keys[1]}.npz")).unlink()
    assert not reader.cache.has_listed("scans")


def _draw(folder, images):
    EdgeReader(ScharrEdges(), folder)(images)


def test_processes_share_a_folder(tmp_path):
    images = torch.rand(6, 1, 12, 9)
    context = multiprocessing.get_context("spawn")  # a forked process may find the threads of torch locked
    workers = [context.Process(target=_draw, args=(tmp_path, images)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    reader = EdgeReader(ScharrEdges(), tmp_path)
    assert torch.equal(reader(images), edges_of(images, None, ScharrEdges()))
    assert (reader.cache.hits, reader.cache.misses) == (6, 0)
    assert not list(tmp_path.rglob("*.part"))


def test_preparing_draws_samples_of_one_size_together(tmp_path):
    sizes = [(6, 7), (8, 5), (6, 7), (6, 7), (8, 5)]
    samples = [
        {"image": torch.rand(1, *size), "mask": torch.ones(1, *size, dtype=torch.int64), "attributes": {}, "id": str(i)}
        for i, size in enumerate(sizes)
    ]
    reader = EdgeReader(Counting(), tmp_path, batch_size=2)
    reader.prepare(samples)
    assert reader.detector.batches == [2, 2, 1]
    for sample in samples:
        assert torch.equal(reader(sample["image"], sample["mask"]), edges_of(sample["image"], None, Counting()))
    assert reader.detector.batches == [2, 2, 1]
