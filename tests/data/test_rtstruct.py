import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from fairdiff_lightning.data.dicom_series import read_series
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.rtstruct import read_structures, structure_names, write_structures
from fairdiff_lightning.data.volumes import RAS, Volume, crop_or_pad, read_volume

SIZE = (14, 11, 5)
"""Rows, columns, slices."""
TURN = np.deg2rad(20)
CUTS = {
    "axial": ([1, 0, 0], [0, 1, 0]),
    "prone": ([-1, 0, 0], [0, -1, 0]),
    "sagittal": ([0, 1, 0], [0, 0, -1]),
    "coronal": ([1, 0, 0], [0, 0, -1]),
    "oblique": ([np.cos(TURN), np.sin(TURN), 0], [0, 0, -1]),
}
SPACING = (0.8, 1.5, 3.0)
"""Of rows, of columns, of slices, mm."""
CORNER = np.array([-31.25, 12.5, -400.0])
FRAME = "1.2.826.1.7"


def write_scan(folder, cut="axial", **tags):
    """A CT as a scanner writes it, with pydicom alone; ``tags`` replace or (None) remove."""
    folder.mkdir()
    along_row, along_column = np.array(CUTS[cut], float)
    through = np.cross(along_row, along_column)
    for k in range(SIZE[2]):
        slice_ = pydicom.Dataset()
        slice_.file_meta = pydicom.dataset.FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        slice_.SOPClassUID, slice_.SOPInstanceUID = pydicom.uid.CTImageStorage, f"1.2.826.1.{100 + k}"
        slice_.SeriesInstanceUID, slice_.StudyInstanceUID, slice_.Modality = "1.2.826.1.9", "1.2.826.1.8", "CT"
        slice_.FrameOfReferenceUID, slice_.SeriesNumber = FRAME, 3
        slice_.SpecificCharacterSet = "ISO_IR 100"
        slice_.PatientName, slice_.PatientID, slice_.PatientSex = "Müller^Jörg", "P1", "U"
        slice_.StudyDate, slice_.StudyTime, slice_.SeriesDate, slice_.SeriesTime = (
            "20240102",
            "1000",
            "20240103",
            "1234",
        )
        slice_.Rows, slice_.Columns = SIZE[:2]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PixelRepresentation = 1, "MONOCHROME2", 1
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 16, 15
        slice_.ImageOrientationPatient = [f"{value:.12f}" for value in (*along_row, *along_column)]
        slice_.ImagePositionPatient = [f"{value:.10f}" for value in CORNER + k * SPACING[2] * through]
        slice_.PixelSpacing, slice_.SliceThickness = list(SPACING[:2]), SPACING[2]
        slice_.PixelData = np.zeros(SIZE[:2], np.int16).tobytes()
        for name, value in tags.items():
            delattr(slice_, name) if value is None else setattr(slice_, name, value)
        slice_.save_as(folder / f"{k}.dcm", enforce_file_format=True)
    return folder


def lesions(image):
    """Classes 1 (a shell around a hole with an island, and a lesion apart) and 2 (at the border) in a series."""
    array = np.zeros(SIZE, np.uint8)
    array[1:10, 1:8, 1:4] = 1
    array[2:9, 2:6, 2] = 0
    array[4:6, 3:5, 2] = 1
    array[3, 6, 1:4] = 0
    array[8, 3, 3] = 0
    array[11, 9, 2] = array[12, 10, 2] = 1
    array[12:, :4, 4] = 2
    array[0, 10, 0] = 2
    return Volume(array, image.reoriented(image.native.axes).affine)


NAMES = {1: "GTV primär", 2: "GTV nodes"}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return read_series(write_scan(tmp_path_factory.mktemp("scan") / "ct"))


def in_mm(row, column, depth):
    """Patient coordinates of a voxel of the axial scan, by hand."""
    return np.stack(np.broadcast_arrays(CORNER[0] + column * 1.5, CORNER[1] + row * 0.8, CORNER[2] + depth * 3), -1)


def write_rtstruct(path, structures, frame=FRAME, **tags):
    """A structure set with pydicom alone: name -> [(type, points (N, 3) in mm), ...]."""
    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    found.SOPClassUID, found.SOPInstanceUID = pydicom.uid.RTStructureSetStorage, "1.2.826.2"
    found.Modality = "RTSTRUCT"
    found.StructureSetROISequence, found.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(structures.items(), start=7):
        roi, drawn = pydicom.Dataset(), pydicom.Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, frame
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for kind, points in contours:
            contour = pydicom.Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
            contour.ContourData = [f"{value:.5f}" for value in np.ravel(points)]
            drawn.ContourSequence.append(contour)
        found.StructureSetROISequence.append(roi)
        found.ROIContourSequence.append(drawn)
    for name, value in tags.items():
        setattr(found, name, value)
    found.save_as(path, enforce_file_format=True)
    return path


def ellipse(row, column, height, width, depth):
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    return in_mm(row + height * np.cos(angle), column + width * np.sin(angle), depth)


def in_ellipse(row, column, height, width):
    rows, columns = np.indices(SIZE[:2])
    return ((rows - row) / height) ** 2 + ((columns - column) / width) ** 2 < 1


def on_slices(mask, image):
    return mask.reoriented(image.native.axes).array


def closed(*rings, kind="CLOSED_PLANAR"):
    return [(kind, ring) for ring in rings]


def test_the_real_structure_is_the_mask_of_its_nifti_and_goes_back(realdata, tmp_path):
    root = realdata / "IBSI" / "ibsi_validation"
    scan = read_series(root / "dicom" / "STS_002" / "PET" / "image")
    path = root / "dicom" / "STS_002" / "PET" / "mask" / "RS.dcm"
    truth = read_volume(root / "nifti" / "STS_002" / "PET_mask.nii.gz")
    assert structure_names(path) == ["GTV_Mass_PET"]
    mask = read_structures(path, scan, ["gtv_.*"])
    assert mask.array.dtype == np.uint8
    assert np.array_equal(mask.array, truth.array)
    np.testing.assert_allclose(mask.affine, truth.affine, atol=0.03)
    again = write_structures(tmp_path / "rs.dcm", mask, scan, {1: "GTV"})
    assert np.array_equal(read_structures(again, scan, ["GTV"]).array, truth.array)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("axes", [RAS, None])
def test_written_structures_read_back(tmp_path, cut, axes):
    scan = read_series(write_scan(tmp_path / "ct", cut), axes)
    truth = lesions(scan)
    path = write_structures(tmp_path / "rs.dcm", truth, scan, NAMES)
    assert structure_names(path) == list(NAMES.values())
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["rs.dcm"]
    for patterns, expected in [
        (["gtv PRIMÄR"], truth.array == 1),
        ([r".*nodes"], truth.array == 2),
        (["no such", "GTV.*"], truth.array > 0),
    ]:
        mask = read_structures(path, scan, patterns)
        np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-9)
        assert np.array_equal(on_slices(mask, scan), expected)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0.05, 0.95))
def test_any_mask_reads_back(image, tmp_path_factory, seed, density):
    array = (np.random.default_rng(seed).random(SIZE) < density).astype(np.uint8)
    array[3, 3, 3] = 1
    truth = Volume(array, image.reoriented(image.native.axes).affine)
    path = write_structures(tmp_path_factory.mktemp("any") / "rs.dcm", truth, image, {1: "GTV"})
    assert np.array_equal(on_slices(read_structures(path, image, ["GTV"]), image), array)


def test_contours_are_the_mask_for_readers_without_holes_too(image, tmp_path):
    truth = lesions(image)
    structures = pydicom.dcmread(write_structures(tmp_path / "rs.dcm", truth, image, NAMES))
    pixels = np.indices(SIZE[:2]).reshape(2, -1).T
    found, places = np.zeros(SIZE, np.uint8), {header.SOPInstanceUID: header for header in image.native.slices}
    for drawn in structures.ROIContourSequence:
        for contour in drawn.ContourSequence:
            header = places[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            assert len(points) == contour.NumberOfContourPoints
            np.testing.assert_allclose(points[:, 2], header.ImagePositionPatient[2], atol=1e-4)
            ring = (points - CORNER)[:, [1, 0]] / SPACING[:2]
            inside = Outline(ring).contains_points(pixels).reshape(SIZE[:2])
            k = round((points[0, 2] - CORNER[2]) / SPACING[2])
            assert not (found[..., k] & inside).any()
            found[..., k][inside] = drawn.ReferencedROINumber
    assert np.array_equal(found, truth.array)


def test_a_structure_set_tells_its_patient_and_series(image, tmp_path):
    found = pydicom.dcmread(write_structures(tmp_path / "rs.dcm", lesions(image), image, NAMES))
    assert (found.PatientName, found.PatientID, found.PatientSex) == ("Müller^Jörg", "P1", "U")
    assert (found.StudyInstanceUID, found.FrameOfReferenceUID, found.Modality) == ("1.2.826.1.8", FRAME, "RTSTRUCT")
    assert (found.StructureSetDate, found.StructureSetTime) == ("20240103", "1234")
    assert found.ApprovalStatus == "UNAPPROVED"
    study = found.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    series = study.RTReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == "1.2.826.1.9" != found.SeriesInstanceUID
    uids = [item.ReferencedSOPInstanceUID for item in series.ContourImageSequence]
    assert uids == [f"1.2.826.1.{100 + k}" for k in range(SIZE[2])]


def test_the_same_mask_gives_the_same_bytes(image, tmp_path):
    mask = lesions(image)
    one, two = (write_structures(tmp_path / name, mask, image, NAMES) for name in ("one.dcm", "two.dcm"))
    assert one.read_bytes() == two.read_bytes()
    first = pydicom.dcmread(one).SOPInstanceUID
    array = mask.array.copy()
    array[0, 0, 0] = 1
    write_structures(one, mask.with_array(array), image, NAMES)
    assert pydicom.dcmread(one).SOPInstanceUID != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.dcm", "two.dcm"]


def test_a_class_that_was_not_found_is_a_structure_without_contours(image, tmp_path):
    empty = lesions(image).with_array(np.zeros(SIZE, np.uint8))
    path = write_structures(tmp_path / "rs.dcm", empty, image, NAMES)
    assert structure_names(path) == list(NAMES.values())
    assert all("ContourSequence" not in item for item in pydicom.dcmread(path).ROIContourSequence)
    with pytest.raises(InvalidSampleError, match=r"rs.dcm: no contours for \['GTV nodes'\]"):
        read_structures(path, image, [".*nodes"])


def test_a_voxel_is_inside_when_its_centre_is(image, tmp_path):
    path = write_rtstruct(tmp_path / "rs.dcm", {" Ring ": closed(ellipse(6.3, 5.2, 5.6, 4.7, 2))})
    expected = np.zeros(SIZE, bool)
    expected[..., 2] = in_ellipse(6.3, 5.2, 5.6, 4.7)
    assert np.array_equal(on_slices(read_structures(path, image, ["ring"]), image), expected)


def test_holes_are_inner_contours_xor_or_keyholes(image, tmp_path):
    outer, inner, island = (ellipse(6.3, 5.2, h, w, 1) for h, w in ((5.6, 4.7), (4.1, 3.3), (1.4, 1.2)))
    keyhole = np.concatenate([outer, outer[:1], inner[::-1], inner[-1:]])
    structures = {
        "nested": closed(inner, outer, island),
        "xor": closed(outer, island, inner, kind="CLOSEDPLANAR_XOR"),
        "keyhole": closed(keyhole, island),
    }
    path = write_rtstruct(tmp_path / "rs.dcm", structures)
    expected = in_ellipse(6.3, 5.2, 5.6, 4.7) ^ in_ellipse(6.3, 5.2, 4.1, 3.3) ^ in_ellipse(6.3, 5.2, 1.4, 1.2)
    for name in structures:
        found = on_slices(read_structures(path, image, [name]), image)
        assert np.array_equal(found[..., 1], expected)
        assert found.sum() == expected.sum()


def test_planes_go_to_the_nearest_slice_and_structures_are_united(image, tmp_path):
    structures = {
        "GTV1": closed(ellipse(4, 4, 2.5, 2.5, 0.7), ellipse(4, 4, 3.5, 1.2, 1.4), ellipse(4, 4, 2.5, 2.5, -0.45)),
        "GTV2": closed(ellipse(5, 5, 2.5, 2.5, 1.02), ellipse(4, 4, 2.5, 2.5, 4.45)),
        "GTV3": [],
        "xGTV1": closed(ellipse(9, 9, 1.5, 1.5, 3)),
    }
    found = on_slices(read_structures(write_rtstruct(tmp_path / "rs.dcm", structures), image, [r"gtv\d"]), image)
    expected = np.zeros(SIZE, bool)
    expected[..., 0] = expected[..., 4] = in_ellipse(4, 4, 2.5, 2.5)
    expected[..., 1] = in_ellipse(4, 4, 2.5, 2.5) | in_ellipse(4, 4, 3.5, 1.2) | in_ellipse(5, 5, 2.5, 2.5)
    assert np.array_equal(found, expected)


RING = ellipse(6, 5, 2.5, 2.5, 2)


@pytest.mark.parametrize(
    ("structures", "frame", "match"),
    [
        ({"Heart": closed(RING), "Lung": []}, FRAME, r"no structure that matches \['GTV'\].*\['Heart', 'Lung'\]"),
        ({"GTV_old": closed(RING)}, FRAME, "no structure that matches"),
        ({"GTV": []}, FRAME, r"no contours for \['GTV'\]"),
        ({"GTV": closed(RING, kind="OPEN_PLANAR")}, FRAME, "GTV: a contour of type OPEN_PLANAR"),
        ({"GTV": [("POINT", RING[:1])]}, FRAME, "a contour of type POINT.*CLOSED_PLANAR"),
        ({"GTV": closed(RING)}, "1.2.3", f"frame of reference 1.2.3. Expected {FRAME}"),
        ({"GTV": closed(RING, ellipse(6, 5, 2.5, 2.5, 5))}, FRAME, "outside of the image.*5.0"),
        ({"GTV": closed(ellipse(6, 12, 2.5, 2.5, 2))}, FRAME, "outside of the image"),
        ({"GTV": closed(ellipse(6, 5, 2.5, 2.5, -7))}, FRAME, "outside of the image"),
        ({"GTV": closed(ellipse(6, 5, 2.5, 2.5, np.linspace(1, 3, 400)))}, FRAME, "a contour across 2.00 slices"),
        ({"GTV": closed(RING.ravel()[:-1])}, FRAME, "ContourData of 1199 numbers"),
    ],
)
def test_bad_structures_say_what_is_wrong(image, tmp_path, structures, frame, match):
    path = write_rtstruct(tmp_path / "rs.dcm", structures, frame)
    with pytest.raises(InvalidSampleError, match=rf"rs\.dcm.*{match}"):
        read_structures(path, image, ["GTV"])


def test_other_files_are_no_structure_sets(image, tmp_path):
    folder = write_scan(tmp_path / "ct")
    with pytest.raises(InvalidSampleError, match=r"0.dcm: a DICOM object of modality CT. Expected .* \(RTSTRUCT\)"):
        read_structures(folder / "0.dcm", image, ["GTV"])
    (tmp_path / "rs.dcm").write_bytes(b"no DICOM at all")
    with pytest.raises(InvalidSampleError, match=r"rs.dcm: unreadable"):
        structure_names(tmp_path / "rs.dcm")
    with pytest.raises(InvalidSampleError, match=r"none.dcm: unreadable"):
        structure_names(tmp_path / "none.dcm")


def test_an_image_has_to_be_a_whole_series(image, tmp_path):
    mask = lesions(image)
    path = tmp_path / "rs.dcm"
    drawn = write_rtstruct(tmp_path / "drawn.dcm", {"GTV": closed(RING)})
    for other, match in [
        (Volume(image.array, image.affine), "comes from no DICOM series"),
        (crop_or_pad(image, (5, 5, 5), 0), "with the headers of"),
        (Volume(image.array, image.affine + np.eye(4)[:, [3, 3, 3, 0]] * 5, image.native), "with the headers of"),
    ]:
        with pytest.raises(InvalidSampleError, match=rf"rs.dcm: .*{match}"):
            write_structures(path, mask, other, NAMES)
        with pytest.raises(InvalidSampleError, match=rf"drawn.dcm: .*{match}"):
            read_structures(drawn, other, ["GTV"])
    elsewhere = read_series(write_scan(tmp_path / "other"))
    elsewhere.native.slices[2].FrameOfReferenceUID = "1.2.3"
    with pytest.raises(InvalidSampleError, match=r"slices in the frames of reference \['1.2.3', "):
        write_structures(path, mask, elsewhere, NAMES)
    frameless = read_series(write_scan(tmp_path / "ct", FrameOfReferenceUID=None))
    with pytest.raises(InvalidSampleError, match="slice 0 of the image has no FrameOfReferenceUID"):
        write_structures(path, mask, frameless, NAMES)
    assert not path.exists()


def test_a_mask_has_to_lie_on_the_image_with_names_for_its_classes(image, tmp_path):
    mask, path = lesions(image), tmp_path / "rs.dcm"
    with pytest.raises(InvalidSampleError, match=r"rs.dcm: classes \[2\] without a name"):
        write_structures(path, mask, image, {1: "GTV"})
    with pytest.raises(ValueError, match="expected one for each class, by its index from 1"):
        write_structures(path, mask, image, {0: "background", 1: "GTV", 2: "nodes"})
    with pytest.raises(InvalidSampleError, match=r"rs.dcm: mask of"):
        write_structures(path, crop_or_pad(mask, (5, 5, 5), 0), image, NAMES)
    with pytest.raises(InvalidSampleError, match=r"rs.dcm: image and mask lie up to"):
        write_structures(path, Volume(mask.array, mask.affine + np.eye(4)[:, [3, 3, 3, 0]]), image, NAMES)
    assert not path.exists()
