import warnings

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from fairdiff_lightning.data.busi import BUSI, BUSIDataModule


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path / "cache"))


def picture():
    """The reference's grey picture, 48 x 80, and its disc."""
    y, x = np.mgrid[:48, :80].astype(float)
    disc = (x - 40) ** 2 + (y - 24) ** 2 < 12**2
    return np.clip(np.round(40 + 0.8 * x + 30 * np.sin(y / 5) + 90 * disc), 0, 255).astype(np.uint8), disc


def store(root, *images, mask=None):
    """Images as ``benign (1)`` ..., all with one mask."""
    (root / "benign").mkdir(parents=True)
    for number, image in enumerate(images, start=1):
        shape = np.zeros(image.shape, bool) if mask is None else mask
        Image.fromarray(image).save(root / "benign" / f"benign ({number}).png")
        Image.fromarray(shape.astype(np.uint8) * 255).save(root / "benign" / f"benign ({number})_mask.png")
    return str(root)


def samples(root, **arguments):
    """Samples of all records, twice: as they are decoded and as the cache keeps them."""
    data = BUSIDataModule(root, **({"cache": "memory"} | arguments))
    records = data.dataset.index(data.folder).records
    kept = data.make_dataset(records, cache="memory")
    found = [kept[i] for i in range(len(records)) for _ in range(2)]
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(first["image"], second["image"])
    return found[::2]


def scaled(values):
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip((values - low) / (high - low), 0, 1)


def test_preprocessing_is_the_authors(tmp_path, reference):
    image, disc = picture()
    wanted = reference("diffboost")["preprocess_2d"]
    (sample,) = samples(
        store(tmp_path / "busi", image, mask=disc), image_size=64, percentiles="input", prompt=wanted["prompt"]
    )
    found = 2 * sample["image"] - 1
    assert (list(found.shape), sample["image"].dtype) == (wanted["data"]["shape"], torch.float32)
    assert (found.min(), found.max()) == (wanted["data"]["min"], wanted["data"]["max"])
    assert found.mean().item() == pytest.approx(wanted["data"]["mean"], abs=2e-6)
    assert found.std(correction=0).item() == pytest.approx(wanted["data"]["std"], abs=2e-6)
    for r, c in ((32, 32), (0, 0), (10, 50)):
        assert found[0, r, c].item() == pytest.approx(wanted["data"][f"px[0,{r},{c}]"], abs=2e-6)
    assert (list(sample["mask"].shape), sample["mask"].dtype) == (wanted["seg"]["shape"], torch.int64)
    assert int(sample["mask"].sum()) == wanted["seg"]["sum"]
    assert sample["prompt"] == "Breast, Ultrasound"


def test_a_sample_tells_the_size_of_its_file_as_the_authors_do(tmp_path, reference):
    image, disc = picture()
    wanted = reference("diffboost")["preprocess_2d"]["meta"]
    data = BUSIDataModule(store(tmp_path / "busi", image, mask=disc), image_size=64)
    (record,) = data.dataset.index(data.folder).records
    sample = data.make_dataset([record], native_mask=True)[0]
    assert sample["native_size"].tolist() == list(sample["native_mask"].shape[1:]) == wanted["org_size"]
    assert list(sample["image"].shape[1:]) == wanted["target_size"]
    assert record.files["image"].endswith(f".{wanted['file_type']}")
    assert data.num_classes == wanted["meta"]["num_classes"]


def test_by_default_the_percentiles_are_those_of_the_files_own_picture(tmp_path):
    image, disc = picture()
    root = store(tmp_path / "busi", image, mask=disc)
    (sample,) = samples(root, image_size=None)
    np.testing.assert_allclose(sample["image"][0], scaled(image), atol=0.51 / 255)
    (halved,) = samples(root, image_size=(24, 40))
    means = scaled(image).reshape(24, 2, 40, 2).mean((1, 3))
    np.testing.assert_allclose(halved["image"][0], means, atol=1.01 / 255)
    (cropped,) = samples(root, image_size=None, crop=30)
    np.testing.assert_allclose(cropped["image"][0], scaled(image)[9:39, 25:55], atol=0.51 / 255)


def test_without_percentiles_levels_are_divided(tmp_path):
    image, _ = picture()
    (sample,) = samples(store(tmp_path / "busi", image), image_size=None, percentiles=None)
    np.testing.assert_allclose(sample["image"][0], image / 255, atol=1e-6)


@pytest.mark.parametrize("percentiles", ["native", "input"])
def test_exposure_makes_no_difference_and_a_constant_picture_is_zero(tmp_path, percentiles):
    image, _ = picture()
    dark, constant = (image // 2).astype(np.uint8) * 2, np.full_like(image, 90)
    root = store(tmp_path / "busi", dark, dark // 2, constant)
    first, second, third = samples(root, image_size=(24, 40), percentiles=percentiles)
    torch.testing.assert_close(first["image"], second["image"], atol=1.01 / 255, rtol=0)
    assert torch.equal(third["image"], torch.zeros(1, 24, 40))


@pytest.mark.parametrize("percentiles", ["native", "input"])
def test_what_was_generated_keeps_its_intensities(tmp_path, percentiles):
    made = {"image": torch.rand(1, 24, 40) * 0.5 + 0.25, "mask": torch.zeros(1, 24, 40).long(), "id": "benign_s"}
    made |= {"attributes": {"diagnosis": torch.tensor(0)}, "synthetic": torch.tensor(True), "source": "benign (1)"}
    BUSI().write(tmp_path / "made", made)
    (again,) = samples(str(tmp_path / "made"), image_size=(24, 40), percentiles=percentiles)
    torch.testing.assert_close(again["image"], made["image"], atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"percentiles": "slice"}, r"percentiles='slice': expected one of \['native', 'input'\], or None"),
        ({"percentiles": "input", "resize": "zoom"}, "percentiles='input' with resize='zoom'"),
    ],
)
def test_other_percentiles_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BUSIDataModule(**arguments)


@pytest.mark.parametrize("edges", [None, "scharr"])
def test_a_configuration_names_the_percentiles(edges):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BUSIDataModule, "data")
    settings = {"percentiles": "input", "image_size": 32, "crop": 20, "edges": edges}
    data = parser.instantiate_classes(parser.parse_object({"data": settings})).data
    frame = data.frame if edges is None else data.frame.frame
    assert (frame.percentiles, frame.size, frame.crop, data.image_size) == ("input", (32, 32), 20, (32, 32))


def test_a_checkpoint_of_another_scale_is_told():
    state = BUSIDataModule(percentiles=None).state_dict()
    with pytest.warns(UserWarning, match="trained with percentiles=None, here it is 'native'.*data.percentiles=null"):
        BUSIDataModule().load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BUSIDataModule(percentiles=None).load_state_dict({"training_cases": []})
