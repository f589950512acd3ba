import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from fairdiff_lightning.data.emidec import TEST_CASES, Emidec
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.phantoms_3d import left_ventricle
from fairdiff_lightning.data.sample import validate
from fairdiff_lightning.data.splits import check_disjoint, split_records
from fairdiff_lightning.data.volumes import Volume, crop_or_pad

SIZE = (8, 9, 5)
AFFINE = np.diag([-1.5, -1.5, 10.0, 1.0])


def store(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def heart(k=0):
    mask = np.zeros(SIZE, np.uint8)
    mask[2:5, 2:6, 1:4], mask[3, 3:5, 2], mask[3, 3, 2] = 2, 3, 4
    return (np.arange(8 * 9 * 5, dtype=np.int16).reshape(SIZE) + 100 * k), mask


def lefusion_tree(root, pathological=("Case_P001", "Case_P005"), normal=("Case_N002",)):
    for k, case in enumerate(pathological):
        image, mask = heart(k)
        store(root / "Pathological" / "images" / f"{case}.nii.gz", image)
        store(root / "Pathological" / "labels" / f"{case}.nii.gz", mask.astype(np.float32))
    for case in normal:
        store(root / "Normal" / "images" / f"{case}.nii.gz", heart(7)[0])
    return root


def test_lefusions_tree_reads_with_its_fixed_test_cases(tmp_path):
    data = Emidec()
    index = data.index(lefusion_tree(tmp_path))
    assert [(r.id, r.unit, r.split, r.attributes) for r in index.records] == [
        ("Case_P001", "Case_P001", "train", {"pathology": 1}),
        ("Case_P005", "Case_P005", "test", {"pathology": 1}),
    ]
    assert not index.errors
    image, mask = data.read_arrays(index.records[1])
    assert (image.dtype, mask.dtype, image.shape) == (np.float32, np.uint8, SIZE)
    np.testing.assert_allclose(image, (heart(1)[0] - 100) / 359, atol=1e-6)  # the whole volume's range is [0, 1]
    assert np.array_equal(mask, heart()[1])
    (normal,) = data.backgrounds(tmp_path)
    assert (normal.id, normal.attributes, set(normal.files)) == ("Case_N002", {"pathology": 0}, {"image"})
    assert data.read_image(normal).array.max() == 1


def test_the_challenges_tree_reads_and_normal_cases_with_contours_are_samples(tmp_path):
    for case in ("Case_P001", "Case_N002"):
        image, mask = heart()
        store(tmp_path / case / "Images" / f"{case}.nii.gz", image)
        store(tmp_path / case / "Contours" / f"{case}.nii.gz", np.minimum(mask, 2) if "N" in case else mask)
        (tmp_path / f"{case}.txt").write_text("Sex: M")
    index = Emidec().index(tmp_path)
    found = {r.id: (r.split, r.attributes["pathology"]) for r in index.records}
    assert found == {"Case_N002": (None, 0), "Case_P001": (None, 1)}  # no test case is here, so no published split
    assert [r.id for r in Emidec().backgrounds(tmp_path)] == ["Case_N002"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["Case_P003", "synthetic-7", "Case_P001-2"]), st.integers(0, 2**31), st.booleans())
def test_a_written_sample_reads_back_bit_for_bit_and_is_not_stretched(tmp_path, sample_id, seed, synthetic):
    data, root = Emidec(), tmp_path / f"{sample_id}-{seed}-{synthetic}"
    draws = np.random.default_rng(seed)
    image = torch.from_numpy(draws.uniform(0.2, 0.7, (1, *SIZE)).astype(np.float32))
    made = {
        "image": image,
        "mask": torch.from_numpy(draws.integers(0, 5, (1, *SIZE))),
        "attributes": {"pathology": torch.tensor(1)},
        "id": sample_id,
        "affine": torch.from_numpy(AFFINE),
        "synthetic": torch.tensor(synthetic),
        "source": "Case_P001" if synthetic else "",
    }
    path = data.write(root, made)
    assert "P" in path.name  # by which the authors' code finds it
    (record,) = data.index(root).records
    assert (record.id, record.synthetic, record.source) == (sample_id, synthetic, "Case_P001" if synthetic else None)
    read = data.read(record)
    validate(read, num_classes=5, attributes=list(data.attributes.values()), intensity_range=(0, 1))
    assert torch.equal(read["image"], image)
    assert torch.equal(read["mask"], made["mask"])
    assert read["attributes"] == made["attributes"]
    np.testing.assert_allclose(read["affine"], AFFINE)


def test_a_crop_keeps_the_scale_of_its_whole_volume(tmp_path):
    data = Emidec()
    record = data.index(lefusion_tree(tmp_path / "real")).records[0]
    image, mask = (crop_or_pad(v, (4, 5, 5), fill=0) for v in data.read_volumes(record))
    data.write_volumes(tmp_path / "made", "x", image, mask, synthetic=True)
    again, _ = data.read_volumes(data.index(tmp_path / "made").records[0])
    assert np.array_equal(again.array, image.array)
    assert again.array.max() < 0.9
    np.testing.assert_allclose(again.affine, image.affine)


def test_wrong_trees_and_files_are_named(tmp_path):
    data = Emidec()
    with pytest.raises(DatasetNotFoundError, match="no image"):
        data.index(tmp_path)
    root = lefusion_tree(tmp_path)
    (root / "Pathological" / "labels" / "Case_P005.nii.gz").rename(
        root / "Pathological" / "labels" / "Case_P006.nii.gz"
    )
    index = data.index(root)
    messages = sorted(str(error).split("/")[-1] for error in index.errors)
    assert [r.id for r in index.records] == ["Case_P001"]
    assert messages[0].startswith("Case_P005.nii.gz: no labels")
    assert messages[1].startswith("Case_P006.nii.gz: labels without an image")
    (record,) = index.records
    store(root / "Pathological" / "labels" / "Case_P001.nii.gz", heart()[1], np.diag([1.5, 1.5, 10.0, 1.0]))
    with pytest.raises(InvalidSampleError, match=r"labels/Case_P001.*image and mask lie up to"):
        data.read_arrays(record)
    assert np.array_equal(Emidec(ignore_mask_affine=True).read_arrays(record)[1], heart()[1])
    store(root / "Pathological" / "labels" / "Case_P001.nii.gz", heart()[1] + 1)
    with pytest.raises(InvalidSampleError, match=r"mask values \[1, 3, 4, 5\]. Expected classes 0 to 4"):
        data.read_mask(record)
    store(root / "Pathological" / "images" / "Case_P001.nii.gz", np.full(SIZE, 3, np.int16))
    with pytest.raises(InvalidSampleError, match=r"Case_P001.nii.gz: values from 3 to 3"):
        data.read_image(record)
    store(root / "Pathological" / "images" / "Case_P001.nii.gz", np.zeros((*SIZE, 2), np.int16))
    with pytest.raises(InvalidSampleError, match="4-D data"):
        data.read_image(record)


def test_real_slices_are_stacked_to_volumes(realdata):
    data, root = Emidec(), realdata / "EMIDEC_png"
    index = data.index(root)
    assert {r.id: r.attributes["pathology"] for r in index.records} == {"Case_N037": 0, "Case_P001": 1}
    for record, depth, values in zip(index.records, (7, 10), ({0, 1, 2}, {0, 1, 2, 3, 4}), strict=True):
        image, mask = data.read_arrays(record)
        assert image.shape == mask.shape == (256, 256, depth)
        assert set(np.unique(mask)) == values
        for k in (0, depth - 1):
            stored = np.asarray(Image.open(root / "train" / f"{record.id}_slice{k:03d}.png"))
            assert np.array_equal(np.round(image[..., k] * 255), stored)
        validate(data.read(record), num_classes=5, intensity_range=(0, 1))
    image, mask = data.read_arrays(index.records[1])
    assert image[mask >= 3].mean() > image[mask == 2].mean()  # late enhancement is bright
    assert [r.id for r in data.backgrounds(root)] == ["Case_N037"]


def slices(root, images, masks, size=(6, 8)):
    for folder, numbers in (("train", images), ("trainannot", masks)):
        (root / folder).mkdir(parents=True)
        for k in numbers:
            Image.fromarray(np.full(size, k, np.uint8)).save(root / folder / f"Case_P001_slice{k:03d}.png")
    return Emidec().index(root)


def test_slices_that_are_missing_are_named(tmp_path):
    (error,) = slices(tmp_path / "a", (0, 1, 2), (0, 1)).errors
    assert "slices ['002'] of image or labels alone" in str(error)
    (record,) = slices(tmp_path / "b", (0, 2), (0, 2)).records
    with pytest.raises(InvalidSampleError, match=r"slices \[0, 2\] of Case_P001"):
        Emidec().read_image(record)
    (record,) = slices(tmp_path / "c", (1, 2), (1, 2)).records
    Image.fromarray(np.zeros((6, 7), np.uint8)).save(record.files["image/002"])
    with pytest.raises(InvalidSampleError, match=r"slices of \[\(6, 7\), \(6, 8\)\]"):
        Emidec().read_image(record)
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(record.files["image/002"])
    with pytest.raises(InvalidSampleError, match="mode RGB"):
        Emidec().read_image(record)


def test_the_phantom_splits_as_published_and_its_normal_hearts_are_backgrounds(tmp_path):
    data = Emidec()
    data.write_phantom(tmp_path, seed=0)
    index = data.index(tmp_path)
    splits = split_records(index.records, (0.8, 0.2, 0), 0)
    check_disjoint(splits)
    assert {r.id for r in splits["test"]} == {f"Case_{name}" for name in TEST_CASES[:5]}
    healthy = data.backgrounds(tmp_path)
    assert len(healthy) == 6
    assert np.unique(data.read_labels(healthy[0]).array).tolist() == [0, 1, 2]
    image, mask = data.read_volumes(index.records[3])
    assert (image.shape, image.array.min(), image.array.max()) == ((80, 76, 10), 0, 1)
    np.testing.assert_allclose(image.spacing, (1.5, 1.5, 10))


def test_hearts_are_rings_whose_infarct_lies_in_the_wall_and_no_reflow_in_the_infarct():
    for seed in range(6):
        image, mask = left_ventricle(np.random.default_rng(seed), (70, 62, 9))
        assert np.unique(mask).tolist() == [0, 1, 2, 3, 4]
        for k in range(9):
            filled = ndimage.binary_fill_holes(mask[..., k] >= 2)
            assert np.array_equal(filled, mask[..., k] > 0)  # the wall goes all around the cavity
            around = ndimage.binary_dilation(mask[..., k] == 4)
            assert not (mask[..., k][around] == 0).any()
        means = [image[mask == c].mean() for c in range(5)]
        assert means[2] < means[1] < means[4] < means[3]
    image, mask = left_ventricle(np.random.default_rng(0), (70, 62, 9), infarct=False)
    assert np.unique(mask).tolist() == [0, 1, 2]


def test_masks_alone_are_written_in_their_place(tmp_path):
    path = Emidec().write_mask(tmp_path, "made-3", heart()[1], AFFINE)
    assert path == tmp_path / "Pathological" / "labels" / "Case_P-made-3.nii.gz"
    stored = nib.load(path)
    assert np.array_equal(np.asarray(stored.dataobj), heart()[1])
    np.testing.assert_allclose(stored.affine, AFFINE)
    assert Volume(heart()[1], AFFINE).axes == ("L", "P", "S")
