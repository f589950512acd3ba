import builtins
import importlib
import io
import json
import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import nn

from fairdiff_lightning.data.edges import CannyEdges, ScharrEdges, edges_of
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.native import to_image_tensor
from fairdiff_lightning.data.phantoms_radimagenet import COUNT as PHANTOM_COUNT
from fairdiff_lightning.data.phantoms_radimagenet import FOLDERS as PHANTOM_FOLDERS
from fairdiff_lightning.data.radimagenet import RadImageNet, RadImageNetDataModule
from fairdiff_lightning.data.radimagenet_samples import encode, prompt_of
from fairdiff_lightning.data.sample import validate

FOLDERS = ("MR/af/osseous_disruption", "CT/abd/normal", "US/gb")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    """A tree of 3 folders with 8 images each, of two sizes."""
    for k, folder in enumerate(FOLDERS):
        (tmp_path / "data" / "radiology_ai" / folder).mkdir(parents=True)
        for i in range(8):
            array = np.random.default_rng([k, i]).integers(0, 256, (20, 24) if i % 2 else (24, 20), np.uint8)
            Image.fromarray(array).save(tmp_path / "data" / "radiology_ai" / folder / f"x{i}.png")
    return tmp_path / "data"


class Soft(nn.Module):
    """Draws each image, half as bright, and remembers the batches."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, images):
        self.drawn.append(tuple(images.shape))
        return images.mean(1, keepdim=True) / 2


def module(root, **arguments):
    arguments = {"image_size": (16, 20), "batch_size": 4, "val_fraction": 0.25, "seed": 0, **arguments}
    data = RadImageNetDataModule(None if root is None else str(root), **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def ids(loader):
    return [batch["id"] for batch in loader]


@pytest.mark.parametrize(
    ("folder", "prompt"),
    [
        ("MR/hip/normal", "MR,hip,normal"),
        ("CT/abd/normal", "CT,abdomen,normal"),
        ("MR/af/osseous_disruption", "MR,ankle,osseous disruption"),
        ("US/cbd/normal", "US,common bile duct,normal"),
        ("US/gb/normal", "US,gallbladder,normal"),
        ("US/ivc/normal", "US,inferior vena cava,normal"),
        ("MR/shoulder/ca++_tendinosis", "MR,shoulder,ca++ tendinosis"),
        ("XR/new_region/Some_finding", "XR,new region,Some finding"),
    ],
)
def test_prompts_are_the_papers(folder, prompt):
    assert prompt_of(folder) == prompt_of(folder, reference_behaviour=True) == prompt


def test_only_the_references_prompts_leave_the_last_abbreviation():
    assert prompt_of("US/gb") == "US,gallbladder"
    assert prompt_of("US/gb", reference_behaviour=True) == "US,gb"
    assert prompt_of("MR/abdomen/abductor") == "MR,abdomen,abductor", "whole words only"


def test_samples_follow_the_contract(root):
    data = module(root)
    batch = next(iter(data.train_dataloader()))
    validate(batch, num_classes=data.num_classes, intensity_range=data.intensity_range, batched=True)
    assert batch["image"].shape == batch["edge"].shape == batch["mask"].shape == (4, 1, 16, 20)
    assert not batch["mask"].any()
    assert batch["attributes"] == data.attribute_groups == data.num_groups == {}
    assert (data.num_classes, data.in_channels, data.image_size) == (1, 1, (16, 20))
    assert [p.split(",")[0] for p in batch["prompt"]] == [i.split("/")[0] for i in batch["id"]]


def test_an_image_and_its_edges_are_those_of_the_file(root):
    data = module(root, image_size=(40, 48), edges=CannyEdges())
    sample = data.splits["train"][1]
    file = cv2.imread(str(root / "radiology_ai" / sample["id"]), cv2.IMREAD_GRAYSCALE)
    levels = (edges_of(to_image_tensor(file), detector=CannyEdges())[0] * 255).round().byte().numpy()
    for key, array in (("image", file), ("edge", levels)):  # enlarged bilinearly, as the paper's code does
        expected = cv2.resize(array, (48, 40), interpolation=cv2.INTER_LINEAR) / 255
        np.testing.assert_allclose(sample[key][0], expected, atol=1e-6)


def test_colour_gives_three_channels(root):
    array = np.zeros((20, 24, 3), np.uint8)
    array[..., 0] = 200
    for file in (root / "radiology_ai" / "US" / "gb").iterdir():
        Image.fromarray(array).save(file)
    data = module(root, colour=True)
    red = next(s for s in data.splits["train"] if s["id"].startswith("US"))
    assert data.in_channels == 3
    assert red["image"].amax((1, 2)).mul(255).round().tolist() == [200, 0, 0]


def test_without_edges_gradients_are_drawn_and_said(root):
    from fairdiff_lightning.data.edges import say_no_weights

    say_no_weights.cache_clear()
    with pytest.warns(UserWarning, match="Scharr"):
        sample = module(root).splits["train"][0]
    assert float(sample["edge"].max()) > 0.5


@pytest.mark.parametrize(
    ("word", "detector"),
    [
        ("scharr", ScharrEdges()),
        ("ScharrEdges", ScharrEdges()),
        ("fairdiff_lightning.data.ScharrEdges", ScharrEdges()),
        ("CannyEdges", CannyEdges()),
        ("{class_path: CannyEdges, init_args: {sigma: 2.0}}", CannyEdges(sigma=2.0)),
        ("null", None),
    ],
)
def test_the_command_line_names_detectors(word, detector):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RadImageNetDataModule, "data")
    data = parser.instantiate_classes(parser.parse_args([f"--data.edges={word}"])).data
    assert (data.detector, data.maker.detector) == (detector, detector)


@pytest.mark.parametrize("nothing", ["canny", nn.Module()])
def test_a_detector_that_draws_nothing_is_refused(nothing):
    with pytest.raises(ValueError, match=r"edges=.* draws nothing; expected is 'scharr', CannyEdges, or a network"):
        RadImageNetDataModule(edges=nothing)


def test_a_network_that_would_draw_image_by_image_is_refused(root):
    message = r"edges=Soft without shards.*write_shards\.py <folder> --data\.root=.*data.*test_radimagenet\.Soft"
    with pytest.raises(ValueError, match=message):
        module(root, edges=Soft())


def test_edges_for_shards_are_drawn_in_batches_of_a_size(root):
    data, network = module(root, edges=CannyEdges()), Soft()
    maker = replace(data.maker, detector=network)
    train = data.splits["train"]
    items = list(RadImageNet(train.index, train.rows, maker).with_edges(list(range(18))))
    assert sorted(network.drawn) == [(9, 1, 20, 24), (9, 1, 24, 20)]
    for item in items:
        image = cv2.imread(str(root / "radiology_ai" / item["id"]), cv2.IMREAD_GRAYSCALE)
        expected = np.floor(image / np.float32(255) / 2 * np.float32(255))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(item["edge"]))), expected)
        assert item["image"] == (root / "radiology_ai" / item["id"]).read_bytes()


def test_training_on_the_tree_writes_no_file_for_each_image(root, tmp_path):
    ids(module(root, edges=ScharrEdges()).train_dataloader())
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["index"]


def test_the_phantom_has_every_kind_of_folder():
    data = module(None)
    counts = Counter(i.rpartition("/")[0] for batch in ids(data.train_dataloader()) for i in batch)
    assert set(counts) == set(PHANTOM_FOLDERS)
    assert len(data.splits["train"]) + len(data.splits["val"]) == len(PHANTOM_FOLDERS) * PHANTOM_COUNT
    assert data.prompts == sorted(prompt_of(folder) for folder in PHANTOM_FOLDERS)
    RadImageNetDataModule(val_fraction=0.02).prepare_data()  # a second time it is there


def test_the_splits_are_disjoint_and_those_of_the_seed(root):
    data = module(root)
    train, val = ({s["id"] for s in data.splits[part]} for part in ("train", "val"))
    assert not train & val
    assert (len(train), len(val)) == (18, 6)
    assert [i for b in ids(module(root).val_dataloader()) for i in b] == sorted(val)
    assert {s["id"] for s in module(root, seed=1).splits["val"]} != val
    assert module(root, val_fraction=0.0).val_dataloader() == []


def test_training_goes_on_in_the_middle_of_an_epoch(root):
    first = module(root).train_dataloader()
    begun = [batch["id"] for batch in islice(first, 2)]
    second = module(root).train_dataloader()
    second.load_state_dict(first.state_dict())
    whole = module(root).train_dataloader()
    assert begun + ids(second) == ids(whole)
    whole.sampler.set_epoch(1)
    assert ids(whole)[:2] != begun


def test_every_device_has_its_share(root):
    shares = []
    for rank in range(3):
        data = module(root)
        data.trainer = SimpleNamespace(world_size=3, global_rank=rank)
        shares += [i for batch in ids(data.train_dataloader()) for i in batch]
    assert len(shares) == len(set(shares)) == 18


def test_workers_get_no_rows(root):
    data = module(root).splits["train"]
    pickled = pickle.dumps(data)
    assert len(pickled) < 2500
    assert pickle.loads(pickled)[3]["id"] == data[3]["id"]


def test_a_file_that_goes_while_training_is_an_error_that_counts(root):
    data = module(root)
    for i in range(3):
        (root / "radiology_ai" / "CT" / "abd" / "normal" / f"x{i}.png").unlink()
    with pytest.raises(InvalidSampleError, match=r"x0\.png: gone.*first of 3 such images of the 24 in the index"):
        ids(data.train_dataloader())
    with pytest.raises(InvalidSampleError, match=r"first of 3 such images"):
        module(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "unreadable"), (b"\x89PNG\r\n\x1a\nxx", "unreadable"), ("16", "mode 'I;16'.*8 bits")],
)
def test_a_broken_file_is_an_error_that_names_it(root, content, message):
    file = root / "radiology_ai" / "US" / "gb" / "x0.png"
    if content == "16":
        Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(file)
    else:
        file.write_bytes(content)
    with pytest.raises(InvalidSampleError, match=rf"data/radiology_ai/US/gb/x0\.png: .*{message}"):
        list(module(root, val_fraction=0.0).splits["train"])


def test_a_wrong_tree_is_an_error(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"no such folder[\s\S]*radimagenet\.com"):
        module(tmp_path / "nothing")
    (tmp_path / "flat").mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"no images[\s\S]*radiology_ai/<modality>"):
        module(tmp_path / "flat")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "flat" / "a.png")
    with pytest.raises(DatasetNotFoundError, match="outside of folders"):
        module(tmp_path / "flat")


def test_fractions_that_make_no_split_are_errors(root):
    with pytest.raises(ValueError, match=r"val_fraction=1.*below 1"):
        RadImageNetDataModule(val_fraction=1.0)
    with pytest.raises(ValueError, match=r"the val split .* is empty: val_fraction=0\.001 of 24"):
        module(root, val_fraction=0.001)


def test_shards_whose_edges_were_drawn_of_other_colours_are_refused(tmp_path):
    for colour, word in ((False, "false"), (True, "true")):
        facts = {"rows": {}, "folders": ["MR/af"], "samples_per_shard": 4, "edges": "scharr", "colour": colour}
        (tmp_path / "shards.json").write_text(json.dumps(facts))
        RadImageNetDataModule(shards=str(tmp_path), colour=colour).setup()
        message = rf"drawn with colour={colour}, and here it is {not colour}: set --data\.colour={word}, or write"
        with pytest.raises(ValueError, match=message):
            RadImageNetDataModule(shards=str(tmp_path), colour=not colour).setup()


def test_shards_without_litdata_say_what_to_install(root, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: builtins.__import__(f"missing_{name}"))
    with pytest.raises(ImportError, match=r"pip install 'fairdiff_lightning\[shards\]'"):
        module(root).write_shards(tmp_path / "shards")


class TestShards:
    """Shards, where litdata is installed."""

    @pytest.fixture(autouse=True)
    def _litdata(self):
        pytest.importorskip("litdata", reason="shards need the extra 'shards'")

    @pytest.fixture
    def shards(self, root, tmp_path, monkeypatch):
        monkeypatch.setattr("fairdiff_lightning.data.radimagenet_shards.SECTION", 2)
        module(root, edges=ScharrEdges()).write_shards(tmp_path / "shards", samples_per_shard=4)
        return tmp_path / "shards"

    def test_shards_give_the_samples_of_the_tree(self, root, shards):
        tree, stream = module(root, edges=ScharrEdges()), module("none", shards=str(shards))
        assert stream.prompts == tree.prompts
        for part, loader in (("train", stream.train_dataloader()), ("val", stream.val_dataloader())):
            streamed = list(loader)
            known = {s["id"]: s for s in tree.splits[part]}
            assert sorted(i for batch in streamed for i in batch["id"]) == sorted(known)
            for batch in streamed:
                validate(batch, num_classes=1, intensity_range=(0, 1), batched=True)
                for key in ("image", "edge", "mask"):
                    assert torch.equal(batch[key], torch.stack([known[i][key] for i in batch["id"]]))
                assert batch["prompt"] == [known[i]["prompt"] for i in batch["id"]]
        assert sorted(p.name for p in shards.iterdir()) == ["shards.json", "train", "val"]

    def test_a_network_draws_the_edges_of_shards_and_checks_them(self, root, tmp_path):
        tree = RadImageNetDataModule(str(root), val_fraction=0.25, seed=0, edges=Soft())
        tree.write_shards(tmp_path / "soft", samples_per_shard=8)
        sample = module(None, shards=str(tmp_path / "soft"), edges=Soft(), image_size=(20, 24)).splits["train"][0]
        assert float(sample["edge"].mean()) == pytest.approx(float(sample["image"].mean()) / 2, abs=2 / 255)

    def test_shards_go_on_in_the_middle_of_an_epoch(self, shards):
        whole = module(None, shards=str(shards)).train_dataloader()
        first = module(None, shards=str(shards), num_workers=2).train_dataloader()
        begun = [batch["id"] for batch in islice(first, 2)]
        second = module(None, shards=str(shards)).train_dataloader()
        second.load_state_dict(first.state_dict())
        assert begun + ids(second) == ids(whole)
        whole.sampler.set_epoch(1)
        assert ids(whole)[:2] != begun

    def test_writing_that_was_killed_goes_on(self, root, tmp_path, monkeypatch):
        monkeypatch.setattr("fairdiff_lightning.data.radimagenet_shards.SECTION", 1)
        data, real, drawn = module(root, edges=ScharrEdges()), edges_of, []

        def draw(images, *args, **kwargs):
            if len(drawn) == 4:
                raise KeyboardInterrupt
            drawn.append(len(images))
            return real(images, *args, **kwargs)

        monkeypatch.setattr("fairdiff_lightning.data.radimagenet_samples.edges_of", draw)
        with pytest.raises(KeyboardInterrupt):
            data.write_shards(tmp_path / "shards", 4)
        with pytest.raises(InvalidSampleError, match=r"no shards\.json.*let write_shards go on"):
            module(None, shards=str(tmp_path / "shards"))
        again = []
        monkeypatch.setattr(
            "fairdiff_lightning.data.radimagenet_samples.edges_of", lambda x, **k: again.append(len(x)) or real(x, **k)
        )
        data.write_shards(tmp_path / "shards", 4)
        assert sum(drawn) + sum(again) < 24 + 4 + 1, "only what was not whole is drawn again"
        assert len([i for b in ids(module(None, shards=str(tmp_path / "shards")).train_dataloader()) for i in b]) == 18
        with pytest.raises(ValueError, match="has shards already"):
            data.write_shards(tmp_path / "shards", 4)
        (tmp_path / "shards" / "shards.json").unlink()
        with pytest.raises(ValueError, match="parts of other data or settings"):
            data.write_shards(tmp_path / "shards", 5)

    def test_shards_that_are_gone_or_of_other_edges_are_errors(self, shards):
        with pytest.raises(ValueError, match=r"another detector: .*ScharrEdges.*Leave edges empty"):
            module(None, shards=str(shards), edges=CannyEdges())
        files = sorted((shards / "train").glob("*.bin"))
        for file in files[:2]:
            file.unlink()
        with pytest.raises(InvalidSampleError, match=rf"{files[0].name}: gone.*first of 2 such shards of {len(files)}"):
            module(None, shards=str(shards))


def test_edges_of_a_picture_are_stored_without_loss():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(levels)))), levels)
