import pytest
import torch

from fairdiff_lightning.data import AttributeSpec, SampleError, collate, validate

RACE = AttributeSpec("race", ("Asian", "Black"))


def sample(**changes):
    good = {
        "image": torch.rand(1, 5, 7),
        "mask": torch.randint(0, 3, (1, 5, 7)),
        "attributes": {"race": torch.tensor(1)},
        "id": "a",
    }
    return good | changes


def check(sample, batched=False):
    validate(sample, num_classes=3, attributes=[RACE], intensity_range=(0, 1), batched=batched)


def test_good_samples_and_their_batch_pass():
    check(sample())
    check(sample(attributes={"race": torch.tensor(-1)}))
    batch = collate([sample(), sample(id="b")])
    check(batch, batched=True)
    assert batch["id"] == ["a", "b"]
    with pytest.raises(SampleError):
        check(batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.rand(1, 5, 7).double()}, "float64"),
        ({"image": torch.full((1, 5, 7), float("nan"))}, "NaN"),
        ({"image": torch.full((1, 5, 7), 255.0)}, "255"),
        ({"mask": torch.zeros(1, 7, 5, dtype=torch.int64)}, r"\(1, 7, 5\)"),
        ({"mask": torch.zeros(1, 5, 7)}, "float32"),
        ({"mask": torch.full((1, 5, 7), 3)}, r"classes \[3\]"),
        ({"attributes": {"race": torch.tensor(2)}}, "found 2"),
        ({"attributes": {}}, r"attributes\[race\]"),
        ({"id": 7}, "strings"),
    ],
)
def test_a_broken_sample_is_named_with_key_and_value(change, message):
    with pytest.raises(SampleError, match=message):
        check(sample(**change))


def test_a_missing_key_is_named():
    broken = sample()
    del broken["mask"]
    with pytest.raises(SampleError, match="key 'mask'"):
        check(broken)


def test_native_masks_of_unequal_size_collate_to_a_list():
    sizes = [(5, 7), (6, 7)]
    batch = collate([sample(native_mask=torch.ones(1, *size, dtype=torch.int64)) for size in sizes])
    assert [tuple(m.shape[1:]) for m in batch["native_mask"]] == sizes
    assert batch["image"].shape == (2, 1, 5, 7)
    same = collate([sample(native_mask=torch.ones(1, 4, 4)), sample(native_mask=torch.ones(1, 4, 4))])
    assert same["native_mask"].shape == (2, 1, 4, 4)
