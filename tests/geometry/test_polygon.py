import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path

from fairdiff_lightning.geometry.polygon import fill_polygons


def random_polygons(seed, count, vertices, size):
    """Self-crossing ones included, partly outside the frame."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.3, 1.3, (count, vertices, 2)) * size


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), vertices=st.integers(3, 12))
def test_filling_equals_the_even_odd_rule_pixel_by_pixel(seed, vertices):
    size = (23, 31)
    polygons = random_polygons(seed, 3, vertices, size)
    filled = fill_polygons(torch.from_numpy(polygons), size).numpy()
    row, col = np.mgrid[: size[0], : size[1]]
    for polygon, mask in zip(polygons, filled, strict=True):
        crossings = np.zeros(size, int)
        for (r0, c0), (r1, c1) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
            between = (np.minimum(r0, r1) <= row) & (row < np.maximum(r0, r1))
            crossings += between & (c0 + (row - r0) / (r1 - r0) * (c1 - c0) <= col)
        np.testing.assert_array_equal(mask, crossings % 2 == 1)


def test_filling_equals_matplotlib_on_a_star():
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radius = 20 + 7 * np.sin(5 * angle) + 0.123
    star = np.stack([30.2 + radius * np.sin(angle), 33.7 + radius * np.cos(angle)], 1)
    centres = np.stack(np.mgrid[:55, :70], -1).reshape(-1, 2)
    expected = Path(star).contains_points(centres).reshape(55, 70)
    np.testing.assert_array_equal(fill_polygons(torch.from_numpy(star)[None], (55, 70))[0].numpy(), expected)


def test_polygons_that_share_an_edge_share_no_pixel_and_leave_no_gap():
    corners = torch.tensor([[0.0, 0.0], [0.0, 20.0], [30.0, 20.0], [30.0, 0.0]], dtype=torch.float64)
    inner = torch.tensor([11.0, 7.0], dtype=torch.float64)  # edges pass through pixel centres
    fans = torch.stack([torch.stack([corners[i], corners[i - 1], inner]) for i in range(4)])
    covered = fill_polygons(fans, (40, 25)).sum(0)
    assert torch.equal(covered, fill_polygons(corners[None], (40, 25))[0].long())
    assert covered.sum() == 30 * 20


def test_degenerate_and_distant_polygons_are_empty():
    flat = torch.tensor([[[5.0, 2.0], [5.0, 9.0], [5.0, 4.0]], [[90.0, 2.0], [95.0, 9.0], [99.0, 4.0]]])
    assert not fill_polygons(flat, (10, 12)).any()
