import numpy as np
import pytest
import torch

from fairdiff_lightning.data.edge_augmentation import RandomZoomRotate, zoom_rotate


def reference_images():
    """The reference's image and the edge of its disk."""
    y, x = np.mgrid[:384, :384].astype(float)
    image, ring = np.sin(x / 25) * np.cos(y / 35), np.abs(np.hypot(x - 192, y - 192) - 80) < 2
    return (torch.from_numpy(values).float()[None, None] for values in (image, ring))


def by_whole_pixels(zoom, side=384):
    return int(side * zoom) / side if zoom < 1 else 2 - int(side * (2 - zoom)) / side


def moved(image, zoom, degrees, mask=None, edge=None):
    mask = torch.zeros_like(image[:, :1]).long() if mask is None else mask
    edge = torch.zeros_like(image[:, :1]) if edge is None else edge
    return zoom_rotate(image, mask, edge, torch.tensor(zoom), torch.tensor(degrees))


@pytest.mark.parametrize(
    ("name", "zoom"),
    [("seed0", None), ("seed1", None), ("seed2", None), ("no_rotation_crop1.04", 1.04), ("no_rotation_crop0.75", 0.75)],
)
def test_image_and_edge_move_as_in_the_reference(reference, name, zoom):
    """The reference mixes the outermost line of an image that it zooms into with black, which tells in mean and std;
    lines that are resampled twice keep a little more of their sum.
    """
    expected = reference("diffboost")["finetune_geometry"]["cases"][name]
    image, edge = reference_images()
    assert float(edge.sum()) == reference("diffboost")["finetune_geometry"]["edge_sum_input"]
    zoom, degrees = by_whole_pixels(zoom or expected["crop"]), expected.get("angle", 0.0)
    found, _, lines = moved(image, [zoom], [degrees], edge=edge)
    border = 6e-3 * max(0, 1 - zoom)
    assert list(found.shape[2:]) == expected.get("img_shape", [384, 384])
    assert float(found.mean()) == pytest.approx(expected["img_mean"], abs=border + 1e-5)
    assert float(found.std()) == pytest.approx(expected["img_std"], abs=border + 1e-4)
    assert float(lines.sum()) == pytest.approx(expected["edge_sum"], rel=1e-6 if degrees == 0 else 2.2e-3)
    twice = moved(image, [1.0], [degrees], edge=moved(image, [zoom], [0.0], edge=edge)[2])[2]
    assert float(twice.sum()) == pytest.approx(expected["edge_sum"], rel=2e-4), "resampled as often as there"
    assert float(lines[0, 0, 0].sum()) == expected.get("edge_row0_sum", 0.0)
    assert float(lines.max()) == pytest.approx(1, abs=1e-4)
    if zoom > 1 or degrees:
        assert float(found[0, 0, 0, 0]) == pytest.approx(expected["img[0,0]"], abs=2e-4)
    if zoom == 0.75:  # an eighth of a pixel beyond the frame, where the reference has black and here the image goes on
        near, own = image[0, 0, 47:49, 47:49], torch.tensor([[1, 7], [7, 49]]) / 64
        beyond = float((near * own).sum() - near[1, 1] * own[1, 1])
        assert float(found[0, 0, 0, 0]) - beyond - (1 - 49 / 64) == pytest.approx(expected["img[0,0]"], abs=1e-5)
    if degrees:
        assert float(found[0, 0, 192, 192]) == pytest.approx(expected["img[192,192]"], abs=5e-5)
        assert float(lines.max()) == pytest.approx(expected["edge_max"], abs=1e-4)


def test_no_zoom_and_no_rotation_change_nothing():
    image, edge, mask = torch.rand(2, 3, 9, 14), torch.rand(2, 1, 9, 14), torch.randint(3, (2, 1, 9, 14))
    found, labels, lines = moved(image, [1.0, 1.0], [0.0, 0.0], mask, edge)
    torch.testing.assert_close(found, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(lines, edge, atol=1e-5, rtol=0)
    assert torch.equal(labels, mask)


def test_a_quarter_turn_counter_clockwise_is_that_of_torch():
    image, mask = torch.rand(1, 2, 8, 8), torch.randint(3, (1, 1, 8, 8))
    found, labels, _ = moved(image, [1.0], [90.0], mask)
    torch.testing.assert_close(found, image.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    assert torch.equal(labels, mask.rot90(1, (2, 3)))


def test_images_that_are_not_square_keep_their_angles():
    """A disk stays a disk, and lies where rotating its centre in pixels puts it."""
    y, x = np.mgrid[:40, :80]
    disk = torch.from_numpy(np.hypot(x - 55, y - 19.5) < 6)[None, None]
    _, labels, _ = moved(disk.float(), [1.0], [20.0], disk.long())
    rows, columns = labels[0, 0].nonzero().float().unbind(1)
    angle = np.deg2rad(20)
    assert float(columns.mean()) == pytest.approx(39.5 + 15.5 * np.cos(angle), abs=0.3)
    assert float(rows.mean()) == pytest.approx(19.5 - 15.5 * np.sin(angle), abs=0.3)
    assert float(rows.std()) == pytest.approx(float(columns.std()), rel=0.08)


def test_what_the_frame_lacks_is_mirrored_in_the_image_and_empty_in_mask_and_edge():
    image, full = torch.full((1, 1, 32, 32), 0.7), torch.ones(1, 1, 32, 32)
    found, labels, lines = moved(image, [1.05], [20.0], full.long(), full)
    torch.testing.assert_close(found, image)
    assert labels[0, 0, 0, 0] == lines[0, 0, 0, 0] == 0
    assert labels[0, 0, 16, 16] == 1
    cropped = torch.zeros(1, 1, 32, 32)
    cropped[..., 8:-8, 8:-8] = 1
    turned = moved(torch.zeros(1, 1, 32, 32), [0.75], [20.0], cropped.long(), 1 - cropped)
    assert turned[2][0, 0, 0, 0] == 0, "beyond the zoomed frame, though the image goes on there"


def test_each_sample_has_its_own_draws_within_the_papers_ranges(monkeypatch):
    from fairdiff_lightning.data import edge_augmentation

    seen = []
    monkeypatch.setattr(edge_augmentation, "zoom_rotate", lambda *given: seen.append(given[3:]) or given[:3])
    part = torch.zeros(2000, 1, 2, 2)
    RandomZoomRotate()(part, part.long(), part, torch.Generator().manual_seed(3))
    zoom, degrees = seen[0]
    assert (zoom.min(), zoom.max()) == (pytest.approx(0.75, abs=2e-3), pytest.approx(1.05, abs=2e-3))
    assert (degrees.min(), degrees.max()) == (pytest.approx(-20, abs=0.1), pytest.approx(20, abs=0.1))
    assert abs(np.corrcoef(zoom, degrees)[0, 1]) < 0.07
    assert zoom.mean() == pytest.approx(0.9, abs=0.01)


def test_a_generator_fixes_the_draws_and_lines_stay_with_the_image():
    y, x = np.mgrid[:48, :48]
    ring = torch.from_numpy(np.abs(np.hypot(x - 26, y - 24) - 10) < 1.5).float().expand(4, 1, 48, 48)
    first = RandomZoomRotate()(ring, (ring > 0).long(), ring, torch.Generator().manual_seed(3))
    again = RandomZoomRotate()(ring, (ring > 0).long(), ring, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.testing.assert_close(first[0], first[2], atol=1e-5, rtol=0)
    assert float(((first[0] > 0.5) == (first[1] > 0)).float().mean()) > 0.97
    assert not torch.equal(first[0][0], first[0][1])


def test_parts_of_other_sizes_and_zooms_that_cannot_be_are_refused():
    part = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"image, mask and edge have shapes .*\(1, 1, 8, 6\); expected is one height"):
        RandomZoomRotate()(part, part.long(), torch.zeros(1, 1, 8, 6))
    with pytest.raises(ValueError, match=r"zoom=\(0\.5, 2\.0\): expected are a smallest and a largest size"):
        RandomZoomRotate(zoom=(0.5, 2.0))
