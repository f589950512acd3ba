import nibabel as nib
import numpy as np
import pytest
import torch

from fairdiff_lightning.data import Emidec, GenerationPlan, LIDCDataModule
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.frames import VolumeFrame
from fairdiff_lightning.data.lidc import LIDC
from fairdiff_lightning.data.native import Record
from fairdiff_lightning.data.phantoms_3d import chest
from fairdiff_lightning.data.requests import Request
from fairdiff_lightning.data.scan_list import list_scans
from fairdiff_lightning.data.scans import LesionReader, place_in_scan, read_room
from fairdiff_lightning.data.volumes import Volume, write_volume

PLACED = np.array([[1.5, 0, 0, -40.0], [0, 1.4, 0, 25.0], [0, 0, 8, 60.0], [0, 0, 0, 1]])


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.mark.parametrize("below", [".", "LIDC-IDRI-0020", "LIDC-IDRI-0020/series", "LIDC-IDRI-0020/series/ct.nii.gz"])
def test_a_scan_is_of_its_patient_wherever_the_folder_begins(tmp_path, below):
    touch(tmp_path / "LIDC-IDRI-0020" / "series" / "ct.nii.gz")
    (scan,) = list_scans(tmp_path / below)
    assert scan.unit == LIDC().case_key(scan.id) == "LIDC-IDRI-0020"
    assert scan.id.endswith("ct")


def test_the_last_patient_that_a_path_names_is_meant_and_links_are_followed(tmp_path):
    touch(tmp_path / "LIDC-IDRI-0001-to-0100" / "LIDC-IDRI-0020" / "a_CVol_1.nii.gz")
    (tmp_path / "picked").mkdir()
    (tmp_path / "picked" / "one.nii.gz").symlink_to(next(tmp_path.rglob("a_CVol_1.nii.gz")))
    for folder in (tmp_path / "LIDC-IDRI-0001-to-0100", tmp_path / "picked"):
        (scan,) = list_scans(folder)
        assert scan.unit == LIDC().case_key(scan.id) == "LIDC-IDRI-0020"


@pytest.mark.parametrize("below", ["", "01-01-2000", "01-01-2000/scan.nii.gz"])
def test_no_folder_of_a_held_out_patient_gives_backgrounds(tmp_path, below):
    plain = LIDCDataModule(cache="none")
    plain.prepare_data()
    plain.setup()
    held_out = sorted({record.unit for record in plain.splits["test"]})[0]
    touch(tmp_path / held_out / "01-01-2000" / "scan.nii.gz")
    plan = GenerationPlan(total=1, masks="train", backgrounds=str(tmp_path / held_out / below))
    data = LIDCDataModule(cache="none", generate=plan)
    data.prepare_data()
    data.setup()
    with pytest.raises(ValueError, match="case is not held out"):
        data.requests()


def test_series_are_found_by_what_their_files_are(tmp_path):
    image = Volume(np.full((6, 5, 4), -700, np.int16), np.diag([1.0, 1, 2, 1]))
    for name in ("named", "unnamed", "capital"):
        write_volume(tmp_path / name, image)
    for k, path in enumerate(sorted((tmp_path / "unnamed").iterdir())):
        path.rename(path.with_name(f"1.2.840.{k}"))
    for path in sorted((tmp_path / "capital").iterdir()):
        path.rename(path.with_suffix(".DCM"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no scan")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    found = list_scans(tmp_path)
    assert [scan.id for scan in found] == ["capital", "named", "unnamed"]
    for scan in found:
        assert np.array_equal(LIDC().read_scan(scan.files["scan"]).array, image.array)


@pytest.mark.parametrize("names", [("a/b.nii.gz", "a-b.nii.gz"), ("ct.nii", "ct.nii.gz")])
def test_two_scans_of_one_id_are_refused(tmp_path, names):
    touch(*(tmp_path / name for name in names))
    with pytest.raises(InvalidSampleError, match=r"the id '.*', as of '") as error:
        list_scans(tmp_path)
    assert all(str(tmp_path / name) in str(error.value) for name in names)


def test_a_folder_without_scans_says_what_it_looked_for(tmp_path):
    touch(tmp_path / "scan.mha")
    with pytest.raises(InvalidSampleError, match="no scan"):
        list_scans(tmp_path)


def test_a_lesion_of_two_parts_goes_into_one_block(tmp_path):
    """The block lies about both parts: about the larger one alone it would cut the smaller one off."""
    image = chest(np.random.default_rng(0), nodules=0).image
    write_volume(tmp_path / "scan.nii.gz", image)
    parts = np.zeros((12, 4, 4), np.uint8)
    parts[:5], parts[10:] = 1, 1
    step = np.abs(LIDC().read_scan(str(tmp_path / "scan.nii.gz")).reoriented(LIDC.axes).spacing)
    scan = Record("scan", {"scan": str(tmp_path / "scan.nii.gz")}, {}, "scan")
    lesion, found = Volume(parts, np.diag([*step, 1.0])), read_room(scan, LIDC())
    block, mask = place_in_scan(*found, lesion, (14, 8, 8), 0, LIDC.window)
    assert block.shape == mask.shape == (14, 8, 8)
    assert mask.array.sum() == parts.sum()
    with pytest.raises(InvalidSampleError, match="one that fits into the block"):
        place_in_scan(*found, lesion, (11, 8, 8), 0, LIDC.window)


def heart(root, affine=PLACED, shape=(20, 18, 6)):
    """A normal heart with contours on a grid of their own; the only voxel of its wall is (9, 8, 3)."""
    image, contours = np.random.default_rng(0).random((20, 18, 6)).astype(np.float32), np.zeros(shape, np.uint8)
    contours[9, 8, 3] = 2
    for folder, array, place in (("images", image, PLACED), ("labels", contours, affine)):
        path = root / "Normal" / folder / "Case_N001.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, place), path)
    (record,) = Emidec().backgrounds(root)
    return record


def read(condition, background, size=(12, 11, 4)):
    return LesionReader(Emidec(), VolumeFrame(size))(Request("x", 0, 0, 0, condition, background))


def wall(found):
    """Where in the patient the wall lies, mm."""
    (at,) = found["mask"][0].nonzero().double()
    return (found["affine"] @ torch.cat([at, torch.ones(1, dtype=torch.float64)]))[:3].numpy()


def test_own_contours_lie_on_the_grid_of_their_image(tmp_path):
    record = heart(tmp_path / "right")
    np.testing.assert_allclose(wall(read(record, record)), (PLACED @ (9, 8, 3, 1))[:3])
    moved = PLACED.copy()
    moved[0, 3] += 6
    shifted, larger = heart(tmp_path / "moved", affine=moved), heart(tmp_path / "larger", shape=(28, 18, 6))
    with pytest.raises(InvalidSampleError, match=r"labels/Case_N001.nii.gz: image and mask lie up to 6 mm off"):
        read(shifted, shifted)
    with pytest.raises(InvalidSampleError, match=r"mask of \(28, 18, 6\) voxels for an image of \(20, 18, 6\)"):
        read(larger, larger)


def test_masks_made_for_a_scan_lie_where_they_were_made(tmp_path):
    """A mask of a smaller block, which is not in the middle of the larger one, is put there by its affine."""
    background, affine, mask = heart(tmp_path), PLACED.copy(), np.zeros((8, 8, 4), np.uint8)
    affine[:3, 3] += PLACED[:3, :3] @ (7, 5, 1)
    mask[2, 3, 2] = 3
    files = {"mask": str(Emidec().write_mask(tmp_path / "made", "m", mask, affine))}
    made = Record("m", files, {}, "m", synthetic=True, source=background.id)
    np.testing.assert_allclose(wall(read(made, background)), (PLACED @ (9, 8, 3, 1))[:3], atol=1e-4)
    Emidec().write_mask(tmp_path / "made", "m", mask, affine @ np.diag([1.1, 1, 1, 1]))
    with pytest.raises(InvalidSampleError, match="the grid of 'Case_N001', which it belongs to"):
        read(made, background)
