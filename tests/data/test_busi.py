import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fairdiff_lightning.data.busi import BUSI, DIAGNOSES, FOLDER, BUSIDataModule
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.native import Record
from fairdiff_lightning.data.requests import GenerationPlan
from fairdiff_lightning.data.sample import validate
from fairdiff_lightning.data.splits import split_records

SIZE = (12, 17)


def lesion(rows=slice(2, 7), columns=slice(4, 11), size=SIZE):
    mask = np.zeros(size, bool)
    mask[rows, columns] = True
    return mask


LESION = lesion()


def write_image(root, diagnosis="benign", number=1, grey=40, masks=(LESION,), size=SIZE, mode="RGB"):
    """Write an image, and masks that are either shapes or pictures; returns the image's path."""
    folder = root / diagnosis
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{diagnosis} ({number})"
    Image.fromarray(np.full(size, grey, np.uint8)).convert(mode).save(folder / f"{stem}.png")
    for k, mask in enumerate(masks):
        picture = Image.fromarray(mask.astype(np.uint8) * 255) if isinstance(mask, np.ndarray) else mask
        picture.save(folder / (f"{stem}_mask_{k}.png" if k else f"{stem}_mask.png"))
    return folder / f"{stem}.png"


def read_all(root):
    return {record.id: BUSI().read_arrays(record) for record in BUSI().index(root).records}


def rgba(colour, alpha):
    planes = [np.where(colour, 255, 0).astype(np.uint8)] * 3
    return Image.fromarray(np.dstack([*planes, alpha.astype(np.uint8)]))


def palette(shape, colours, transparent=None):
    picture = Image.fromarray(shape.astype(np.uint8)).convert("P")
    picture.putpalette(colours)
    if transparent is not None:
        picture.info["transparency"] = transparent
    return picture


EVERYWHERE = np.ones(SIZE, bool)
GREY = Image.fromarray(lesion().astype(np.uint8) * 255)
MASKS = {
    "1": GREY.convert("1"),
    "L": GREY,
    "L of 0 and 1": Image.fromarray(lesion().astype(np.uint8)),
    "LA": GREY.convert("LA"),
    "RGB": GREY.convert("RGB"),
    "RGB in red": Image.fromarray(np.dstack([lesion() * np.uint8(255), *[np.zeros(SIZE, np.uint8)] * 2])),
    "RGBA opaque": GREY.convert("RGBA"),
    "RGBA transparent everywhere": rgba(lesion(), np.zeros(SIZE)),
    "RGBA white with a shape in alpha": rgba(EVERYWHERE, lesion() * 255),
    "RGBA white on transparent black": rgba(lesion(), lesion() * 255),
    "P": palette(lesion(), [0, 0, 0, 255, 255, 255]),
    "P inverted": palette(~lesion(), [255, 255, 255, 0, 0, 0]),
    "P in colour": palette(lesion(), [0, 0, 0, 0, 255, 90]),
    "P with a transparent white": palette(lesion(), [255, 255, 255, 255, 255, 255], transparent=0),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_every_mode_is_the_same_mask(tmp_path, name):
    path = write_image(tmp_path, masks=[MASKS[name]])
    with Image.open(path.with_name("benign (1)_mask.png")) as stored:
        assert stored.mode == name.split()[0]
    ((image, mask),) = read_all(tmp_path).values()
    assert (image.dtype, mask.dtype, image.shape) == (np.uint8, np.uint8, SIZE)
    assert np.array_equal(mask, lesion())


def test_half_transparent_edges_are_cut_in_the_middle(tmp_path):
    alpha = cv2.GaussianBlur(lesion(slice(3, 9), slice(4, 13)) * 255.0, (3, 3), 0).round()
    write_image(tmp_path, masks=[rgba(EVERYWHERE, alpha)])
    ((_, mask),) = read_all(tmp_path).values()
    assert np.array_equal(mask, alpha >= 128)


def test_several_masks_are_united_whatever_their_modes(tmp_path):
    shapes = [lesion(slice(k, k + 2), slice(k, 2 * k + 2)) for k in range(11)]
    masks = [Image.fromarray(s.astype(np.uint8) * 255).convert(m) for s, m in zip(shapes, "1L" * 6, strict=False)]
    write_image(tmp_path, masks=masks)
    (record,) = BUSI().index(tmp_path).records
    assert [file.rsplit("_", 1)[-1] for file in record.files.values()][-2:] == ["9.png", "10.png"], "in counting order"
    assert np.array_equal(BUSI().read_mask(record), np.any(shapes, axis=0))


def test_normal_images_have_empty_masks_with_or_without_a_file(tmp_path):
    write_image(tmp_path, "normal", 1, masks=[np.zeros(SIZE, bool)])
    write_image(tmp_path, "normal", 2, masks=[])
    write_image(tmp_path, "normal", 3, masks=[rgba(~EVERYWHERE, EVERYWHERE * 255)])
    index = BUSI().index(tmp_path)
    assert (index.errors, [r.attributes["diagnosis"] for r in index.records]) == ([], [2, 2, 2])
    for _, mask in read_all(tmp_path).values():
        assert (mask.shape, mask.any()) == (SIZE, False)


def test_the_folder_is_the_diagnosis_and_the_root_may_be_its_parent(tmp_path):
    for number, diagnosis in enumerate(DIAGNOSES):
        write_image(tmp_path / FOLDER, diagnosis, grey=10 * number)
    (tmp_path / FOLDER / "benign" / "._benign (1).png").write_bytes(b"hidden")
    (tmp_path / FOLDER / "benign" / "Thumbs.db").write_bytes(b"")
    whole, inner = BUSI().index(tmp_path), BUSI().index(tmp_path / FOLDER)
    assert whole.records == inner.records
    assert {r.id: r.attributes["diagnosis"] for r in whole.records} == {f"{d} (1)": k for k, d in enumerate(DIAGNOSES)}
    assert BUSI().attributes["diagnosis"].groups == ("benign", "malignant", "normal")


def test_images_are_read_as_luminance(tmp_path):
    for number, mode in enumerate(("L", "RGB", "RGBA", "P"), start=1):
        write_image(tmp_path, number=number, grey=40 + number, mode=mode)
    assert {int(image[0, 0]) for image, _ in read_all(tmp_path).values()} == {41, 42, 43, 44}
    green = np.zeros((*SIZE, 3), np.uint8)
    green[..., 1] = 200
    Image.fromarray(green).save(tmp_path / "benign" / "benign (1).png")
    assert read_all(tmp_path)["benign (1)"][0].mean() == pytest.approx(0.587 * 200, abs=1)


@pytest.mark.parametrize("size", [(12, 18), (11, 17), (17, 12)])
@pytest.mark.parametrize("second", [False, True])
def test_a_mask_of_another_size_is_named(tmp_path, size, second):
    other = lesion(size=size)
    write_image(tmp_path, masks=[lesion(), other] if second else [other])
    (record,) = BUSI().index(tmp_path).records
    name = "benign (1)_mask_1.png" if second else "benign (1)_mask.png"
    with pytest.raises(InvalidSampleError) as error:
        BUSI().read_arrays(record)
    assert f"{name}: mask of size {size} for an image of size {SIZE}" in str(error.value)


def test_files_without_their_partner_are_errors_of_these_files(tmp_path):
    for diagnosis in DIAGNOSES:
        write_image(tmp_path, diagnosis, 1)
        write_image(tmp_path, diagnosis, 2, masks=[])
        write_image(tmp_path, diagnosis, 3, masks=[lesion(), lesion()]).unlink()
    index = BUSI().index(tmp_path)
    assert [r.id for r in index.records] == ["benign (1)", "malignant (1)", "normal (1)", "normal (2)"]
    messages = [str(error) for error in index.errors]
    for diagnosis in ("benign", "malignant"):
        assert sum(f"{diagnosis}/{diagnosis} (2).png: no mask" in message for message in messages) == 1
    for diagnosis in DIAGNOSES:
        lone = [message for message in messages if f"no image '{diagnosis} (3).png'" in message]
        assert ["(3)_mask.png" in message for message in lone] == [True, False]
    assert len(messages) == 8
    with pytest.raises(InvalidSampleError, match=r"benign \(2\).png: no mask. Expected 'benign \(2\)_mask.png'"):
        BUSIDataModule(str(tmp_path)).setup()
    with pytest.warns(UserWarning, match="4 samples. Left out: 8 unreadable"):
        BUSIDataModule(str(tmp_path), on_error="skip").setup()


def test_damaged_files_are_named_and_can_be_left_out(tmp_path):
    for number in range(1, 9):
        write_image(tmp_path, number=number, grey=number, size=(90, 90), masks=[lesion(size=(90, 90))])
    folder = tmp_path / "benign"
    (folder / "benign (1).png").write_bytes(b"no image")
    for name in ("benign (2).png", "benign (3)_mask.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    Image.fromarray(np.full((90, 90), 3000, np.uint16)).save(folder / "benign (4).png")
    index, errors = BUSI().index(tmp_path), {}
    assert ["benign (1).png: unreadable" in str(error) for error in index.errors] == [True]
    for record in index.records[:3]:
        with pytest.raises(InvalidSampleError) as error:
            BUSI().read_arrays(record)
        errors[record.id] = str(error.value)
    assert "benign (2).png: unreadable" in errors["benign (2)"]
    assert "benign (3)_mask.png: unreadable" in errors["benign (3)"]
    assert "more than 8 bits (I;16)" in errors["benign (4)"]
    data = BUSIDataModule(str(tmp_path), on_error="skip", image_size=16)
    with pytest.warns(UserWarning, match="4 samples. Left out: 4 unreadable"):
        data.setup()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (rgba(~EVERYWHERE, lesion() * 255), "black everywhere below an alpha channel that varies"),
        (Image.fromarray(lesion().astype(np.uint8) * 3), "mask values from 0 to 3"),
        (Image.fromarray(np.tile(np.arange(17, dtype=np.uint8) * 15, (12, 1))), r"\d+% of the pixels from 64 are grey"),
    ],
)
def test_pictures_that_are_no_masks_say_why(tmp_path, mask, message):
    write_image(tmp_path, masks=[mask])
    (record,) = BUSI().index(tmp_path).records
    with pytest.raises(InvalidSampleError, match=rf"benign \(1\)_mask.png: {message}"):
        BUSI().read_mask(record)


def test_missing_and_empty_folders_say_what_is_expected(tmp_path):
    with pytest.raises(DatasetNotFoundError, match="no such folder"):
        BUSI().index(tmp_path / "nowhere")
    (tmp_path / "benign").mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"no PNG file in a folder benign, [\s\S]*\(1\)_mask.png"):
        BUSI().index(tmp_path)


def test_duplicates_share_a_unit_and_no_split_cuts_them(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, *SIZE), dtype=np.uint8)
    for number in range(1, 31):
        path = write_image(tmp_path, number=number)
        Image.fromarray(noise[(number - 1) % 10]).save(path)
    shared = write_image(tmp_path, "malignant", 1)
    shared.write_bytes((tmp_path / "benign" / "benign (7).png").read_bytes())
    alone = write_image(tmp_path, "malignant", 2, grey=3)
    index = BUSI().index(tmp_path)
    units = {r.id: r.unit for r in index.records}
    assert len(set(units.values())) == 11
    assert units["malignant (1)"] == units["benign (7)"] == units["benign (17)"] == units["benign (27)"]
    assert units[alone.stem] == "malignant (2)"
    for seed in range(5):
        splits = split_records(index.records, (0.6, 0.2, 0.2), seed)
        parts = [{r.unit for r in records} for records in splits.values()]
        assert all(parts)
        assert sum(map(len, parts)) == 11


def test_equal_sizes_alone_make_no_duplicates(tmp_path):
    first, second = write_image(tmp_path, number=1, grey=40), write_image(tmp_path, number=2, grey=41)
    assert first.stat().st_size == second.stat().st_size
    assert [r.unit for r in BUSI().index(tmp_path).records] == ["benign (1)", "benign (2)"]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_written_sample_reads_back(tmp_path_factory, data):
    root, dataset = tmp_path_factory.mktemp("busi"), BUSI()
    size = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    draws = np.random.default_rng(data.draw(st.integers(0, 999)))
    synthetic, source = data.draw(st.booleans()), data.draw(st.sampled_from(["", "malignant (12)", "Zoë_ﬁ"]))
    group = data.draw(st.integers(-1, 2))
    written = {
        "image": torch.from_numpy(draws.integers(0, 256, (1, *size))).float() / 255,
        "mask": torch.from_numpy(draws.integers(0, 2, (1, *size))),
        "attributes": {"diagnosis": torch.tensor(group)},
        "id": data.draw(st.sampled_from(["benign (1)", "synthetic_normal_00001", "a_mask_b"])),
        "synthetic": torch.tensor(synthetic),
        "source": source,
    }
    path = dataset.write(root, written)
    index = dataset.index(root)
    (record,) = index.records
    read = dataset.read(record)
    assert path == root / (*DIAGNOSES, "unknown")[group] / f"{written['id']}.png"
    assert (index.errors, record.synthetic, record.source or "") == ([], synthetic, source)
    assert (record.id, record.unit) == (written["id"], written["id"])
    assert torch.equal(read["image"], written["image"])
    assert torch.equal(read["mask"], written["mask"])
    assert read["attributes"] == written["attributes"]


def test_masks_go_into_the_folder_that_their_id_names(tmp_path):
    mask = lesion().astype(np.uint8)
    paths = {
        "benign (3)": "benign/benign (3)_mask.png",
        "synthetic_malignant_00001": "malignant/synthetic_malignant_00001_mask.png",
        "abnormal_1": "unknown/abnormal_1_mask.png",
    }
    for sample_id, path in paths.items():
        assert BUSI().write_mask(tmp_path, sample_id, mask) == tmp_path / path
        with Image.open(tmp_path / path) as stored:
            assert np.array_equal(np.asarray(stored), mask * 255)
        alone = Record(sample_id, dict.fromkeys(("image", "mask"), str(tmp_path / path)), {}, sample_id)
        assert np.array_equal(BUSI().read_mask(alone), mask), "masks of a generator are followed without an image"
    sample = {"image": torch.zeros(1, *SIZE), "mask": torch.zeros(1, *SIZE, dtype=torch.int64), "attributes": {}}
    assert BUSI().write(tmp_path, {**sample, "id": "benign (3)"}).parent.name == "benign"
    with pytest.raises(ValueError, match="id 'benign_mask_2' ends as the name of a mask does"):
        BUSI().write(tmp_path, {**sample, "id": "benign_mask_2"})


def test_generated_samples_join_the_training_set_unless_they_leak(tmp_path):
    real, made = tmp_path / "real", tmp_path / "made"
    for number in range(1, 11):
        write_image(real, number=number, grey=number)
    whole = BUSIDataModule(str(real), image_size=(16, 24), generate=GenerationPlan(per_group=1, masks="train"))
    with pytest.warns(UserWarning, match="'diagnosis' malignant, normal"):
        whole.setup()
    train, test = whole.splits["train"][0].id, whole.splits["test"][0].id
    sample = {"image": torch.rand(1, *SIZE), "mask": torch.ones(1, *SIZE, dtype=torch.int64)}
    sample |= {"attributes": {"diagnosis": torch.tensor(1)}, "synthetic": torch.tensor(True)}
    whole.write_sample(made, {**sample, "id": "synthetic_malignant_00000", "source": train})
    joined = BUSIDataModule(str(real), synthetic=[str(made)])
    with pytest.warns(UserWarning, match="'diagnosis' normal"):
        joined.setup()
    assert joined.group_counts == {"diagnosis": [8, 1, 0]}
    assert [r.synthetic for part in ("val", "test") for r in joined.splits[part]] == [False, False]
    whole.write_sample(made, {**sample, "id": "synthetic_malignant_00001", "source": test})
    with pytest.raises(ValueError, match="derived from the validation or test case"):
        BUSIDataModule(str(real), synthetic=[str(made)]).setup()


def test_pictures_of_unequal_sizes_are_resized_and_masks_go_back_to_theirs(tmp_path):
    rng = np.random.default_rng(3)
    for number in range(1, 11):
        size = (20 + number, 40 - number)
        write_image(tmp_path, DIAGNOSES[number % 3], number, grey=number, size=size, masks=[rng.random(size) > 0.5])
    data = BUSIDataModule(str(tmp_path), image_size=(16, 24), batch_size=3, evaluate_at="native", check=True)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    validate(batch, num_classes=2, attributes=data.attribute_specs, intensity_range=(0, 1), batched=True)
    assert (batch["image"].shape, batch["mask"].shape) == ((3, 1, 16, 24), (3, 1, 16, 24))
    (test,) = data.test_dataloader()
    number = int(test["id"][0].split("(")[1][:-1])
    assert test["native_mask"].shape == (1, 1, 20 + number, 40 - number)
    assert test["native_size"].tolist() == [[20 + number, 40 - number]]
    square = BUSIDataModule(str(tmp_path), image_size=8, batch_size=2)
    square.setup()
    assert next(iter(square.train_dataloader()))["image"].shape == (2, 1, 8, 8)


def phantom_arrays(root):
    index = BUSI().index(root)
    assert index.errors == []
    return [(DIAGNOSES[r.attributes["diagnosis"]], *BUSI().read_arrays(r), r) for r in index.records]


def test_the_phantom_looks_as_its_diagnoses_do(tmp_path):
    BUSI().write_phantom(tmp_path, seed=1)
    found = {diagnosis: [] for diagnosis in DIAGNOSES}
    sizes = set()
    for diagnosis, image, mask, _ in phantom_arrays(tmp_path):
        sizes.add(image.shape)
        assert image[:3].mean() > image.mean() + 20, "skin is bright and at the top"
        if diagnosis == "normal":
            assert not mask.any()
            continue
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        outline = max(contours, key=cv2.contourArea)
        solidity = cv2.contourArea(outline) / cv2.contourArea(cv2.convexHull(outline))
        _, _, width, height = cv2.boundingRect(outline)
        around = cv2.dilate(mask, np.ones((1, 17), np.uint8)) > mask
        contrast = float(image[around].mean()) - float(image[mask > 0].mean())
        below = np.logical_or.accumulate(mask > 0, axis=0) & (np.cumsum(mask, 0) == mask.sum(0)) & (mask == 0)
        rows = below.any(axis=1)
        beside = rows[:, None] & ~mask.any(axis=0)[None]
        shadow = float(image[beside].mean()) - float(image[below].mean())
        assert 0.005 < mask.mean() < 0.25
        found[diagnosis].append((solidity, height / width, contrast, shadow))
    benign, malignant = (np.array(found[d]) for d in ("benign", "malignant"))
    assert len(sizes) > 30
    assert benign[:, 0].min() > 0.93 > 0.9 > malignant[:, 0].max(), "smooth or spiculated"
    assert benign[:, 1].max() < 0.9, "wider than tall"
    assert malignant[:, 1].mean() > 1
    assert benign[:, 2].min() > 15, "hypoechoic"
    assert malignant[:, 2].min() > 15
    assert malignant[:, 3].mean() > 15 > 0 > benign[:, 3].mean(), "shadow or enhancement"


def test_the_phantom_has_the_modes_and_masks_of_the_release(tmp_path):
    BUSI().write_phantom(tmp_path, seed=0)
    modes = {Image.open(path).mode for path in (tmp_path / FOLDER).glob("*/*_mask*.png")}
    assert modes == {"1", "L", "RGB", "RGBA"}
    several = [r for *_, r in phantom_arrays(tmp_path) if len(r.files) == 3]
    assert {r.id for r in several} >= {"benign (8)", "malignant (8)"}
    for record in several:
        assert cv2.connectedComponents(BUSI().read_mask(record), connectivity=8)[0] == 3
    again = tmp_path / "again"
    BUSI().write_phantom(again, seed=0)
    for path in (tmp_path / FOLDER).glob("*/*.png"):
        assert path.read_bytes() == (again / path.relative_to(tmp_path)).read_bytes()


def test_the_data_module_yields_the_contract_from_the_phantom(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path))
    data = BUSIDataModule(image_size=(24, 32), batch_size=5, check=True, seed=0, evaluate_at="native")
    data.prepare_data()
    data.setup()
    counts = [groups["diagnosis"] for groups in data.counts().values()]
    assert [sum(c[d] for c in counts) for d in DIAGNOSES] == [33, 17, 10]
    assert (data.in_channels, data.num_classes, data.num_groups) == (1, 2, {"diagnosis": 3})
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            validate(batch, num_classes=2, attributes=data.attribute_specs, intensity_range=(0, 1), batched=True)
            assert batch["image"].shape[1:] == (1, 24, 32)
            normal = batch["attributes"]["diagnosis"] == 2
            assert torch.equal(batch["mask"].flatten(1).any(1), ~normal)
