import pytest
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from fairdiff_lightning.data.augmentation import RandomRotateFlip
from fairdiff_lightning.data.batch_augmentation import picture_augmentation
from fairdiff_lightning.data.busi import BUSIDataModule
from fairdiff_lightning.data.classical_augmentation import ClassicalAugmentation, stretch
from fairdiff_lightning.data.edge_augmentation import RandomZoomRotate
from fairdiff_lightning.data.seeding import generator

MINMAX = """
augmentation:
  class_path: fairdiff_lightning.data.classical_augmentation.ClassicalAugmentation
  init_args: {name: brightness, normalize: minmax}
"""


def configured(text, *more):
    """The data module of a configuration, as the command line makes it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BUSIDataModule, "data")
    parser.add_argument("--config", action="config")
    settings = yaml.safe_dump({"data": {"image_size": 16, **yaml.safe_load(text)}})
    return parser.instantiate_classes(parser.parse_args([f"--config={settings}", *more])).data


def batch():
    image = torch.rand(3, 1, 16, 16)
    return {"image": image, "mask": (image > 0.5).long(), "attributes": {}, "id": ["a", "b", "c"]}


def test_a_configuration_restores_the_references_normalization():
    given = batch()
    changed = configured(MINMAX).augment(given, generator(0))
    torch.testing.assert_close(changed["image"], stretch(given["image"], 0, 1), atol=1e-5, rtol=0)
    clipped = configured("augmentation: brightness").augment(given, generator(0))
    assert (clipped["image"].mean((1, 2, 3)) - given["image"].mean((1, 2, 3))).abs().max() > 0.05


def test_arguments_of_an_augmentation_stand_on_the_command_line():
    data = configured(
        "{}", "--data.augmentation=fairdiff_lightning.data.RandomZoomRotate", "--data.augmentation.degrees=3",
        "--data.edges=scharr",
    )  # fmt: skip
    assert isinstance(data.augmentation, RandomZoomRotate)
    assert data.augmentation.degrees == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rotate_flip", RandomRotateFlip), ("gamma", ClassicalAugmentation), ("none", type(None))],
)
def test_names_stand_for_the_defaults(name, expected):
    assert type(configured(f"augmentation: {name}").augmentation) is expected


def test_what_is_no_augmentation_is_refused():
    with pytest.raises(ArgumentError, match="blur"):
        configured("augmentation: blur")
    with pytest.raises(ArgumentError, match="normalize"):
        configured(MINMAX.replace("minmax", "zscore"))


@pytest.mark.parametrize(
    ("augmentation", "edges", "message"),
    [
        (ClassicalAugmentation("gamma"), True, r"ClassicalAugmentation\(\)' for samples with edges"),
        (RandomZoomRotate(degrees=5), False, r"RandomZoomRotate\(\)' for samples without edges"),
    ],
)
def test_what_does_not_suit_the_samples_is_refused_by_whatever_way_it_comes(augmentation, edges, message):
    with pytest.raises(ValueError, match=message):
        picture_augmentation(augmentation, edges)
    assert picture_augmentation(augmentation, not edges) is augmentation
