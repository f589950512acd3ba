import highdicom
import numpy as np
import pydicom
import pytest
from test_rtstruct import CUTS, FRAME, NAMES, SIZE, SPACING, lesions, on_slices, write_rtstruct, write_scan

from fairdiff_lightning.data.dicom_seg import read_segmentation, write_segmentation
from fairdiff_lightning.data.dicom_series import read_series
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.volumes import RAS, Volume, crop_or_pad, read_volume


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return read_series(write_scan(tmp_path_factory.mktemp("scan") / "ct"))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("axes", [RAS, None])
def test_written_segmentations_read_back(tmp_path, cut, axes):
    scan = read_series(write_scan(tmp_path / "ct", cut), axes)
    truth = lesions(scan)
    path = write_segmentation(tmp_path / "seg.dcm", truth, scan, NAMES)
    mask = read_segmentation(path, scan)
    assert mask.array.dtype == np.uint8
    assert np.array_equal(on_slices(mask, scan), truth.array)
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-9)
    other = highdicom.seg.segread(path).get_volume(combine_segments=True)
    other = Volume(other.array, np.diag([-1.0, -1, 1, 1]) @ other.affine).reoriented(scan.axes)
    np.testing.assert_allclose(other.affine, scan.affine, atol=1e-6)
    assert np.array_equal(other.array, mask.array)


def test_a_segmentation_tells_its_patient_and_slices(image, tmp_path):
    found = pydicom.dcmread(write_segmentation(tmp_path / "seg.dcm", lesions(image), image, NAMES))
    assert (found.PatientName, found.PatientID, found.PatientSex) == ("Müller^Jörg", "P1", "U")
    assert (found.StudyInstanceUID, found.FrameOfReferenceUID, found.Modality) == ("1.2.826.1.8", FRAME, "SEG")
    assert (found.SegmentationType, found.ContentDate, found.BitsStored) == ("BINARY", "20240103", 1)
    assert [segment.SegmentLabel for segment in found.SegmentSequence] == list(NAMES.values())
    places = {header.SOPInstanceUID: header.ImagePositionPatient for header in image.native.slices}
    assert found.NumberOfFrames == 3 + 2  # class 1 on three slices, class 2 on two
    for groups in found.PerFrameFunctionalGroupsSequence:
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert groups.PlanePositionSequence[0].ImagePositionPatient == places[source]
    measures = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert [*measures.PixelSpacing, measures.SpacingBetweenSlices] == pytest.approx(SPACING)


def test_the_same_mask_gives_the_same_bytes(image, tmp_path):
    mask = lesions(image)
    one, two = (write_segmentation(tmp_path / name, mask, image, NAMES) for name in ("one.dcm", "two.dcm"))
    assert one.read_bytes() == two.read_bytes()
    first = pydicom.dcmread(one).SOPInstanceUID
    write_segmentation(one, mask, image, {1: "tumour", 2: "nodes"})
    assert pydicom.dcmread(one).SOPInstanceUID != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.dcm", "two.dcm"]


def test_a_series_that_says_the_least_can_be_segmented(tmp_path):
    unknown = ("PatientName", "PatientID", "PatientSex", "StudyDate", "StudyTime", "SeriesDate", "SeriesTime")
    scan = read_series(write_scan(tmp_path / "ct", **dict.fromkeys((*unknown, "SeriesNumber", "SpecificCharacterSet"))))
    path = write_segmentation(tmp_path / "seg.dcm", lesions(scan), scan, NAMES)
    assert np.array_equal(on_slices(read_segmentation(path, scan), scan), lesions(scan).array)
    assert pydicom.dcmread(path).PatientID in ("", None)


def test_an_empty_mask_is_kept_as_such(image, tmp_path):
    empty = lesions(image).with_array(np.zeros(SIZE, np.uint8))
    path = write_segmentation(tmp_path / "seg.dcm", empty, image, NAMES)
    assert not read_segmentation(path, image).array.any()
    assert len(pydicom.dcmread(path).SegmentSequence) == 2


def test_the_mask_of_a_real_series_reads_back(realdata, tmp_path):
    root = realdata / "IBSI" / "ibsi_validation"
    scan = read_series(root / "dicom" / "STS_002" / "PET" / "image")
    truth = read_volume(root / "nifti" / "STS_002" / "PET_mask.nii.gz")
    path = write_segmentation(tmp_path / "seg.dcm", scan.with_array(truth.array), scan, {1: "GTV"})
    assert np.array_equal(read_segmentation(path, scan).array, truth.array)


def overlapping(found):
    found.PerFrameFunctionalGroupsSequence[1].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 2
    place = found.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    for groups in found.PerFrameFunctionalGroupsSequence:
        groups.PlanePositionSequence = place


def shifted(found):
    for groups in found.PerFrameFunctionalGroupsSequence:
        place = groups.PlanePositionSequence[0]
        place.ImagePositionPatient = [place.ImagePositionPatient[0] + 0.5, *place.ImagePositionPatient[1:]]


def beyond(found):
    for groups in found.PerFrameFunctionalGroupsSequence:
        place = groups.PlanePositionSequence[0]
        place.ImagePositionPatient = [*place.ImagePositionPatient[:2], place.ImagePositionPatient[2] + 6]


def turned(found):
    found.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [0, 1, 0, 1, 0, 0]


def placeless(found):
    del found.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda found: setattr(found, "SegmentationType", "FRACTIONAL"),
            "SegmentationType FRACTIONAL. Expected BINARY",
        ),
        (lambda found: setattr(found, "FrameOfReferenceUID", "1.2.3"), f"frame of reference 1.2.3. Expected {FRAME}"),
        (overlapping, r"segments \[\d\] and \d overlap in slice"),
        (shifted, r"on slices 0 to 4, 0.333 voxels off"),
        (beyond, r"on slices 2 to 6"),
        (turned, r"voxels off.*on the pixels of the image, \(14, 11\)"),
        (lambda found: setattr(found, "PixelData", found.PixelData[:20]), "pixels unreadable .*fetch it again"),
        (placeless, "no PlanePositionSequence for frame 1"),
        (lambda found: setattr(found, "SOPClassUID", pydicom.uid.CTImageStorage), r"Expected a DICOM segmentation"),
    ],
)
def test_bad_segmentations_say_what_is_wrong(image, tmp_path, change, match):
    path = write_segmentation(tmp_path / "seg.dcm", lesions(image), image, NAMES)
    found = pydicom.dcmread(path)
    change(found)
    found.save_as(path)
    with pytest.raises(InvalidSampleError, match=rf"seg\.dcm: .*{match}"):
        read_segmentation(path, image)


def test_other_files_are_no_segmentations(image, tmp_path):
    path = write_rtstruct(tmp_path / "rs.dcm", {})
    with pytest.raises(InvalidSampleError, match=r"rs.dcm: a DICOM object of modality RTSTRUCT. Expected .* \(SEG\)"):
        read_segmentation(path, image)


def test_what_cannot_be_written_says_why(image, tmp_path):
    mask, path = lesions(image), tmp_path / "seg.dcm"
    for other, names, match in [
        (Volume(image.array, image.affine), NAMES, "comes from no DICOM series"),
        (crop_or_pad(image, (5, 5, 5), 0), NAMES, "with the headers of"),
        (image, {1: "GTV"}, r"classes \[2\] without a name"),
    ]:
        with pytest.raises(InvalidSampleError, match=rf"seg.dcm: .*{match}"):
            write_segmentation(path, mask, other, names)
    with pytest.raises(ValueError, match=r"names of the classes \[1, 2, 4\]; expected 1, 2, ..."):
        write_segmentation(path, mask, image, {**NAMES, 4: "heart"})
    with pytest.raises(InvalidSampleError, match=r"seg.dcm: mask of \(5, 5, 5\)"):
        write_segmentation(path, crop_or_pad(mask, (5, 5, 5), 0), image, NAMES)
    assert not path.exists()
