import warnings

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from scipy import ndimage

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.phantoms_3d import chest
from fairdiff_lightning.data.rois import candidate_places, extract_rois, lung_mask, paste_roi
from fairdiff_lightning.data.volumes import Volume, block_of, crop_or_pad, cut, read_volume, write_volume

AFFINE = np.array([[0.7, 0, 0, -12.5], [0, 0.9, 0, 31.25], [0, 0, 2.5, -400.0], [0, 0, 0, 1]])


def scan_with(boxes, shape=(19, 23, 11), dtype=np.int16, seed=0):
    values = np.random.default_rng(seed).integers(-1000, 1500, shape).astype(dtype)
    mask = np.zeros(shape, np.uint8)
    for label, (start, size) in enumerate(boxes, 1):
        mask[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))] = label
    return Volume(values, AFFINE), Volume(mask, AFFINE)


def test_every_lesion_gets_a_block_around_it_and_the_largest_is_first():
    image, mask = scan_with([((3, 4, 2), (2, 2, 2)), ((12, 15, 6), (4, 3, 2)), ((13, 17, 8), (2, 2, 1))])
    rois = extract_rois(image, mask, (9, 7, 5))
    assert [(roi.start, roi.is_cut) for roi in rois] == [((10, 14, 5), False), ((0, 2, 1), False)]
    for roi in rois:
        assert roi.image.shape == roi.mask.shape == (9, 7, 5)
        block = tuple(slice(s, s + n) for s, n in zip(roi.start, (9, 7, 5), strict=True))
        assert np.array_equal(roi.image.array, image.array[block])
        assert np.array_equal(roi.mask.array, mask.array[block])
        np.testing.assert_allclose(roi.image.affine[:3, 3], (AFFINE @ [*roi.start, 1])[:3])
    assert np.unique(rois[0].mask.array).tolist() == [0, 2, 3]  # classes that touch are one lesion
    assert len(extract_rois(image, mask, (9, 7, 5), min_voxels=9)) == 1


def test_sizes_in_mm_are_rounded_to_voxels():
    image, mask = scan_with([((8, 10, 4), (2, 2, 2))])
    (roi,) = extract_rois(image, mask, (7.0, 8.1, 13.0), unit="mm")
    assert roi.image.shape == (10, 9, 5)


def test_a_block_at_the_border_moves_inwards_and_only_a_short_scan_is_padded():
    image, mask = scan_with([((0, 21, 5), (1, 2, 1))])
    (roi,) = extract_rois(image, mask, (7, 7, 14))
    assert roi.start == (0, 16, -2)
    assert (roi.image.array[..., :2] == -1000).all()
    assert (roi.image.array[..., -1] == -1000).all()
    assert np.array_equal(roi.image.array[..., 2:13], image.array[:7, 16:])
    assert not roi.mask.array[..., :2].any()


@pytest.mark.parametrize(("dtype", "held"), [(np.uint8, 0), (np.uint16, 0), (np.int8, -128)])
def test_padding_that_a_type_cannot_hold_is_its_nearest_and_said(dtype, held):
    image, mask = scan_with([((0, 21, 5), (1, 2, 1))])
    stored = Volume((image.array % 100).astype(dtype), AFFINE)
    with pytest.warns(UserWarning, match=rf"padding of -1000 for an array of {np.dtype(dtype)}.*{held} is taken"):
        (roi,) = extract_rois(stored, mask, (7, 7, 14))
    assert (roi.image.array[..., :2] == held).all()
    assert np.array_equal(roi.image.array[..., 2:13], stored.array[:7, 16:])
    assert roi.image.array.dtype == dtype
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract_rois(stored, mask, (7, 7, 9))  # nothing is padded
        assert (extract_rois(image, mask, (7, 7, 14))[0].image.array[..., :2] == -1000).all()
        assert (extract_rois(stored, mask, (7, 7, 14), fill=7)[0].image.array[..., :2] == 7).all()


def test_padding_of_an_unsigned_file_with_its_offset_is_air(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint16)
    scan, mask = scan_with([((0, 21, 5), (1, 2, 1))])
    image = nib.Nifti1Image((scan.array + 1024).astype(np.uint16), AFFINE, header)
    image.header.set_slope_inter(1, -1024)
    path = tmp_path / "ct.nii"
    nib.save(image, path)
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([1, -1024], "<f4").tobytes()  # nibabel stores unscaled numbers as they are
    raw[352:] = (scan.array + 1024).astype("<u2").tobytes("F")
    path.write_bytes(raw)
    held = read_volume(path)
    assert (held.native.dtype, held.native.intercept) == (np.uint16, -1024)
    (roi,) = extract_rois(held, mask, (7, 7, 14))
    assert (roi.image.array[..., :2] == -1000).all()
    assert np.array_equal(roi.image.array[..., 2:13], scan.array[:7, 16:])


def test_a_lesion_larger_than_its_block_says_so_and_no_lesion_is_an_error():
    image, mask = scan_with([((3, 4, 2), (9, 2, 2))])
    assert extract_rois(image, mask, (8, 8, 4))[0].is_cut
    with pytest.raises(InvalidSampleError, match="0 lesions, the largest of 0 voxels"):
        extract_rois(image, Volume(mask.array * 0, AFFINE), (5, 5, 5))
    with pytest.raises(InvalidSampleError, match="affines"):
        extract_rois(image, Volume(mask.array, np.eye(4)), (5, 5, 5))


BLOCK = st.tuples(*[st.integers(2, 14)] * 3)


@settings(max_examples=40, deadline=None)
@given(BLOCK, st.integers(0, 2**31), st.sampled_from([np.int16, np.float32, np.uint8]))
def test_pasting_what_was_extracted_is_the_identity(size, seed, dtype):
    rng = np.random.default_rng(seed)
    boxes = [(rng.integers(0, (15, 19, 8)), rng.integers(1, 5, 3)) for _ in range(3)]
    image, mask = scan_with(boxes, dtype=dtype, seed=seed)
    for roi in extract_rois(image, mask, size):
        pasted = paste_roi(image, roi.image, roi.mask.array)
        assert pasted.array.dtype == dtype
        assert pasted.array.tobytes() == image.array.tobytes()


@settings(max_examples=40, deadline=None)
@given(BLOCK, st.integers(0, 2**31))
def test_pasting_changes_the_lesion_and_nothing_else(size, seed):
    rng = np.random.default_rng(seed)
    image, mask = scan_with([(rng.integers(0, (15, 19, 8)), rng.integers(1, 5, 3))], seed=seed)
    (roi,) = extract_rois(image, mask, size)
    made = roi.image.with_array(rng.normal(-300, 200, size).astype(np.float32))
    pasted = paste_roi(image, made, roi.mask.array)
    expected = image.array.copy()
    for index in np.argwhere(roi.mask.array):
        expected[tuple(index + roi.start)] = np.round(made.array[tuple(index)])
    assert np.array_equal(pasted.array, expected)
    assert np.array_equal(pasted.affine, image.affine)


def test_a_scan_keeps_its_file_where_nothing_was_pasted(tmp_path):
    image, mask = scan_with([((3, 4, 2), (3, 3, 3))])
    header = nib.Nifti1Header()
    header["descrip"] = b"scanner"
    header.set_data_dtype(np.int16)
    turned = AFFINE @ np.diag([-1, -1, 1, 1])
    nib.save(nib.Nifti1Image(image.array, turned, header), tmp_path / "ct.nii.gz")
    nib.save(nib.Nifti1Image(mask.array, turned), tmp_path / "mask.nii.gz")
    scan = read_volume(tmp_path / "ct.nii.gz")
    (roi,) = extract_rois(scan, read_volume(tmp_path / "mask.nii.gz"), (8, 8, 8))
    made = roi.image.with_array(np.full((8, 8, 8), 55.4, np.float32))
    before = nib.load(tmp_path / "ct.nii.gz")
    after = nib.load(write_volume(tmp_path / "new.nii.gz", paste_roi(scan, made, roi.mask.array)))
    stored, original = np.asarray(after.dataobj), np.asarray(before.dataobj)
    assert (after.get_data_dtype(), after.header["descrip"]) == (np.int16, before.header["descrip"])
    np.testing.assert_array_equal(after.affine, before.affine)
    assert (stored[mask.array > 0] == 55).all()
    assert np.array_equal(stored[mask.array == 0], original[mask.array == 0])


def test_a_dicom_series_keeps_its_pixels_where_nothing_was_pasted(tmp_path):
    image, mask = scan_with([((3, 4, 2), (3, 3, 3))])
    scan = read_volume(write_volume(tmp_path / "ct", image))
    (roi,) = extract_rois(scan, mask, (8, 8, 8))
    made = roi.image.with_array(np.full((8, 8, 8), 55.4, np.float32))
    again = read_volume(write_volume(tmp_path / "new", paste_roi(scan, made, roi.mask.array)))
    assert np.array_equal(again.array, np.where(mask.array > 0, 55, image.array))


def test_a_lesion_that_is_empty_or_outside_or_of_another_grid_is_not_pasted():
    image, _ = scan_with([])
    beyond = crop_or_pad(image, (5, 5, 5), fill=-1000, centre=(0, 4, 4))
    lesion = np.zeros((5, 5, 5), np.uint8)
    with pytest.raises(InvalidSampleError, match="an empty mask"):
        paste_roi(image, beyond, lesion)
    lesion[1:3, 2, 2] = 1
    with pytest.raises(InvalidSampleError, match=r"1 of 2 voxels outside of the scan of \(19, 23, 11\)"):
        paste_roi(image, beyond, lesion)
    with pytest.raises(InvalidSampleError, match=r"\(5, 5, 4\) voxels for a block of \(5, 5, 5\)"):
        paste_roi(image, beyond, lesion[..., :4])
    with pytest.raises(InvalidSampleError, match="2 of 2 voxels outside of the scan"):
        paste_roi(image, Volume(beyond.array, beyond.affine @ np.diag([-1, 1, 1, 1])), lesion)


def test_a_block_with_its_axes_in_another_order_is_put_back_bit_for_bit():
    image, mask = scan_with([((3, 4, 2), (3, 2, 4))])
    (roi,) = extract_rois(image, mask, (8, 9, 6))
    made = roi.image.with_array(roi.image.array + np.arange(9)[:, None].astype(np.int16))
    expected = paste_roi(image, made, roi.mask.array).array
    axes = ("P", "L", "S")
    assert np.array_equal(paste_roi(image, made.reoriented(axes), roi.mask.reoriented(axes).array).array, expected)


@pytest.mark.parametrize("step", [(0.5, 0.6, 1.2), (1.4, 1.3, 4.0)], ids=["finer", "coarser"])
def test_a_block_of_another_spacing_is_put_back_in_its_millimetres(step):
    """Of a ramp along a diagonal of the patient, which linear resampling keeps: a shift would change the values."""
    shape = (40, 36, 30)
    image = Volume(np.random.default_rng(0).integers(-1000, 1500, shape).astype(np.int16), AFFINE)
    placed = np.diag([*step, 1.0])
    placed[:3, 3] = AFFINE[:3, 3] + (7.3, 5.1, 21.7)
    centre, grid = placed[:3, 3] + (5.5, 6.0, 8.0), np.indices((24, 22, 14)).reshape(3, -1)

    def mm(index, affine):
        return affine[:3, :3] @ index + affine[:3, 3:]

    def ramp(points):
        return 10 * points[0] - 4 * points[1] + 3 * points[2] + 1200

    points = mm(grid, placed)
    lesion = (np.linalg.norm(points - centre[:, None], axis=0) < 4).reshape(24, 22, 14)
    block = Volume(ramp(points).reshape(24, 22, 14).astype(np.float32), placed).reoriented(("P", "L", "S"))
    turned = Volume(lesion.astype(np.uint8), placed).reoriented(("P", "L", "S")).array
    pasted = paste_roi(image, block, turned)
    found = mm(np.indices(shape).reshape(3, -1), AFFINE)
    inside = (np.linalg.norm(found - centre[:, None], axis=0) < 4).reshape(shape)
    changed = pasted.array != image.array
    reach = max(*step, *image.spacing)
    edge = (np.abs(np.linalg.norm(found - centre[:, None], axis=0) - 4) < reach).reshape(shape)
    assert np.array_equal(changed | edge, inside | edge)
    np.testing.assert_allclose(mm(np.argwhere(changed).T, AFFINE).mean(1), centre, atol=0.35)
    np.testing.assert_allclose(pasted.array[changed], ramp(found).reshape(shape)[changed], atol=0.6)
    assert pasted.array.dtype == np.int16


def test_a_lesion_finer_than_the_scan_can_show_says_so():
    image, _ = scan_with([])
    affine = AFFINE.copy()
    affine[:3, :3] /= 8
    affine[:3, 3] += AFFINE[:3, :3] @ (4.4, 4.4, 4.4)
    lesion = np.zeros((3, 3, 3), np.uint8)
    lesion[1, 1, 1] = 1
    with pytest.raises(InvalidSampleError, match="covers the centre of a voxel of the scan"):
        paste_roi(image, Volume(np.zeros((3, 3, 3)), affine), lesion)


def test_values_that_the_scan_cannot_hold_are_refused(tmp_path):
    image, mask = scan_with([((3, 4, 2), (3, 3, 3))])
    (roi,) = extract_rois(image, mask, (8, 8, 8))
    made = roi.image.with_array(np.full((8, 8, 8), -343.0, np.float32))
    unset = Volume((image.array + 1000).clip(0).astype(np.uint16), AFFINE)
    with pytest.raises(
        InvalidSampleError, match=r"-343 to -343 for a scan of uint16, which holds 0 to 65535.*HU offset"
    ):
        paste_roi(unset, made, roi.mask.array)
    stored = read_volume(write_volume(tmp_path / "ct.nii.gz", unset))
    with pytest.raises(InvalidSampleError, match="HU offset"):
        paste_roi(stored.with_array(stored.array.astype(np.float32)), made, roi.mask.array)
    made.array[tuple(np.argwhere(roi.mask.array)[0])] = np.nan
    with pytest.raises(InvalidSampleError, match="NaN or infinite"):
        paste_roi(image, made, roi.mask.array)
    outside = roi.image.with_array(np.where(roi.mask.array, 40, np.nan).astype(np.float32))
    assert (paste_roi(image, outside, roi.mask.array).array[mask.array > 0] == 40).all()


def test_the_lungs_of_a_chest_are_found_with_their_nodules():
    phantom = chest(np.random.default_rng(3), size=(92, 84, 50))
    lungs = lung_mask(phantom.image)
    found, true = lungs.array > 0, phantom.lungs.array > 0
    assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.98
    assert phantom.nodules.array.any()
    assert found[phantom.nodules.array > 0].all()
    assert not found[:, :8].any()  # neither the couch nor the air around it
    cut_off = block_of(
        phantom.image, (0, 0, 0), (30, 84, 50), fill=-1000
    )  # the field of view ends within the left lung
    part = lung_mask(cut_off).array > 0
    assert 2 * (part & true[:30]).sum() / (part.sum() + true[:30].sum()) > 0.97


def test_scans_without_lungs_or_without_hu_say_so():
    phantom = chest(np.random.default_rng(3), size=(92, 84, 50), nodules=0).image
    solid = phantom.array.copy()
    solid[(solid < -500) & (solid > -970)] = 40
    with pytest.raises(InvalidSampleError, match="no region below -400 HU"):
        lung_mask(phantom.with_array(solid))
    with pytest.raises(InvalidSampleError, match="hu_offset"):
        lung_mask(phantom.with_array(phantom.array + 1024))


def blob(seed, size=(4, 5, 3)):
    lesion = ndimage.gaussian_filter(np.random.default_rng(seed).random(size), 0.8) > 0.5
    lesion[tuple(s // 2 for s in size)] = True
    return lesion


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from([0.0, 0.8, 2.0]), st.sampled_from([0.0, 3.0]))
def test_a_lesion_lies_inside_of_the_organ_at_every_place(seed, count, margin, distance):
    organ_array = ndimage.gaussian_filter(np.random.default_rng(seed).random((21, 17, 13)), 2.5) > 0.48
    organ, lesion = Volume(organ_array.astype(np.uint8), AFFINE), blob(seed)
    try:
        places = candidate_places(organ, lesion, count, seed, margin, distance)
    except InvalidSampleError:  # an organ too small for so many, which is rare
        reject()
    depth = ndimage.distance_transform_edt(np.pad(organ_array, 1), sampling=organ.spacing)[1:-1, 1:-1, 1:-1]
    for place in places:
        at = np.argwhere(lesion) + place
        assert ((at >= 0) & (at < organ.shape)).all()
        assert organ_array[tuple(at.T)].all()
        assert depth[tuple(at.T)].min() > margin
    mm = places * organ.spacing
    apart = np.linalg.norm(mm[:, None] - mm[None], axis=-1)[np.triu_indices(count, 1)]
    assert (apart >= distance - 1e-9).all()
    assert len(np.unique(places, axis=0)) == count


def test_all_places_are_found_and_a_larger_count_begins_with_the_same_ones():
    organ_array = ndimage.gaussian_filter(np.random.default_rng(5).random((12, 11, 9)), 2) > 0.5
    organ, lesion = Volume(organ_array.astype(np.uint8), AFFINE), np.pad(blob(5, (3, 3, 2)), 2)
    inside = np.pad(organ_array, 9)
    fits = [
        start
        for start in np.ndindex(20, 19, 17)
        if cut(inside, np.array(start) + 1, lesion.shape, fill=0)[lesion].all()
    ]
    everywhere = candidate_places(organ, lesion, len(fits), seed=1)
    assert sorted(map(tuple, everywhere + 8)) == sorted(fits)
    assert np.array_equal(candidate_places(organ, lesion, 2, seed=1), everywhere[:2])
    assert not np.array_equal(candidate_places(organ, lesion, 2, seed=2), everywhere[:2])
    with pytest.raises(InvalidSampleError, match=f"{len(fits)} places for a lesion"):
        candidate_places(organ, lesion, len(fits) + 1, seed=1)


def test_boxes_are_placed_too_and_what_cannot_fit_says_so():
    organ = Volume(np.pad(np.ones((4, 5, 3), np.uint8), 2), AFFINE)
    assert candidate_places(organ, (4, 5, 3), 1, seed=0).tolist() == [[2, 2, 2]]
    for lesion in ((5, 5, 3), (40, 40, 40)):
        with pytest.raises(InvalidSampleError, match="0 places"):
            candidate_places(organ, lesion, 1, seed=0)
    with pytest.raises(InvalidSampleError, match="an empty mask"):
        candidate_places(organ, np.zeros((3, 3, 3)), 1, seed=0)
    with pytest.raises(InvalidSampleError, match="0 places"):
        candidate_places(Volume(organ.array * 0, AFFINE), (1, 1, 1), 1, seed=0)


def test_a_lesion_goes_into_a_real_scan(realdata, tmp_path):
    root = realdata / "IBSI" / "ibsi_1_ct_radiomics_phantom" / "nifti"
    scan, tumour = read_volume(root / "image" / "phantom.nii.gz"), read_volume(root / "mask" / "mask.nii.gz")
    (roi,) = extract_rois(scan, tumour, (110, 105, 30))
    assert not roi.is_cut
    assert roi.mask.array.sum() == tumour.array.sum()
    assert np.array_equal(paste_roi(scan, roi.image, roi.mask.array).array, scan.array)
    lungs = lung_mask(scan)
    litres = lungs.array.sum() * np.prod(lungs.spacing) / 1e6
    assert 0.8 < litres < 2  # one lung, its lower part full of tumour
    lesion = np.hypot(*np.ogrid[-7:8, -7:8])[..., None] * np.ones(4) < 7
    (place,) = candidate_places(lungs, lesion, 1, seed=0, margin=2)
    block = block_of(scan, place, lesion.shape, fill=-1000)
    assert np.median(block.array[lesion]) < -600
    pasted = paste_roi(scan, block.with_array(np.full(lesion.shape, 60.0)), lesion)
    stored = read_volume(write_volume(tmp_path / "new.nii.gz", pasted)).array
    assert np.count_nonzero(stored != scan.array) == np.count_nonzero(block.array[lesion] != 60)
    assert (cut(stored, place, lesion.shape, fill=0)[lesion] == 60).all()
