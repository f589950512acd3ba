import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def disc_and_cup():
    """``disc_and_cup(size, (cy, cx), (a, b), cup=...)``: an elliptic disc and a concentric cup, classes 0, 1, 2."""

    def make(size, centre, axes, cup=0.5):
        row, col = np.mgrid[: size[0], : size[1]]
        distance = np.hypot((row - centre[0]) / axes[0], (col - centre[1]) / axes[1])
        return torch.from_numpy((distance <= 1).astype(np.int64) + (distance <= cup))

    return make


@pytest.fixture(scope="session")
def reference_mask():
    """The mask (664, 798) of the FairDiff reference numbers, as their file describes it."""
    y, x = np.mgrid[:664, :798]
    disc = ((x - 400) / 120) ** 2 + ((y - 332) / 140) ** 2 <= 1
    cup = ((x - 410) / 60) ** 2 + ((y - 336) / 70) ** 2 <= 1
    assert np.bincount((disc.astype(int) + (disc & cup)).ravel()).tolist() == [477111, 39584, 13177]
    return torch.from_numpy(disc.astype(np.int64) + (disc & cup))


@pytest.fixture(scope="session")
def dice():
    """``dice(a, b, threshold)``: of the pixels of one class, or of a class and those inside it (``region=True``)."""

    def score(a, b, k, region=False):
        a, b = (mask >= k if region else mask == k for mask in (a, b))
        return 2 * int((a & b).sum()) / int(a.sum() + b.sum())

    return score
