import numpy as np
import pytest
import torch

from fairdiff_lightning.data.patches import GUESSES, ROUNDS, PatchSampler, draw_foreground


class OnDisk(np.ndarray):
    """A mask that counts the voxels that are read and whose whole must not be."""

    read = 0

    def __getitem__(self, index):
        found = np.asarray(self)[index]
        type(self).read += found.size
        return found

    def ravel(self, *_):
        raise AssertionError("the whole mask was read")


def masked(shape, *blocks):
    mask = np.zeros(shape, np.uint8)
    for value, block in enumerate(blocks, 1):
        mask[block] = value
    return mask


def test_a_draw_reads_a_small_part_of_the_mask():
    mask = masked((128, 96, 64), np.s_[40:70, 50:70, 20:40]).view(OnDisk)  # 1.5 % of 786,432 voxels
    sampler = PatchSampler((32, 24, 16), 1.0)
    blocks = [sampler.draw(mask, epoch, "case") for epoch in range(50)]
    assert OnDisk.read / 50 < 0.001 * mask.size
    assert all(np.asarray(mask)[block].any() for block in blocks)
    assert len({str(block) for block in blocks}) > 40
    assert [sampler.draw(mask, epoch, "case") for epoch in range(50)] == blocks, "the same names, the same block"


@pytest.mark.parametrize("rarely", [False, True])
def test_each_voxel_of_the_foreground_is_as_likely(rarely, monkeypatch):
    mask = masked((9, 11, 7), np.s_[1, 2, 3], np.s_[4:6, 5, 0:5])
    if rarely:  # so that nearly every draw searches the whole mask
        monkeypatch.setattr("fairdiff_lightning.data.patches.GUESSES", 1)
        monkeypatch.setattr("fairdiff_lightning.data.patches.ROUNDS", 2)
    random = torch.Generator().manual_seed(0)
    counts = np.zeros(mask.shape)
    for _ in range(3300):
        counts[draw_foreground(mask, random)] += 1
    assert not counts[mask == 0].any()
    expected = 3300 / 11
    assert ((counts[mask > 0] - expected) ** 2 / expected).sum() < 29.6, "chi-squared, 10 degrees of freedom, p = 0.001"


def test_a_single_voxel_is_found_and_none_is_missed():
    mask = masked((200, 200, 50), np.s_[7, 190, 41])  # one of 2 million, of which ROUNDS * GUESSES are guessed
    assert mask.size > 400 * ROUNDS * GUESSES
    assert draw_foreground(mask, torch.Generator().manual_seed(0)) == (7, 190, 41)
    assert draw_foreground(np.zeros((5, 4, 3), np.uint8), torch.Generator().manual_seed(0)) is None
