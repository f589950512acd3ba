import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.lidc import LIDC
from fairdiff_lightning.data.phantoms_3d import TEXTURES, chest, lung_roi
from fairdiff_lightning.data.rois import extract_rois, paste_roi
from fairdiff_lightning.data.sample import validate
from fairdiff_lightning.data.splits import check_disjoint, held_out_keys, refuse_leaks, split_records
from fairdiff_lightning.data.volumes import Volume, read_volume

SIZE = (7, 9, 5)
AFFINE = np.array([[0.7, 0, 0, -12.5], [0, 0.9, 0, 31.25], [0, 0, 2.5, -400.0], [0, 0, 0, 1]])


def sample(sample_id, seed=0, **more):
    draws = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, *SIZE, dtype=torch.int64)
    mask[0, 2:5, 3:7, 1:4] = 1
    image = torch.rand(1, *SIZE, generator=draws)
    return {"image": image, "mask": mask, "attributes": {}, "id": sample_id, "affine": torch.from_numpy(AFFINE)} | more


def authors_tree(root, images=("A_Vol_1", "A_Vol_2", "B_Vol_1"), test=("B_Vol_1",)):
    """The layout as the authors ship it, written with nibabel alone: depth first, HU, mask as float."""
    for k, stem in enumerate(images):
        hu = np.arange(5 * 7 * 9, dtype=np.int16).reshape(5, 7, 9) - 900 + k
        mask = np.zeros((5, 7, 9))
        mask[1, 2, 3] = 1
        for folder, name, array in (("Image", stem, hu), ("Mask", stem.replace("Vol_", "Mask_"), mask)):
            path = root / "Pathological" / folder / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([2.0, 0.5, 0.6, 1])), path)
    if test is not None:
        (root / "Pathological" / "test.txt").write_text("\n".join(test))
    return root


def test_the_authors_tree_reads_depth_last_and_in_its_split(tmp_path):
    data = LIDC()
    index = data.index(authors_tree(tmp_path, test=("B_Vol_1", "Z_Vol_9")))
    assert [(r.id, r.unit, r.split) for r in index.records] == [
        ("A_Vol_1", "A", "train"),
        ("A_Vol_2", "A", "train"),
        ("B_Vol_1", "B", "test"),
    ]
    assert (index.errors, index.left_out) == ([], {"lines of test.txt without an image": 1})
    image, mask = data.read_arrays(index.records[1])
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((7, 9, 5), np.float32, (7, 9, 5), np.uint8)
    assert image[2, 3, 1] == 1 * 63 + 2 * 9 + 3 - 900 + 1
    assert np.argwhere(mask).tolist() == [[2, 3, 1]]
    read = data.read(index.records[1])
    validate(read, num_classes=2, intensity_range=(0, 1))
    np.testing.assert_allclose(read["spacing"], (0.5, 0.6, 2.0), rtol=1e-6)
    np.testing.assert_allclose(read["image"][0, 2, 3, 1], (image[2, 3, 1] + 1000) / 1400, rtol=1e-6)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["A_Vol_1", "LIDC-IDRI-0003_Vol_12", "synthetic-solid-00007", "LIDC-IDRI-0003_CVol_2"]),
    st.integers(0, 2**31),
    st.sampled_from([-1, 0, 1, 2]),
    st.booleans(),
)
def test_a_written_sample_reads_back(tmp_path, sample_id, seed, texture, synthetic):
    data, root = LIDC(), tmp_path / f"{sample_id}-{seed}-{texture}-{synthetic}"
    made = sample(sample_id, seed, attributes={"texture": torch.tensor(texture)}, synthetic=torch.tensor(synthetic))
    made |= {"source": "LIDC-IDRI-0003_Vol_1"} if synthetic else {}
    path = data.write(root, made)
    (record,) = data.index(root).records
    assert (record.id, record.synthetic, record.source) == (sample_id, synthetic, made.get("source"))
    read = data.read(record)
    validate(read, num_classes=2, attributes=list(data.attributes.values()), intensity_range=(0, 1))
    assert read["attributes"]["texture"] == texture
    torch.testing.assert_close(read["image"], made["image"], atol=0.5 / 1400 + 1e-6, rtol=0)
    assert torch.equal(read["mask"], made["mask"])
    np.testing.assert_allclose(read["affine"], AFFINE, atol=1e-5)
    stored = nib.load(path)
    assert (stored.shape, stored.get_data_dtype()) == ((5, 7, 9), np.int16)
    at = stored.affine @ [4, 2, 3, 1]
    np.testing.assert_allclose(at, AFFINE @ [2, 3, 4, 1], atol=1e-4)
    assert stored.dataobj[4, 2, 3] == round(float(made["image"][0, 2, 3, 4]) * 1400 - 1000)


def test_generated_pairs_of_a_held_out_patient_are_known_for_what_they_are(tmp_path):
    data = LIDC()
    splits = split_records(data.index(authors_tree(tmp_path / "real")).records, (0.5, 0.5, 0), 0)
    check_disjoint(splits)
    held_out = held_out_keys(splits, data.case_key)
    for source in ("B_Vol_7", "B_CVol_1"):
        made = sample("synthetic-1", synthetic=torch.tensor(True), source=source)
        data.write(tmp_path / source, made)
        with pytest.raises(ValueError, match="synthetic-1"):
            refuse_leaks(data.index(tmp_path / source).records, held_out, data.case_key)


def test_textures_come_from_the_table(tmp_path):
    authors_tree(tmp_path)
    table = tmp_path / "Pathological" / "nodules.csv"
    table.write_text("image,texture\nA_Vol_1,part-solid\nB_Vol_1,5\nQ_Vol_1,2\n")
    index = LIDC().index(tmp_path)
    assert [r.attributes["texture"] for r in index.records] == [1, -1, 2]
    assert index.left_out == {"lines of nodules.csv without an image": 1}
    table.write_text("image,texture\nA_Vol_1,firm\n")
    with pytest.raises(InvalidSampleError, match=r"nodules.csv\[texture\], row 2: 'firm'"):
        LIDC().index(tmp_path)


def test_the_authors_generated_folder_reads_in_hu(tmp_path):
    values = np.linspace(-1.02, 1.01, 5 * 7 * 9).reshape(5, 7, 9)
    mask = (values > 0.5).astype(np.uint8)
    for row in (1, 3):
        for path, array in (
            (tmp_path / "Image" / f"Image_{row}" / "C_CVol_4.nii.gz", values),
            (tmp_path / "Mask" / f"Mask_{row}" / "C_Mask_4.nii.gz", mask),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    data = LIDC()
    records = data.index(tmp_path).records
    assert [(r.id, r.attributes["texture"], r.synthetic, r.source) for r in records] == [
        ("C_CVol_4-1", 0, True, "C_CVol_4"),
        ("C_CVol_4-3", 2, True, "C_CVol_4"),
    ]
    image, read = data.read_arrays(records[0])
    np.testing.assert_allclose(image, np.moveaxis(700 * (values.clip(-1, 1) + 1) - 1000, 0, -1), atol=1e-3)
    assert np.array_equal(read, np.moveaxis(mask, 0, -1))


def test_healthy_blocks_are_backgrounds_and_no_samples(tmp_path):
    data = LIDC()
    data.write_phantom(tmp_path, seed=0)
    healthy = data.backgrounds(tmp_path)
    index = data.index(tmp_path)
    assert not {r.id for r in healthy} & {r.id for r in index.records}
    assert len(healthy) == 6
    for record in healthy:
        image, mask = data.read_volumes(record)
        assert np.median(image.array[mask.array > 0]) < -750
    assert {r.unit for r in healthy}.isdisjoint(r.unit for r in index.records)
    (tmp_path / "Normal" / "Mask" / f"{healthy[0].id.replace('CVol', 'CMask')}.nii.gz").unlink()
    assert set(data.backgrounds(tmp_path)[0].files) == {"image"}
    assert data.read_image(data.backgrounds(tmp_path)[0]).shape == (64, 64, 32)


def test_wrong_trees_and_files_are_named(tmp_path):
    data = LIDC()
    with pytest.raises(DatasetNotFoundError, match="no such folder"):
        data.index(tmp_path / "absent")
    root = authors_tree(tmp_path)
    folder = root / "Pathological"
    (folder / "Mask" / "A_Mask_1.nii.gz").rename(folder / "Mask" / "D_Mask_1.nii.gz")
    (folder / "Image" / "B_Vol_1.nii.gz").rename(folder / "Image" / "noname.nii.gz")
    index = data.index(root)
    assert [r.id for r in index.records] == ["A_Vol_2"]
    messages = "\n".join(map(str, index.errors))
    for part in ("no mask 'A_Mask_1.nii.gz'", "D_Mask_1.nii.gz: a mask without its image", "the name 'noname'"):
        assert part in messages
    record = index.records[0]

    def store(role, array, affine=np.diag([2.0, 0.5, 0.6, 1])):  # noqa: B008
        nib.save(nib.Nifti1Image(array, affine), record.files[role])

    hu = np.full((5, 7, 9), -500, np.int16)
    store("image", hu + 1024)
    with pytest.raises(InvalidSampleError, match=r"A_Vol_2.*give hu_offset=-1024"):
        data.read_arrays(record)
    assert (LIDC(hu_offset=-1024).read_arrays(record)[0] == -500).all()
    store("image", (hu / 1000.0).astype(np.float32))
    with pytest.raises(InvalidSampleError, match=r"scaled to \[-1, 1\]"):
        data.read_arrays(record)
    store("image", hu, np.diag([2.0, 0.5, 0.65, 1]))
    with pytest.raises(InvalidSampleError, match=r"A_Mask_2.*image and mask lie up to"):
        data.read_arrays(record)
    assert LIDC(ignore_mask_affine=True).read_arrays(record)[1].sum() == 1
    store("image", hu)
    store("mask", np.full((5, 7, 9), 2, np.uint8))
    with pytest.raises(InvalidSampleError, match=r"A_Mask_2.*mask values \[2\]"):
        data.read_mask(record)
    store("mask", np.zeros((4, 7, 9), np.uint8))
    with pytest.raises(InvalidSampleError, match=r"\(7, 9, 4\) voxels for an image of \(7, 9, 5\)"):
        data.read_arrays(record)


def test_the_phantom_has_whole_patients_in_its_split_and_unequal_textures(tmp_path):
    data = LIDC()
    data.write_phantom(tmp_path, seed=0)
    index = data.index(tmp_path)
    assert (index.errors, index.left_out) == ([], {})
    splits = split_records(index.records, (0.8, 0.2, 0), 0)
    check_disjoint(splits)
    assert {r.unit for r in splits["test"]} == {f"LIDC-IDRI-{k:04d}" for k in range(20, 25)}
    counts = np.bincount([r.attributes["texture"] for r in index.records], minlength=3)
    assert counts.argmax() == TEXTURES.index("solid")
    assert counts.min() >= 2
    for record in index.records[::9]:
        assert data.read_arrays(record)[0].shape == (64, 64, 32)


@pytest.mark.parametrize("texture", range(3))
def test_nodules_have_the_hounsfield_units_of_the_published_prototypes(reference, texture):
    counts = np.array(reference("lefusion")["cluster_exemplar_counts"]["lidc"][texture])
    centres = -1000 + 87.5 * (np.arange(16) + 0.5)
    mean = (counts * centres).sum() / counts.sum()
    spread = np.sqrt((counts * (centres - mean) ** 2).sum() / counts.sum())
    for seed in range(4):
        image, mask = lung_roi(np.random.default_rng(seed), (40, 44, 24), texture)
        inside = image[mask > 0]
        assert inside.mean() == pytest.approx(mean, abs=20)
        assert inside.std() == pytest.approx(spread, abs=20)
        assert np.median(image[mask == 0]) == pytest.approx(-860, abs=25)


def test_blocks_follow_their_seed():
    rois = [lung_roi(np.random.default_rng(k), (64, 64, 32), k % 3) for k in range(8)]
    again = lung_roi(np.random.default_rng(7), (64, 64, 32), 1)
    assert np.array_equal(again.image, rois[7].image)
    assert not np.array_equal(rois[1].image, rois[4].image)


def test_a_scan_becomes_blocks_and_a_block_goes_back_into_its_scan(tmp_path):
    data, phantom = LIDC(), chest(np.random.default_rng(3), size=(92, 84, 50))
    for n, roi in enumerate(extract_rois(phantom.image, phantom.nodules, (14, 12, 10))):
        data.write_volumes(tmp_path, f"case_Vol_{n + 1}", roi.image, roi.mask)
    records = data.index(tmp_path).records
    assert len(records) == 3
    scan = phantom.image
    for record in records:
        image, mask = data.read_volumes(record)
        scan = paste_roi(scan, image, mask.array)
    assert np.array_equal(scan.array, phantom.image.array)


def test_blocks_of_a_real_tumour_are_written_and_read(realdata, tmp_path):
    root = realdata / "IBSI" / "ibsi_1_ct_radiomics_phantom" / "nifti"
    scan, tumour = read_volume(root / "image" / "phantom.nii.gz"), read_volume(root / "mask" / "mask.nii.gz")
    (roi,) = extract_rois(scan, tumour, (64, 64, 32))
    assert roi.is_cut  # the tumour is larger than LeFusion's block
    data = LIDC()
    data.write_volumes(tmp_path, "ibsi_Vol_1", roi.image, roi.mask)
    (record,) = data.index(tmp_path).records
    image, mask = data.read_volumes(record)
    assert np.array_equal(image.array, roi.image.array)
    assert np.array_equal(mask.array, roi.mask.array)
    np.testing.assert_allclose(image.affine, roi.image.affine, atol=1e-3)
    healthy = scan.with_array(np.where(tumour.array > 0, -860, scan.array))
    assert np.array_equal(paste_roi(healthy, image, mask.array).array[mask_in(scan, roi)], image.array[mask.array > 0])


def mask_in(scan, roi):
    """Where the lesion of a block lies in its scan."""
    at = np.argwhere(roi.mask.array) + roi.start
    return tuple(at.T)


def test_masks_alone_are_written_too(tmp_path):
    mask = np.zeros(SIZE, np.uint8)
    mask[1, 2, 3] = 1
    path = LIDC().write_mask(tmp_path, "made-3", mask, AFFINE)
    assert path.name == "made-3_Mask_1.nii.gz"
    stored = read_volume(path, axes=None)
    assert np.argwhere(stored.array).tolist() == [[3, 1, 2]]
    np.testing.assert_allclose(stored.affine @ [3, 1, 2, 1], AFFINE @ [1, 2, 3, 1], atol=1e-4)
    assert isinstance(stored, Volume)
