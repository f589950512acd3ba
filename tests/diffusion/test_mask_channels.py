import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairdiff_lightning.diffusion.mask_channels import decode_mask, encode_mask, relative_levels


def wave(shape, phase, amplitude):
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (amplitude * torch.sin(0.7 * index + phase)).float().view(shape)


@pytest.fixture
def clean():
    masks = -torch.ones(2, 1, 12, 12)
    masks[0, 0, 3:9, 4:10] = 1
    masks[1, 0, 5:8, 5:8] = 1
    return masks


def rows(levels):
    return ["".join({-1: ".", 0: "0", 1: "#"}[int(v)] for v in row) for row in levels[0]]


def test_relative_levels_are_the_papers(reference, clean):
    expected = reference("pig")["mask_to_discrete"]
    noisy = 0.9 * clean + wave((2, 1, 12, 12), 0.2, 0.3)
    for k in range(2):
        assert rows(relative_levels(clean)[k]) == expected[f"binary_clean_rows_item{k}"]
        assert rows(relative_levels(noisy)[k]) == expected[f"binary_noisy_rows_item{k}"]
        counts = [int((relative_levels(noisy, 3)[k] == level).sum()) for level in (-1, 0, 1)]
        assert counts == expected[f"ternary_counts_item{k}_[-1,0,1]"]
    assert rows(relative_levels(noisy, 3)[0]) == expected["ternary_noisy_rows_item0"]
    empty = wave((1, 1, 64, 64), 0.0, 0.01) - 0.95
    assert float((relative_levels(empty) > 0).float().mean()) == expected["empty_field_foreground_fraction"]


def test_masks_may_be_empty_and_keep_their_border_by_default(clean):
    assert decode_mask(clean, 2).sum((1, 2, 3)).tolist() == [36, 9]
    assert decode_mask(clean, 2, "relative").sum((1, 2, 3)).tolist() == [12, 9]
    empty = wave((1, 1, 64, 64), 0.0, 0.01) - 0.95
    assert decode_mask(empty, 2).sum() == 0
    assert decode_mask(empty, 2, "relative").sum() > 0


@given(st.integers(2, 5), st.booleans(), st.floats(0, 0.2), st.integers(0, 2**31))
def test_masks_read_back_from_noisy_channels(num_classes, ordinal, noise, seed):
    draws = torch.Generator().manual_seed(seed)
    mask = torch.randint(num_classes, (3, 1, 5, 7), generator=draws)
    channels = encode_mask(mask, num_classes, ordinal)
    assert channels.shape == (3, 1 if ordinal else num_classes - 1, 5, 7)
    assert (channels.min() >= -1) & (channels.max() <= 1)
    noisy = channels + noise * (2 * torch.rand(channels.shape, generator=draws) - 1)
    assert torch.equal(decode_mask(noisy, num_classes, ordinal=ordinal), mask)


def test_relative_classes_are_those_that_stand_out(clean):
    both = torch.cat([clean[:1], clean[1:]], 1)  # the second lies within the first
    found = decode_mask(both - torch.tensor([0.2, 0.0]).view(1, 2, 1, 1), 3, "relative")
    assert [int((found == k).sum()) for k in range(3)] == [144 - 13, 4, 9]  # 8 of the 12 are the second class too


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, "otsu"), "decode 'otsu'; expected is absolute or relative"),
        ((4, "relative", True), "4 relative levels; expected are 2 or 3"),
    ],
)
def test_unknown_ways_are_refused(clean, arguments, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(clean, *arguments)
