import pytest
import torch


@pytest.fixture(scope="session")
def disk():
    """``disk(height, width, cy, cx, r)``: pixels within r of a centre, as the reference files write it."""

    def make(height, width, cy, cx, radius):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return (y - cy) ** 2 + (x - cx) ** 2 <= radius**2

    return make


@pytest.fixture(scope="session")
def fairdiff_pair(disk):
    """Prediction and truth (1, 1, 64, 64) of the FairDiff check sm01: rim 1, cup 2."""

    def mask(outer, inner):
        rim, cup = disk(64, 64, outer[1], outer[0], outer[2]), disk(64, 64, inner[1], inner[0], inner[2])
        return rim.long().masked_fill(cup, 2)[None, None]

    return mask((34, 33, 19), (35, 33, 10)), mask((32, 32, 20), (33, 31, 9))


@pytest.fixture(scope="session")
def dmoe_pair(disk):
    """Prediction and truth (1, 1, 64, 64) of the dMoE check E3: rim 1, cup 2."""

    def mask(outer, inner):
        return disk(64, 64, *outer).long().masked_fill(disk(64, 64, *inner), 2)[None, None]

    return mask((32, 31, 14), (31, 31, 8)), mask((30, 32, 14), (30, 32, 7))


@pytest.fixture(scope="session")
def dmoe_disks(disk):
    """The masks (32, 32) of the dMoE check E1 by their letters."""
    masks = {"A": disk(32, 32, 15, 15, 8), "B": disk(32, 32, 17, 14, 8), "S": disk(32, 32, 5, 5, 2)}
    return masks | {"empty": torch.zeros(32, 32, dtype=torch.bool)}
