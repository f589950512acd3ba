import cv2
import numpy as np
import pytest
import torch

from fairdiff_lightning.networks.condition import (
    blended_colours,
    check_labels,
    colours,
    one_hot,
    palette,
    resize_labels,
)

FRAME = (512, 512)


def card_mask():
    """The card's mask: 664 x 798, ellipses of disc and cup."""
    row, col = np.mgrid[:664, :798]
    disc = ((col - 400) / 120) ** 2 + ((row - 332) / 140) ** 2 <= 1
    cup = ((col - 410) / 60) ** 2 + ((row - 336) / 70) ** 2 <= 1
    return torch.from_numpy(disc.astype(np.int64) + (disc & cup))[None, None]


def pack(hint):
    """FairDiff's packing of a picture (3, 512, 512): nearest resize to 798 x 664, exact match of colours."""
    picture = (hint * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = cv2.resize(picture, (798, 664), interpolation=cv2.INTER_NEAREST)
    matches = np.stack([(picture == np.array(colour) * 255).all(-1) for colour in palette(3)])
    return np.where(matches.any(0), matches.argmax(0), 0), ~matches.any(0)


def dice(a, b, label):
    return 2 * ((a == label) & (b == label)).sum() / ((a == label).sum() + (b == label).sum())


def test_blended_colours_are_the_reference_s(reference):
    """cn04"""
    expected = reference("fairdiff")["cn04_hint"]["expected"]
    hint = blended_colours(card_mask(), 3, FRAME)[0]
    found, counts = np.unique((hint * 255).round().numpy().reshape(3, -1), axis=1, return_counts=True)
    assert found.shape[1] == expected["unique_colours"]
    top = sorted(zip(counts.tolist(), found.T.tolist(), strict=True), reverse=True)[:3]
    assert [[colour, count] for count, colour in top] == expected["top"]
    assert hint.permute(1, 2, 0).contiguous().numpy().sum() == np.float32(expected["sum"])


def test_the_reference_s_way_leaves_a_seam_that_labels_do_not(reference):
    """cn05"""
    mask, expected = card_mask(), reference("fairdiff")["cn05_pack_roundtrip"]["expected"]
    nearest, expected = expected["nearest_resize_both_ways_for_comparison"], expected["official"]
    packed, unmatched = pack(blended_colours(mask, 3, FRAME)[0])
    truth = mask[0, 0].numpy()
    assert np.bincount(packed.ravel()).tolist() == expected["counts_bg_rim_cup"]
    assert unmatched.sum() == expected["unmatched_px_set_to_background"]
    assert (unmatched & (truth > 0)).sum() == expected["unmatched_inside_disc"]
    assert {"dice_rim": dice(packed, truth, 1), "dice_cup": dice(packed, truth, 2)}.items() <= expected.items()

    both_ways = truth.astype(np.uint8)
    for size in (FRAME, (798, 664)):
        both_ways = cv2.resize(both_ways, size, interpolation=cv2.INTER_NEAREST)
    assert {"dice_rim": dice(both_ways, truth, 1), "dice_cup": dice(both_ways, truth, 2)} == nearest

    ours, lost = pack(colours(resize_labels(mask, FRAME), 3)[0])
    assert not lost.any()
    there_and_back = resize_labels(resize_labels(mask, FRAME), (664, 798))[0, 0].numpy()
    assert dice(there_and_back, truth, 1) > expected["dice_rim"]
    assert dice(there_and_back, truth, 2) > expected["dice_cup"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "int8", "int16", "int32", "int64"])
def test_the_reference_s_labels_vanish_in_a_png(tmp_path, reference, dtype):
    """cn06: the signed labels 0, -1, -2 are written as they are."""
    check, file = reference("fairdiff")["cn06_label_png"], str(tmp_path / "labels.png")
    assert dtype in check["inputs"]["dtypes"]
    labels = -card_mask()[0, 0].numpy().astype(dtype)
    assert np.unique(labels).tolist() == [-2, -1, 0]
    assert cv2.imwrite(file, labels)
    assert np.unique(cv2.imread(file, cv2.IMREAD_UNCHANGED)).tolist() == check["expected"]["unique_values_in_png"]


def test_labels_in_colours_come_back_from_a_png(tmp_path):
    mask, file = card_mask(), str(tmp_path / "colours.png")
    picture = (colours(mask, 3)[0] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    assert cv2.imwrite(file, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    stored = cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB)
    found, lost = pack(torch.from_numpy(stored).permute(2, 0, 1) / 255)
    assert not lost.any()
    assert np.array_equal(found, mask[0, 0])


@pytest.mark.parametrize("num_classes", [2, 3, 5, 24])
def test_colours_of_classes_differ_and_begin_with_the_reference_s(num_classes):
    assert palette(num_classes)[:3] == ((1, 1, 1), (1, 0, 0), (0, 0, 1))[:num_classes]
    bytes_ = {tuple(round(255 * channel) for channel in colour) for colour in palette(num_classes)}
    assert len(palette(num_classes)) == len(bytes_) == num_classes


def test_one_hot_agrees_with_torch_at_any_size():
    mask = torch.randint(4, (3, 1, 5, 9))
    expected = torch.nn.functional.one_hot(mask[:, 0], 4).permute(0, 3, 1, 2).float()
    assert torch.equal(one_hot(mask, 4), expected)
    painted = colours(mask, 4)
    assert painted.shape == (3, 3, 5, 9)
    assert painted[2, :, 4, 7].tolist() == pytest.approx(palette(4)[mask[2, 0, 4, 7]])


def test_labels_are_resized_by_the_nearest_pixel_centre():
    mask = torch.arange(6).view(1, 1, 2, 3)
    assert resize_labels(mask, (2, 3)) is mask
    assert resize_labels(mask, (4, 6))[0, 0].tolist() == np.kron(mask[0, 0], np.ones((2, 2))).tolist()
    odd = torch.randint(4, (1, 1, 31, 17))
    expected = cv2.resize(odd[0, 0].numpy().astype(np.uint8), (9, 20), interpolation=cv2.INTER_NEAREST_EXACT)
    assert resize_labels(odd, (20, 9))[0, 0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 8, 8, dtype=torch.int64), r"shape \(2, 8, 8\); expected is \(B, 1, H, W\)"),
        (torch.zeros(2, 1, 8, 12, dtype=torch.int64), r"8 x 12, and image_size \(16, 16\) has another aspect ratio"),
        (torch.full((1, 1, 8, 8), 3), r"classes \[3\]; expected are 0 to 2"),
        (torch.full((1, 1, 8, 8), -1), r"classes \[-1\]; expected are 0 to 2"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        check_labels(mask, 3, (16, 16), "the mask")


def test_the_colours_of_classes_stay_on_the_device_for_training_too(monkeypatch):
    mask = torch.randint(11, (2, 1, 3, 4))
    with torch.inference_mode():
        first = colours(mask, 11)
    monkeypatch.setattr(torch, "tensor", None)  # what would move numbers to the device
    scale = torch.ones(1, requires_grad=True)
    again = colours(mask, 11)
    (again * scale).sum().backward()
    assert torch.equal(first, again)
