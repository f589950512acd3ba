"""Masks where their images are: wrong affines, roundings, resampling, and the way back."""

import nibabel as nib
import numpy as np
import pytest
import torch

from fairdiff_lightning.data.emidec import Emidec
from fairdiff_lightning.data.frames import VolumeFrame
from fairdiff_lightning.data.lidc import LIDC
from fairdiff_lightning.data.native import Record
from fairdiff_lightning.data.prostate import Prostate
from fairdiff_lightning.data.resample import to_spacing
from fairdiff_lightning.data.volumes import Volume

LPS = np.array([[-2.0, 0, 0, 30], [0, -1.5, 0, 20], [0, 0, 3, -40], [0, 0, 0, 1]])
CASE = {"t_stage": -1, "centre": -1}


def pair(folder, image_affine, mask_affine, shape=(12, 10, 6), box=np.s_[2:5, 1:3, 1:3]):
    """A CT of -200 HU whose target is 200 HU, and the mask of the target, each saved with an affine of its own."""
    mask = np.zeros(shape, np.uint8)
    mask[box] = 1
    folder.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image((mask * np.int16(400) - 200).astype(np.int16), image_affine), folder / "i.nii.gz")
    nib.save(nib.Nifti1Image(mask, mask_affine), folder / "m.nii.gz")
    return Record("a", {"image": str(folder / "i.nii.gz"), "mask": str(folder / "m.nii.gz")}, CASE, "a")


def test_a_mask_of_identity_affine_lies_on_its_image(tmp_path):
    record = pair(tmp_path, LPS, np.eye(4))
    data = Prostate(ignore_mask_affine=True)
    image, mask = data.read_arrays(record)
    assert mask.sum() == 12
    assert np.array_equal(mask == 1, image == 200)
    assert np.array_equal(data.read_mask(record), mask)
    frame = VolumeFrame()
    arrays = frame.decode(data, record)
    native = frame.native(data, record, arrays)
    assert torch.equal(native["native_mask"][0], torch.from_numpy(mask).long())
    condition = VolumeFrame(spacing=(1, 1, 3)).condition(data, record)
    assert torch.allclose(
        condition["affine"], torch.from_numpy(to_spacing(data.read_image(record), (1, 1, 3), "nearest").affine)
    )


@pytest.mark.parametrize(("data", "depth_first"), [(LIDC(ignore_mask_affine=True), True), (Emidec(True), False)])
def test_blocks_take_the_place_of_their_image(tmp_path, data, depth_first):
    record = pair(tmp_path, LPS, np.diag([-1.0, 1, 1, 1]))
    (image, mask), alone = data.read_volumes(record), data.read_labels(record)
    assert np.array_equal(mask.array == 1, image.array == image.array.max())
    for found in (mask, alone, data.read_grid(record)):
        np.testing.assert_allclose(found.affine, image.affine)
        assert found.shape == image.shape
    assert image.shape == ((10, 6, 12) if depth_first else (12, 10, 6))


def test_image_and_mask_are_resampled_by_one_affine(tmp_path):
    spacing = np.array([0.9123, 0.9123, 1.0])
    other = np.diag([*(spacing * [1.0005, 1.0005, 1]), 1])
    record = pair(tmp_path, np.diag([*spacing, 1]), other, (64, 64, 5), np.s_[31:34, 20:40, 2])
    image, mask, *_ = VolumeFrame((58, 58, 5), (1.0, 1.0, 1.0)).decode(Prostate(), record)
    rows = [np.flatnonzero(array.any((1, 2))) for array in (image[0] > 0.5, mask)]
    assert np.array_equal(*rows)
    resampled = [
        to_spacing(Volume(np.zeros((64, 64, 5), np.uint8), a), (1, 1, 1), "nearest").shape
        for a in (np.diag([*spacing, 1]), other)
    ]
    assert resampled[0] != resampled[1], "by two affines the shapes differ, so that the test tells"


def test_sides_are_told_from_the_header_as_they_come_out(tmp_path):
    record = pair(tmp_path, LPS, LPS, (13, 9, 7))
    for spacing in (None, (1.0, 1.0, 3.0), (1.3, 2.1, 1.7)):
        frame = VolumeFrame(spacing=spacing, at_least=(4, 40, 4))
        assert frame.sides(Prostate().read_grid(record)) == frame.decode(Prostate(), record)[1].shape


def test_a_kept_native_mask_is_not_read_again(tmp_path):
    record = pair(tmp_path, LPS, LPS)
    data, frame = Prostate(), VolumeFrame((6, 6, 6), keep_native=True)
    arrays, truth = frame.decode(data, record), data.read_mask(record)
    (tmp_path / "m.nii.gz").unlink()
    native = frame.native(data, record, arrays)
    assert torch.equal(native["native_mask"][0], torch.from_numpy(truth).long())
    assert native["native_size"].tolist() == [12, 10, 6]


def test_the_foreground_is_the_box_of_what_is_no_air_and_all_of_air_alone(tmp_path):
    record = pair(tmp_path, LPS, LPS)
    image, mask, affine, *_ = VolumeFrame(foreground=True).decode(Prostate(), record)
    assert image.shape[1:] == mask.shape == (3, 2, 2), "the target shines, the rest is the window's low end"
    np.testing.assert_allclose(affine[:3, 3], Prostate().read_image(record).affine[:3] @ [7, 7, 1, 1])
    nib.save(nib.Nifti1Image(np.full((12, 10, 6), -300, np.int16), LPS), tmp_path / "i.nii.gz")
    whole = VolumeFrame(foreground=True).decode(Prostate(), record)
    assert whole[0].shape[1:] == (12, 10, 6)


def test_an_image_without_a_mask_is_framed_alone(tmp_path):
    record = pair(tmp_path, LPS, LPS)
    alone = Record("a", {"image": record.files["image"]}, CASE, "a")
    data, frame = Prostate(), VolumeFrame(None, (2.0, 2.0, 2.0), foreground=True, at_least=(20, 4, 4))
    arrays, both = frame.decode(data, alone), frame.decode(data, record)
    assert np.array_equal(arrays[0], both[0])
    found = frame.tensors(arrays) | frame.native(data, alone, arrays)
    assert sorted(found) == ["affine", "image", "native_affine", "native_size", "spacing"]
    assert found["native_size"].tolist() == [12, 10, 6]
