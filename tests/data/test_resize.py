import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.data import RandomRotateFlip
from fairdiff_lightning.data.resize import centre_region, crop_to, resize_image, resize_mask, restore_mask


def disk(shape, row, col, radius):
    r, c = np.mgrid[: shape[0], : shape[1]]
    return (r - row) ** 2 + (c - col) ** 2 <= radius**2


def preprocess(image, mask, crop):
    region = centre_region(mask.shape, crop)
    return (
        resize_image(crop_to(image, region), (224, 224), "zoom"),
        resize_mask(crop_to(mask, region), (224, 224), "zoom"),
    )


def grey_case():
    image = (np.abs(np.sin(0.013 * np.arange(512 * 664))) * 255).astype(np.float32).reshape(512, 664)
    mask = np.zeros((512, 664), np.uint8)
    mask[disk(mask.shape, 250, 330, 120)], mask[disk(mask.shape, 250, 330, 60)] = 1, 2
    return image, mask


def test_grey_test_transform_is_the_references(reference):
    expected = reference("dmoe")["G1_test_transform_gray"]
    image, mask = preprocess(*grey_case(), crop=512)
    three = np.broadcast_to(image, (3, 224, 224)).ravel()
    stats = {"mean": three.mean(dtype=np.float64), "std": three.std(dtype=np.float64, ddof=1)}
    stats |= {"min": image.min(), "max": image.max()}
    assert stats == pytest.approx({k: expected["image"][k] for k in stats}, abs=1e-6)
    np.testing.assert_allclose(three[::20011], expected["image"]["flat[::20011]"], atol=1e-6)
    assert np.bincount(mask.ravel()).tolist() == expected["label_hist"]


def test_colour_test_transform_is_the_references(reference):
    expected = reference("dmoe")["G2_test_transform_rgb"]
    image = np.floor(np.abs(np.sin(0.0113 * np.arange(450 * 600 * 3))) * 255).astype(np.uint8).reshape(450, 600, 3)
    image, mask = preprocess(image, disk((450, 600), 220, 300, 100).astype(np.uint8), crop=1024)
    stats = {"mean": image.mean(dtype=np.float64), "std": image.std(dtype=np.float64, ddof=1), "max": image.max()}
    assert stats == pytest.approx({k: expected["image"][k] for k in stats}, abs=1e-6)
    np.testing.assert_allclose(image.ravel()[::20011], expected["image"]["flat[::20011]"], atol=1e-6)
    assert np.bincount(mask.ravel()).tolist() == expected["label_hist"]


def test_fairdiff_test_transform_is_the_references(reference):
    check = reference("fairdiff")["sd01_transform_transunet"]
    row, col = np.mgrid[:664, :798]
    disc = ((col - 400) / 120) ** 2 + ((row - 332) / 140) ** 2 <= 1
    cup = ((col - 410) / 60) ** 2 + ((row - 336) / 70) ** 2 <= 1
    mask = disc.astype(np.uint8) + (disc & cup)
    region = centre_region(mask.shape, 512)
    assert list(region[:2]) == check["inputs"]["crop"]["start_row_col"]
    assert np.bincount(crop_to(mask, region).ravel()).tolist() == check["inputs"]["crop"]["counts"]
    image, mask = preprocess(((3 * row + 5 * col) % 256).astype(np.uint8), mask, 512)
    expected = check["expected"]
    assert 3 * image.sum(dtype=np.float64) == pytest.approx(expected["image_sum"], abs=1e-2)
    assert image.min() == pytest.approx(expected["image_min"], abs=1e-5)
    assert image.max() == pytest.approx(expected["image_max"], abs=1e-5)
    assert image[0, 10, 20] == pytest.approx(expected["image_at"]["0,10,20"], abs=1e-5)
    assert np.bincount(mask.ravel()).tolist() == expected["label_counts"]


def reference_draw(seed):
    """The reference's decisions (branch by Python's generator, parameters by NumPy's) as our matrix."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    if random.random() > 0.5:
        quarter, axis = np.random.randint(0, 4), np.random.randint(0, 2)  # noqa: NPY002
        angle, flip = quarter * np.pi / 2, (-1.0 if axis == 0 else 1.0, -1.0 if axis == 1 else 1.0)
        name = "rot90+flip"
    elif random.random() > 0.5:
        angle, flip, name = np.deg2rad(np.random.randint(-20, 20)), (1.0, 1.0), "rotate"  # noqa: NPY002
    else:
        angle, flip, name = 0.0, (1.0, 1.0), "none"
    cos, sin = np.cos(angle), np.sin(angle)
    return name, torch.tensor(np.array([[cos, sin], [-sin, cos]]) * flip)


@pytest.mark.parametrize("seed", range(6))
def test_augmentation_is_the_references_for_its_draws(reference, seed):
    expected = reference("dmoe")["G3_train_transform_seeded"]["seeds"][str(seed)]
    image, mask = grey_case()
    region = centre_region(mask.shape, 512)
    branch, matrix = reference_draw(seed)
    assert branch == expected["branch"]
    augment = RandomRotateFlip(interpolation="nearest")
    square = torch.from_numpy(crop_to(image, region)).double()[None, None]
    labels = torch.from_numpy(crop_to(mask, region)).long()[None, None]
    moved, labels = augment.transform(square, labels, matrix[None])
    if branch == "rotate":  # SciPy counts the outer half of the border pixels as outside
        moved = moved * _inside_pixel_centres(matrix, 512)
    image = resize_image(moved[0, 0].float().numpy(), (224, 224), "zoom")
    mask = resize_mask(labels[0, 0].numpy().astype(np.uint8), (224, 224), "zoom")
    assert image.mean(dtype=np.float64) == pytest.approx(expected["image_mean"], abs=1e-5)
    assert np.bincount(mask.ravel()).tolist() == expected["label_hist"]


def _inside_pixel_centres(matrix, side):
    centred = torch.arange(side).double() - (side - 1) / 2
    source = torch.stack(torch.meshgrid(centred, centred, indexing="ij"), -1) @ matrix.T
    return (source.abs() <= (side - 1) / 2).all(-1)


@settings(max_examples=50, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop=st.none() | st.integers(1, 50),
    new=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_crop_stays_inside_and_resize_keeps_range_and_classes(size, crop, new):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = np.random.default_rng(1).integers(0, 3, size, dtype=np.uint8)
    top, left, height, width = centre_region(size, crop)
    assert 0 <= top <= top + height <= size[0]
    assert 0 <= left <= left + width <= size[1]
    assert (height, width) == (min(crop or size[0], size[0]), min(crop or size[1], size[1]))
    resized = resize_image(image, new, "area")
    assert (resized.shape, resized.dtype) == ((3, *new), np.uint8)
    assert resized.min() >= image.min()
    assert resized.max() <= image.max()
    assert set(np.unique(resize_mask(mask, new, "area"))) <= set(np.unique(mask))


def test_logits_return_to_the_files_pixels():
    mask = torch.zeros(1, 40, 60, dtype=torch.int64)
    mask[0, 12:28, 22:40] = 1
    top, left, height, width = region = centre_region((40, 60), 32)
    crop = mask[:, top : top + height, left : left + width]
    logits = torch.nn.functional.one_hot(crop, 2).movedim(-1, 1).float()
    same = restore_mask(logits.expand(2, -1, -1, -1), torch.tensor([region] * 2), torch.tensor([[40, 60]] * 2))
    assert torch.equal(same, mask[None].expand(2, -1, -1, -1))
    regions, sizes = torch.tensor([region, (0, 0, 32, 32)]), torch.tensor([[40, 60], [32, 32]])
    unequal = restore_mask(logits.expand(2, -1, -1, -1), regions, sizes)
    assert torch.equal(unequal[0], mask)
    assert torch.equal(unequal[1], crop)
