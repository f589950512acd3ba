import warnings

import numpy as np
import pytest

from fairdiff_lightning.data.patches import GUESSES, ROUNDS, PatchSampler, draw_candidates


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
    sampler = PatchSampler((1, 1, 1), 1.0)
    counts = np.zeros(mask.shape)
    for k in range(3300):
        counts[sampler.draw(mask, k)] += 1
    assert not counts[mask == 0].any()
    expected = 3300 / 11
    assert ((counts[mask > 0] - expected) ** 2 / expected).sum() < 29.6, "chi-squared, 10 degrees of freedom, p = 0.001"


def test_other_blocks_are_around_the_background():
    mask = masked((9, 11, 7), np.s_[1:8, 2:10, 1:6])
    blocks = [PatchSampler((1, 1, 1), share).draw(mask, k) for share in (0.0, 0.25) for k in range(400)]
    found = [int(mask[block].item()) for block in blocks]
    assert sum(found[:400]) == 0
    assert 0.25 * 400 - 3 * 8.7 < sum(found[400:]) < 0.25 * 400 + 3 * 8.7, "within three standard deviations"


@pytest.mark.parametrize("size", [(9, 11, 7), (4, 5, 2), (3, 11, 6)])
def test_blocks_stay_within_the_volume_and_hold_their_voxel(size):
    mask = masked((9, 11, 7), np.s_[0, 0, 0], np.s_[8, 10, 6])
    for k in range(40):
        block = PatchSampler(size, 1.0).draw(mask, k)
        assert mask[block].shape == size
        assert mask[block].any()


def test_a_single_voxel_is_found_and_none_is_missed():
    mask = masked((200, 200, 50), np.s_[7, 190, 41])  # one of 2 million, of which ROUNDS * GUESSES are looked at
    assert mask.size > 400 * ROUNDS * GUESSES
    foreground, background = draw_candidates(mask, np.random.RandomState(0))
    assert [tuple(np.unravel_index(place, mask.shape)) for place in foreground] == [(7, 190, 41)]
    assert not mask.ravel()[background].any()


@pytest.mark.parametrize("value", [0, 1])
def test_a_mask_of_one_class_is_drawn_from_anywhere_without_a_warning(value):
    mask = np.full((6, 5, 4), value, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = {str(PatchSampler((2, 2, 2), 0.5).draw(mask, k)) for k in range(60)}
    assert len(blocks) > 20
