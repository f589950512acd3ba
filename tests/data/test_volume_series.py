import warnings

import numpy as np
import pydicom
import pytest
from test_volumes import AFFINE, scan

from fairdiff_lightning.data.dicom_series import read_series, write_series
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.volumes import AIR, crop_or_pad, read_volume, write_volume


def write_ct(folder, volume):
    """The slices of a volume in RAS order as a scanner writes them, with pydicom alone: 12 bits, offset -1024."""
    folder.mkdir()
    rows = (volume.array[::-1, ::-1].transpose(1, 0, 2) + 1024).astype(np.uint16)  # down is back, right is left
    corner = volume.affine @ [volume.shape[0] - 1, volume.shape[1] - 1, 0, 1]
    for k in np.random.default_rng(0).permutation(volume.shape[2]):
        slice_ = pydicom.Dataset()
        slice_.file_meta = pydicom.dataset.FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        slice_.SOPClassUID, slice_.SOPInstanceUID = pydicom.uid.CTImageStorage, f"1.2.{k + 1}"
        slice_.SeriesInstanceUID, slice_.StudyInstanceUID, slice_.Modality = "1.9", "1.8", "CT"
        slice_.PatientID, slice_.KVP = "P1", "120"
        slice_.Rows, slice_.Columns = rows.shape[:2]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PixelRepresentation = 1, "MONOCHROME2", 0
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 12, 11
        slice_.RescaleSlope, slice_.RescaleIntercept = "1", "-1024"
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.ImagePositionPatient = [-corner[0], -corner[1], corner[2] + float(k) * volume.spacing[2]]
        slice_.PixelSpacing, slice_.SliceThickness = [volume.spacing[1], volume.spacing[0]], volume.spacing[2]
        slice_.PixelData = np.ascontiguousarray(rows[..., k]).tobytes()
        slice_.save_as(folder / f"{np.random.default_rng(int(k)).integers(1 << 30)}.dcm", enforce_file_format=True)
    return folder


def test_a_dicom_series_reads_in_place_and_goes_back_with_its_headers(tmp_path):
    truth = scan()
    folder = write_ct(tmp_path / "ct", truth)
    (folder / "notes.txt").write_text("not DICOM")
    volume = read_volume(folder)
    assert np.array_equal(volume.array, truth.array)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    changed = volume.array.copy()
    changed[2, 3, 1], changed[0, 0, 0] = 333.4, 5000
    again = read_volume(write_volume(tmp_path / "new", volume.with_array(changed)))
    assert (again.array[2, 3, 1], again.array[0, 0, 0]) == (333, 4095 - 1024)
    changed[2, 3, 1], changed[0, 0, 0] = again.array[2, 3, 1], again.array[0, 0, 0]
    assert np.array_equal(again.array, changed)
    np.testing.assert_allclose(again.affine, AFFINE, atol=1e-6)
    header = again.native.slices[0]
    assert (header.PatientID, header.KVP, header.ImageType[0]) == ("P1", 120, "DERIVED")
    assert header.SeriesInstanceUID != "1.9"
    with pytest.raises(FileExistsError, match="of its own"):
        write_series(tmp_path / "new", volume)
    with pytest.raises(ValueError, match="paste it back"):
        write_series(tmp_path / "part", crop_or_pad(volume, (3, 3, 3), fill=AIR))


def test_a_volume_from_no_file_becomes_a_ct_series(tmp_path):
    truth = scan()
    again = read_volume(write_volume(tmp_path / "new", truth))
    assert np.array_equal(again.array, truth.array)
    np.testing.assert_allclose(again.affine, AFFINE, atol=1e-5)
    path = write_volume(tmp_path / "v.nii.gz", again)
    assert np.array_equal(read_volume(path).array, truth.array)


def change(folder, number, **tags):
    paths = sorted(folder.iterdir(), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])
    header = pydicom.dcmread(paths[number])
    for name, value in tags.items():
        setattr(header, name, value)
    header.save_as(paths[number])
    return paths[number]


def test_broken_series_say_what_is_wrong(tmp_path):
    truth = scan(shape=(5, 7, 6))
    folder = write_ct(tmp_path / "gap", truth)
    change(folder, 2).unlink()
    with pytest.raises(InvalidSampleError, match=r"5.000 mm between slices 1 and 2, 2.500 mm between others"):
        read_series(folder)
    folder = write_ct(tmp_path / "twin", truth)
    place = pydicom.dcmread(change(folder, 3)).ImagePositionPatient
    change(folder, 4, ImagePositionPatient=place)
    with pytest.raises(InvalidSampleError, match="slices 3 and 4 at one place"):
        read_series(folder)
    folder = write_ct(tmp_path / "mixed", truth)
    change(folder, 0, SeriesInstanceUID="1.7")
    with pytest.raises(InvalidSampleError, match=r"2 series.*'1.9': 5"):
        read_series(folder)
    assert read_series(folder, series="1.9").shape == (5, 7, 5)
    folder = write_ct(tmp_path / "turned", truth)
    change(folder, 0, ImageOrientationPatient=[1, 0, 0, 0, -1, 0])
    with pytest.raises(InvalidSampleError, match="ImageOrientationPatient"):
        read_series(folder)
    folder = write_ct(tmp_path / "tilted", truth)
    for k in range(6):
        place = pydicom.dcmread(change(folder, k)).ImagePositionPatient
        change(folder, k, ImagePositionPatient=[place[0], place[1] + k, place[2]])
    with pytest.raises(InvalidSampleError, match="tilted gantry"):
        read_series(folder)
    folder = write_ct(tmp_path / "moved", truth)
    for k in (2, 3):
        place = pydicom.dcmread(change(folder, k)).ImagePositionPatient
        change(folder, k, ImagePositionPatient=[place[0] + 40, place[1], place[2]])
    with pytest.raises(
        InvalidSampleError, match=r"moved: slice 2 at \[.*\] mm, 40.000 mm beside the line of the others"
    ):
        read_series(folder)
    folder = write_ct(tmp_path / "frames", truth)
    change(folder, 1, FrameOfReferenceUID="1.1")
    assert read_series(folder).shape == truth.shape, "the others do not say their own"
    change(folder, 4, FrameOfReferenceUID="1.2")
    with pytest.raises(InvalidSampleError, match=r"FrameOfReferenceUID '1.[12]' in \d+.dcm and '1.[12]' in \d+.dcm"):
        read_series(folder)
    folder = write_ct(tmp_path / "patients", truth)
    change(folder, 1, PatientID="P2")
    with pytest.raises(InvalidSampleError, match=r"PatientID 'P[12]' in \d+.dcm and 'P[12]' in \d+.dcm. .*one patient"):
        read_series(folder)
    folder = write_ct(tmp_path / "damaged", truth)
    (folder / "x.dcm").write_bytes(b"no DICOM at all")
    with pytest.raises(InvalidSampleError, match=r"x.dcm: unreadable"):
        read_series(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidSampleError, match="0 series"):
        read_series(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("PixelSpacing", [-1.5, 1.5], r"PixelSpacing \[-1.5, 1.5\]"),
        ("PixelSpacing", [1.5, 0], r"PixelSpacing \[1.5, 0.0\]"),
        ("SliceThickness", -3, "SliceThickness -3"),
    ],
)
def test_slices_have_sizes_above_zero(tmp_path, name, value, found):
    folder = write_ct(tmp_path / "ct", scan())
    paths = [change(folder, k, **{name: value}) for k in range(4)]
    with pytest.raises(InvalidSampleError, match=rf"\d+.dcm: {found}. Expected .* above 0"):
        read_series(folder)
    for path in paths[1:]:
        path.unlink()
    with pytest.raises(InvalidSampleError, match=found):
        read_series(folder)


def test_a_slice_that_lies_alone_has_a_thickness(tmp_path):
    folder = write_ct(tmp_path / "ct", scan(shape=(5, 7, 1)))
    assert read_series(folder).spacing[2] == pytest.approx(2.5)
    change(folder, 0, SpacingBetweenSlices=4)
    assert read_series(folder).spacing[2] == pytest.approx(4)
    change(folder, 0, SpacingBetweenSlices=-4)
    with pytest.raises(InvalidSampleError, match="SpacingBetweenSlices -4"):
        read_series(folder)
    change(folder, 0, SpacingBetweenSlices=None, SliceThickness=0)
    with pytest.raises(InvalidSampleError, match="one slice without SliceThickness"):
        read_series(folder)


def test_what_a_radiotherapy_export_holds_beside_its_scan_is_passed_over(tmp_path):
    truth = scan()
    folder = write_ct(tmp_path / "export", truth)
    kinds = {
        "RTDOSE": pydicom.uid.RTDoseStorage,
        "RTIMAGE": pydicom.uid.RTImageStorage,
        "SEG": pydicom.uid.SegmentationStorage,
        "RTSTRUCT": pydicom.uid.RTStructureSetStorage,
        "RTPLAN": pydicom.uid.RTPlanStorage,
        "PR": pydicom.uid.GrayscaleSoftcopyPresentationStateStorage,
    }
    for kind, storage in kinds.items():
        header = pydicom.dcmread(next(folder.glob("[0-9]*.dcm")))
        header.SOPClassUID, header.Modality, header.SeriesInstanceUID = storage, kind, f"1.3.{len(kind)}"
        if kind == "RTDOSE":  # the only one of them that lies where slices do
            header.NumberOfFrames = 2
            header.PixelData *= 2
        else:
            del header.ImagePositionPatient
        if kind in ("RTSTRUCT", "RTPLAN", "PR"):
            del header.Rows, header.Columns, header.PixelData
        header.save_as(folder / f"{kind}.dcm")
    assert np.array_equal(read_volume(folder).array, truth.array)
    for path in folder.glob("[0-9]*.dcm"):
        path.unlink()
    with pytest.raises(InvalidSampleError, match="0 series"):
        read_series(folder)


def thinned(folder, every, **tags):
    """A scan of 2.5 mm of which every so many slices are left, numbered as in the scanner from 1 on."""
    write_ct(folder, scan(shape=(5, 7, 12)))
    paths = [change(folder, k, InstanceNumber=12 - k, **tags) for k in range(12)]
    for k, path in enumerate(paths):
        if k % every:
            path.unlink()
    return folder


@pytest.mark.parametrize("moved", [0, 3, 5])
@pytest.mark.parametrize("share", [0.08, 0.15])
def test_slices_may_lie_beside_each_other_by_a_tenth_of_a_pixel(tmp_path, moved, share):
    truth = scan(shape=(5, 7, 6))
    folder = write_ct(tmp_path / "ct", truth)
    place = pydicom.dcmread(change(folder, moved)).ImagePositionPatient
    beside = share * min(truth.spacing[:2])
    change(folder, moved, ImagePositionPatient=[place[0], place[1] + beside, place[2]])
    if share < 0.1:
        assert read_series(folder).shape == truth.shape
        return
    with pytest.raises(InvalidSampleError, match=rf"slice {moved} at .* {beside:.3f} mm beside the line"):
        read_series(folder)


def test_a_gap_of_whole_slices_is_warned_of_where_nothing_is_numbered(tmp_path):
    folder = thinned(tmp_path / "half", 2)
    for k in range(6):
        change(folder, k, InstanceNumber=None)
    with pytest.warns(UserWarning, match=r"half: slices lie 5.000 mm apart, .*SliceThickness is 2.5 mm"):
        assert read_series(folder).spacing[2] == pytest.approx(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(6):
            change(folder, k, SpacingBetweenSlices=5)
        assert read_series(folder).spacing[2] == pytest.approx(5), "the header says so itself"
        for k in range(6):
            change(folder, k, SpacingBetweenSlices=None, SliceThickness=3.2)
        assert read_series(folder).spacing[2] == pytest.approx(5), "no whole number of slices between"


@pytest.mark.parametrize("tags", [{}, {"SliceThickness": 1, "SpacingBetweenSlices": 2.5}])
def test_evenly_missing_slices_are_missed(tmp_path, tags):
    assert read_series(thinned(tmp_path / "whole", 1, **tags)).shape == (5, 7, 12)
    for every in (2, 3):
        message = rf"slices {2.5 * every:.3f} mm apart for a \w+ of 2.5 mm.*count by {every}"
        with pytest.raises(InvalidSampleError, match=message):
            read_series(thinned(tmp_path / f"every{every}", every, **tags))


def test_slices_with_space_between_them_are_a_scan(tmp_path):
    folder = thinned(tmp_path / "lung", 2)
    for k in range(6):
        change(folder, k, InstanceNumber=k + 1)
    with pytest.warns(UserWarning, match=r"SliceThickness is 2.5 mm"):
        assert read_series(folder).spacing[2] == pytest.approx(5), "thin slices of a lung, numbered one after another"
    echoes = thinned(tmp_path / "echoes", 2)
    for k in range(6):
        change(echoes, k, SliceThickness=4.5)
    assert read_series(echoes).spacing[2] == pytest.approx(5), "numbers that count something else too"
    for k in range(6):
        change(folder, k, SpacingBetweenSlices=0.5)
    with pytest.warns(UserWarning, match=r"lung: slices lie 5.000 mm apart.*SpacingBetweenSlices is 0.5 mm"):
        assert read_series(folder).spacing[2] == pytest.approx(5)


def test_real_dicom_reads_as_the_nifti_of_the_same_scan(realdata, tmp_path):
    root = realdata / "IBSI" / "ibsi_validation"
    series = read_volume(root / "dicom" / "STS_002" / "PET" / "image")
    nifti = read_volume(root / "nifti" / "STS_002" / "PET_image.nii.gz")
    np.testing.assert_allclose(series.affine, nifti.affine, atol=0.03)
    assert np.ndim(series.native.slope) == 1
    np.testing.assert_allclose(series.array, nifti.array, atol=1e-4)
    again = read_volume(write_volume(tmp_path / "series", series))
    assert np.array_equal(again.array, series.array)
    np.testing.assert_allclose(again.affine, series.affine, atol=1e-6)
