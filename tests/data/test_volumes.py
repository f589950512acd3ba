import gzip
import itertools
import struct
import warnings

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.resample import to_spacing
from fairdiff_lightning.data.slice_stack import slice_window
from fairdiff_lightning.data.volumes import (
    AIR,
    RAS,
    Volume,
    Window,
    check_hu,
    check_mask,
    check_same_grid,
    crop_or_pad,
    place_back,
    read_notes,
    read_volume,
    write_nifti,
    write_volume,
)

SHAPE = (5, 7, 4)
AFFINE = np.array([[0.7, 0, 0, -12.5], [0, 0.9, 0, 31.25], [0, 0, 2.5, -400.0], [0, 0, 0, 1]])
ORIENTATIONS = [
    tuple(pairs[axis][side] for axis, side in zip(order, sides, strict=True))
    for pairs in [(("L", "R"), ("P", "A"), ("I", "S"))]
    for order in itertools.permutations(range(3))
    for sides in itertools.product((0, 1), repeat=3)
]


def scan(dtype=np.int16, seed=0, shape=SHAPE):
    values = np.random.default_rng(seed).integers(-1000, 1500, shape)
    values.flat[:2] = -1000, 1499
    return Volume(values.astype(dtype), AFFINE)


def oriented_by_hand(volume, axes):
    """Array and affine with axes as said, by indexing voxel after voxel."""
    order = [[{"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}[a] for a in axes].index(k) for k in range(3)]
    shape = tuple(volume.shape["LRPAIS".index(a) // 2] for a in axes)
    array, affine = np.empty(shape, volume.array.dtype), np.eye(4)
    for index in np.ndindex(shape):
        source = []
        for k in range(3):
            place = index[order[k]]
            flipped = axes[order[k]] in "LPI"
            source.append(volume.shape[k] - 1 - place if flipped else place)
        array[index] = volume.array[tuple(source)]
    for column, a in enumerate(axes):
        k = "LRPAIS".index(a) // 2
        affine[:3, column] = volume.affine[:3, k] * (-1 if a in "LPI" else 1)
    first = [volume.shape[k] - 1 if axes[order[k]] in "LPI" else 0 for k in range(3)]
    affine[:3, 3] = (volume.affine @ [*first, 1])[:3]
    return array, affine


@pytest.mark.parametrize("axes", ORIENTATIONS, ids="".join)
def test_every_flip_and_permutation_of_the_axes_reads_as_one_volume_and_goes_back(tmp_path, axes):
    truth = scan()
    array, affine = oriented_by_hand(truth, axes)
    path = tmp_path / "v.nii.gz"
    nib.save(nib.Nifti1Image(array, affine), path)
    volume = read_volume(path)
    assert (volume.axes, volume.native.axes) == (RAS, axes)
    assert np.array_equal(volume.array, truth.array)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
    np.testing.assert_allclose(volume.spacing, (0.7, 0.9, 2.5), rtol=1e-6)
    back = nib.load(write_volume(tmp_path / "w.nii.gz", volume))
    assert np.array_equal(np.asarray(back.dataobj), array)
    np.testing.assert_allclose(back.affine, affine, atol=1e-4)
    assert nib.aff2axcodes(read_volume(path, axes=None).affine) == axes


def test_oblique_slices_are_turned_to_the_nearest_axes_and_stay_where_they_are(tmp_path):
    angle = np.radians(17)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.8, 0.8, 3.0])
    path = write_nifti(tmp_path / "v.nii", Volume(scan().array, affine))
    volume = read_volume(path)
    assert (volume.axes, volume.native.axes) == (RAS, ("L", "A", "S"))
    here, there = np.array([4 - 1, 2, 3, 1]), np.array([1, 2, 3, 1])
    assert volume.array[tuple(here[:3])] == scan().array[tuple(there[:3])]
    np.testing.assert_allclose(volume.affine @ here, affine @ there, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [(np.int16, 1, -1024), (np.uint8, 0.37, 5), (np.int32, 0.1, 7), (np.int64, 1, 0), (np.int16, 1e-4, 1000)],
)
def test_scaled_files_are_rescaled_and_written_back_bit_for_bit(tmp_path, dtype, slope, intercept):
    stored = np.random.default_rng(0).integers(0, 200, SHAPE).astype(dtype)
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header["descrip"] = b"as the scanner said"
    image = nib.Nifti1Image(stored, AFFINE, header, dtype=dtype)
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, tmp_path / "v.nii.gz")
    volume = read_volume(tmp_path / "v.nii.gz")
    np.testing.assert_allclose(volume.array, stored * np.float64(np.float32(slope)) + intercept, rtol=1e-6)
    again = nib.load(write_volume(tmp_path / "w.nii.gz", volume))
    assert again.get_data_dtype() == dtype
    assert np.array_equal(again.dataobj.get_unscaled(), stored)
    assert again.header["descrip"].tobytes().startswith(b"as the scanner said")
    np.testing.assert_allclose([again.dataobj.slope, again.dataobj.inter], (slope, intercept), rtol=1e-6)


def test_values_that_the_files_type_cannot_hold_are_rounded_and_limited(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), AFFINE), tmp_path / "v.nii")
    volume = read_volume(tmp_path / "v.nii")
    values = np.zeros(SHAPE, np.float32)
    values.flat[:4] = 1.6, -1.6, 1e6, -1e6
    stored = np.asarray(nib.load(write_volume(tmp_path / "w.nii", volume.with_array(values))).dataobj)
    assert stored.flat[:4].tolist() == [2, -2, 32767, -32768]


def test_notes_are_kept_and_a_foreign_file_has_none(tmp_path):
    path = write_nifti(tmp_path / "v.nii.gz", scan(), {"synthetic": True, "source": "case {1}"})
    assert read_notes(path) == {"synthetic": True, "source": "case {1}"}
    again = write_nifti(tmp_path / "w.nii.gz", read_volume(path), {"source": "b"})
    assert read_notes(again) == {"source": "b"}
    nib.save(nib.Nifti1Image(scan().array, AFFINE), tmp_path / "x.nii")
    assert read_notes(tmp_path / "x.nii") == {}
    assert (
        write_nifti(tmp_path / "y.nii.gz", scan()).read_bytes()
        == write_nifti(tmp_path / "z.nii.gz", scan()).read_bytes()
    )
    assert not list(tmp_path.glob(".*"))


def test_wrong_files_say_what_they_are(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6, 3), np.int16), AFFINE), tmp_path / "4d.nii")
    with pytest.raises(InvalidSampleError, match=r"4d.nii: 4-D data of \(4, 5, 6, 3\).*one volume"):
        read_volume(tmp_path / "4d.nii")
    nib.save(nib.Nifti1Image(np.zeros((4, 5), np.int16), AFFINE), tmp_path / "2d.nii")
    with pytest.raises(InvalidSampleError, match="2-D data"):
        read_volume(tmp_path / "2d.nii")
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6, 1), np.int16), AFFINE), tmp_path / "single.nii")
    assert read_volume(tmp_path / "single.nii").shape == (4, 5, 6)
    sheared = AFFINE.copy()
    sheared[1, 2] = 0.6
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), sheared), tmp_path / "sheared.nii")
    with pytest.raises(InvalidSampleError, match="tilted gantry"):
        read_volume(tmp_path / "sheared.nii")
    whole = write_nifti(tmp_path / "v.nii.gz", scan()).read_bytes()
    for name, content in {"cut.nii.gz": whole[:-40], "noise.nii.gz": b"nothing", "noise.nii": b"x" * 400}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidSampleError, match=f"{name}: .*unreadable"):
            read_volume(tmp_path / name)
    with pytest.raises(InvalidSampleError, match=r"absent.nii: unreadable"):
        read_volume(tmp_path / "absent.nii")
    with pytest.raises(InvalidSampleError, match=r"ends in .nii"):
        read_volume(tmp_path / "image.mha")


def test_an_image_and_a_mask_of_other_grids_name_both():
    image = scan()
    with pytest.raises(InvalidSampleError, match=r"\(5, 7, 3\) voxels for an image of \(5, 7, 4\)"):
        check_same_grid(image, Volume(image.array[..., :3], AFFINE), "mask.nii")
    for change in ([0, 3, 0.5], [0, 0, 0.05], [1, 1, -0.05]):
        row, column, off = change
        affine = AFFINE.copy()
        affine[row, column] += off
        with pytest.raises(InvalidSampleError, match=r"mask.nii: image and mask lie up to .* mm off.*-12.5"):
            check_same_grid(image, Volume(image.array, affine), "mask.nii")
    check_same_grid(image, Volume(image.array, AFFINE + 1e-3 * np.eye(4)[:, [3, 0, 1, 2]]), "mask.nii")


def test_labels_outside_of_the_spec_are_named():
    labels = np.zeros(SHAPE)
    labels[1, 1, 1] = 2
    assert check_mask(Volume(labels, AFFINE), 3, "m").array.dtype == np.uint8
    with pytest.raises(InvalidSampleError, match=r"m: mask values \[0.0, 2.0\]. Expected classes 0 to 1"):
        check_mask(Volume(labels, AFFINE), 2, "m")
    labels[0, 0, 0] = 0.5
    with pytest.raises(InvalidSampleError, match=r"0.5"):
        check_mask(Volume(labels, AFFINE), 3, "m")


def test_an_offset_that_was_not_applied_is_an_error_or_is_corrected_when_said():
    hu = scan().array.astype(np.float32)
    assert np.array_equal(check_hu(hu, "ct"), hu)
    with pytest.raises(InvalidSampleError, match=r"ct: values from 24 to 2523.*give hu_offset=-1024"):
        check_hu(hu + 1024, "ct")
    assert np.array_equal(check_hu((hu + 1024).astype(np.uint16), "ct", offset=-1024), hu)
    with pytest.raises(InvalidSampleError, match="HU already"):
        check_hu(hu, "ct", offset=-1024)
    with pytest.raises(InvalidSampleError, match=r"scaled to \[-1, 1\]"):
        check_hu(hu / 1500, "ct")
    with pytest.raises(InvalidSampleError, match="NaN"):
        check_hu(np.where(hu > 0, np.nan, hu), "ct")


def test_the_window_is_the_references_and_has_an_inverse(reference):
    expected = reference("lefusion")["hu_map"]
    unit = Window().to_unit(np.array(expected["hu"]))
    np.testing.assert_allclose(2 * unit - 1, expected["out"], atol=1e-6)
    inside = np.clip(expected["hu"], -1000, 400)
    np.testing.assert_allclose(Window().from_unit(unit), inside, atol=1e-3)
    assert (unit.dtype, unit.min(), unit.max()) == (np.float32, 0, 1)


@pytest.mark.parametrize("ends", [(250, -200), (0, 0), (np.nan, 1), (0, np.nan), (-np.inf, 0), (0, np.inf)])
def test_a_window_has_two_finite_ends_in_their_order(ends):
    with pytest.raises(ValueError, match=rf"window=\({ends[0]:g}, {ends[1]:g}\); expected are two finite"):
        Window(*ends)


@pytest.mark.parametrize("value", [-1000, 0, 3.5, 1e6])
def test_a_constant_slice_is_zero_in_its_own_window(value):
    flat = np.full((4, 5), value, np.float32)
    assert np.array_equal(slice_window(flat).to_unit(flat), np.zeros_like(flat))


@pytest.mark.parametrize("dtype", [">i2", np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_a_window_takes_values_of_any_type_and_leaves_them_alone(dtype):
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)[::-1]
    values.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unit = Window(4, 20).to_unit(values)
    assert unit.dtype == Window(4, 20).from_unit(unit).dtype == np.float32
    np.testing.assert_allclose(unit, np.clip((values.astype(float) - 4) / 16, 0, 1), atol=1e-7)
    np.testing.assert_allclose(Window(4, 20).from_unit(unit), np.clip(values.astype(float), 4, 20), atol=1e-5)


def test_odd_crops_and_padding_begin_where_torchio_begins():
    line = np.arange(1, 34, dtype=np.float32).reshape(33, 1, 1)
    affine = np.diag([2.0, 1, 1, 1])
    cropped = crop_or_pad(Volume(line, affine), (32, 1, 1), fill=-1000)
    assert (cropped.array[0, 0, 0], cropped.array[-1, 0, 0]) == (2, 33)
    padded = crop_or_pad(Volume(line[:31], affine), (32, 1, 1), fill=-1000)
    assert (padded.array[0, 0, 0], padded.array[1, 0, 0], padded.array[-1, 0, 0]) == (-1000, 1, 31)
    assert (cropped.affine[0, 3], padded.affine[0, 3]) == (2, -2)


def test_padding_is_air_and_not_the_references_grey():
    air = crop_or_pad(Volume(np.full((3, 3, 3), 40, np.int16), np.eye(4)), (5, 4, 3), fill=AIR)
    assert Window().to_unit(air.array)[0, 0, 0] == 0
    grey = crop_or_pad(Volume(np.full((3, 3, 3), 40, np.int16), np.eye(4)), (5, 4, 3), fill=-300)
    assert 2 * Window().to_unit(grey.array)[0, 0, 0] - 1 == 0


SIDES = st.tuples(*[st.integers(1, 9)] * 3)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.none() | st.tuples(*[st.integers(-3, 12)] * 3))
def test_cropping_keeps_every_voxel_in_its_place_and_placing_back_is_the_identity(shape, size, centre):
    whole = scan(shape=shape, dtype=np.float32) if np.prod(shape) > 1 else Volume(np.ones(shape, np.float32), AFFINE)
    part = crop_or_pad(whole, size, fill=-5, centre=centre)
    assert part.shape == size
    for index in itertools.islice(np.ndindex(size), 0, None, 7):
        at = np.linalg.solve(AFFINE, part.affine @ [*index, 1])[:3].round().astype(int)
        inside = ((at >= 0) & (at < shape)).all()
        assert part.array[index] == (whole.array[tuple(at)] if inside else -5)
    assert np.array_equal(place_back(part, whole).array, whole.array)
    first = np.linalg.solve(AFFINE, part.affine[:, 3])[:3].round().astype(int)
    covered = [max(0, min(f + n, full) - max(f, 0)) for f, n, full in zip(first, size, shape, strict=True)]
    changed = place_back(part.with_array(np.full(size, 1e6, np.float32)), whole).array
    assert (changed == 1e6).sum() == np.prod(covered)
    assert (changed == whole.array).sum() == np.prod(shape) - np.prod(covered)


def test_a_part_of_another_grid_is_not_placed_back():
    whole = scan()
    part = crop_or_pad(whole, (3, 3, 3), fill=AIR)
    off = part.affine.copy()
    off[0, 3] += 0.4 * 0.7
    for affine in (off, part.affine @ np.diag([-1, 1, 1, 1]), part.affine @ np.diag([2, 1, 1, 1])):
        with pytest.raises(InvalidSampleError, match="resample or reorient"):
            place_back(Volume(part.array, affine), whole)


@pytest.mark.parametrize(("axis", "size"), [(1, -2.0), (3, 0.0), (2, np.nan)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_spacing_is_above_zero(tmp_path, axis, size, suffix):
    path = tmp_path / f"v{suffix}"
    nib.save(nib.Nifti1Image(scan().array, AFFINE), path)
    opened = gzip.open if suffix == ".nii.gz" else open
    with opened(path, "rb") as stream:
        content = bytearray(stream.read())
    content[76 + 4 * axis : 80 + 4 * axis] = struct.pack("<f", size)  # pixdim begins at byte 76
    with opened(path, "wb") as stream:
        stream.write(content)
    with pytest.raises(InvalidSampleError, match=rf"v{suffix}: pixdim\[1:4\] \[.*{size}.*above 0"):
        read_volume(path)


@pytest.mark.parametrize("spacing", [(-1, 1, 3), (0, 1, 3), (2, 2), (1, 1, np.inf)])
def test_volumes_are_resampled_to_three_sizes_above_zero(spacing):
    with pytest.raises(ValueError, match=r"spacing is \(.*three sizes of a voxel above 0"):
        to_spacing(Volume(scan().array, np.diag([1.0, 1.0, 3.0, 1.0])), spacing, "bilinear")


def test_real_nifti_goes_back_as_it_was(realdata, tmp_path):
    path = realdata / "IBSI" / "ibsi_validation" / "nifti" / "STS_002" / "CT_image.nii.gz"
    volume = read_volume(path)
    again, before = nib.load(write_volume(tmp_path / "v.nii.gz", volume)), nib.load(path)
    assert again.header.binaryblock == before.header.binaryblock
    assert np.array_equal(np.asarray(again.dataobj), np.asarray(before.dataobj))
