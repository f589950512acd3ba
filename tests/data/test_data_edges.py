import cv2
import numpy as np
import pytest
import torch

from fairdiff_lightning.data import (
    CannyEdges,
    FairSegDataModule,
    GenerationPlan,
    LIDCDataModule,
    PatchMerge,
    ScharrEdges,
    edges_of,
    label_contour,
)
from fairdiff_lightning.data.busi import BUSIDataModule
from fairdiff_lightning.data.seeding import generator
from fairdiff_lightning.networks.hed import HED


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def ready(module_class=BUSIDataModule, **arguments):
    data = module_class(**({"image_size": (24, 32), "edges": "scharr", "seed": 0} | arguments))
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
def test_every_sample_carries_the_edges_of_its_image_and_labels(cache):
    data = ready(cache=cache)
    for _ in range(2):
        sample = data._data("train")[3]
        assert torch.equal(sample["edge"], edges_of(sample["image"], sample["mask"], ScharrEdges()))
        assert sample["edge"].shape == (1, 24, 32)
        assert (sample["edge"][label_contour(sample["mask"]) == 1] == 1).all()
    batch = next(iter(data.val_dataloader()))
    assert batch["edge"].shape == (len(batch["id"]), 1, 24, 32)


def test_edges_of_one_detector_are_not_taken_for_anothers():
    torch.manual_seed(0)
    found = [ready(edges=edges, cache="disk")._data("val")[0]["edge"] for edges in ("scharr", CannyEdges(), HED())]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_edges_are_drawn_before_loader_processes_start():
    data = ready(num_workers=1, cache="none", batch_size=16)
    data.train_dataloader()
    reader = data.frame.edges
    missed = reader.cache.misses
    assert [data._data("train")[i]["edge"].shape for i in range(48)] == [(1, 24, 32)] * 48
    assert reader.cache.misses == missed, "every edge was stored before"
    assert sum(len(batch["edge"]) for batch in data.train_dataloader()) == 48


def forbid(message):
    def fail(*arguments):
        raise AssertionError(message)

    return fail


def test_stored_edges_cost_no_decoding_of_their_images(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path))
    first = ready(cache="none")
    first.train_dataloader()
    again = ready(cache="none")
    monkeypatch.setattr(type(again.dataset), "read_arrays", forbid("decoded once more"))
    again.train_dataloader()
    monkeypatch.undo()
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path))
    min((tmp_path / "edges").rglob("*.npz")).unlink()
    other = ready(cache="none")
    other.train_dataloader()
    assert other.frame.edges.cache.misses == 1, "what was lost is drawn before loader processes start"
    larger = ready(cache="none", image_size=40)
    larger.train_dataloader()
    assert larger.frame.edges.cache.misses == len(larger.splits["train"])


def test_the_edges_that_requests_follow_are_drawn_before_loader_processes_start(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path))
    data = ready(num_workers=1, generate=GenerationPlan(per_source=2, masks="train"))
    requests = data.predict_dataloader()
    assert data.frame.edges.cache.misses == len(data.splits["train"])
    monkeypatch.setattr(data.frame.edges, "detector", forbid("drawn once more"))
    assert sum(len(batch["id"]) for batch in requests) == 2 * len(data.splits["train"])


def detector(shift=0.0):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.Sigmoid())
    torch.nn.init.constant_(network[0].weight, 0.1)
    torch.nn.init.constant_(network[0].bias, shift)
    return network


@pytest.mark.parametrize("other", ["scharr", CannyEdges(2.0), "network"])
def test_another_detectors_edges_are_refused_with_a_checkpoint(other):
    own = CannyEdges() if other == "scharr" else detector()
    state = ready(edges=own).state_dict()
    ready(edges=CannyEdges() if other == "scharr" else detector()).load_state_dict(state)
    here = ready(edges=detector(0.5) if other == "network" else other)
    with pytest.raises(
        ValueError, match=r"trained on those of .*; here they are drawn by .* the detector of the"
    ) as told:
        here.load_state_dict(state)
    trained, drawn = str(told.value).split("those of ")[1].split("; here they are drawn by ")
    assert trained != drawn.split(", whose edges")[0]
    assert "\n" not in str(told.value)
    ready(edges=None).load_state_dict(state)  # a segmenter's data; a generator of edges asks for them by itself
    here.load_state_dict({"training_cases": state["training_cases"]})  # of before detectors were kept


def test_edges_come_with_outlines_native_masks_and_any_size():
    sample = ready(FairSegDataModule, image_size=64, num_points=16)._data("train")[0]
    assert sample["points"].shape == (16, 3)
    assert sample["edge"].shape == (1, 64, 64)
    sample = ready(evaluate_at="native")._data("val")[0]
    assert sample["native_mask"].shape[1:] == tuple(sample["native_size"].tolist())
    sample = ready(image_size=None)._data("train")[0]
    assert sample["edge"].shape[1:] == sample["image"].shape[1:] == sample["mask"].shape[1:]


def test_a_request_follows_the_edges_of_a_training_image():
    data = ready(prompt="{diagnosis}, Ultrasound", generate=GenerationPlan(total=7, masks="train"))
    real = {sample["id"]: sample for sample in data._data("train")}
    for batch in data.predict_dataloader():
        assert "image" not in batch
        for i, followed in enumerate(batch["condition"]):
            assert torch.equal(batch["edge"][i], real[followed]["edge"])
            assert torch.equal(batch["mask"][i], real[followed]["mask"])
            assert batch["prompt"][i] == real[followed]["prompt"] == f"{followed.split()[0]}, Ultrasound"


def test_generated_masks_have_no_edges(tmp_path):
    (tmp_path / "manifest.csv").write_text("id,file,seed,diagnosis,source\nm,m_mask.png,1,benign,\n")
    cv2.imwrite(str(tmp_path / "m_mask.png"), np.zeros((8, 8), np.uint8))
    plan = GenerationPlan(total=1, masks=str(tmp_path))
    data = ready(generate=plan, groups={"diagnosis": ["benign"]})
    with pytest.raises(ValueError, match=r"'m' is a generated mask, but edges are drawn of real images.*masks='train'"):
        next(iter(data.predict_dataloader()))


@pytest.mark.parametrize("name", ["rotate_flip", "zoom_rotate", None])
def test_augmentation_moves_edges_with_image_and_mask(name):
    data = ready(augmentation=name, image_size=48)
    mask = torch.zeros(8, 1, 48, 48, dtype=torch.int64)
    mask[..., 14:30, 18:38] = 1
    drawn = {"image": mask.float(), "mask": mask, "edge": mask.float(), "id": ["a"] * 8, "attributes": {}}
    moved = data.augment(drawn, generator(0))
    assert not torch.equal(moved["mask"], mask)
    torch.testing.assert_close(moved["edge"], moved["image"], atol=1e-5, rtol=0)
    assert (moved["edge"].round() != moved["mask"]).float().mean() < 0.02


def test_patches_show_the_edges_of_the_same_place():
    data = ready(patch_size=16, augment=False)
    image = torch.rand(2, 1, 24, 32)
    batch = {"image": image, "mask": (image > 0.5).long(), "edge": image.clone(), "id": ["a", "b"], "attributes": {}}
    cut = data.augment(batch, generator(0))
    assert cut["edge"].shape == (2, 1, 16, 16)
    assert torch.equal(cut["edge"], cut["image"])
    assert torch.equal(cut["mask"], (cut["image"] > 0.5).long())


def test_the_prompts_that_samples_can_have_are_told():
    data = ready(prompt="{diagnosis}, Ultrasound", edges=None)
    assert data.prompts == [f"{name}, Ultrasound" for name in (*data.attribute_groups["diagnosis"], "unknown")]
    assert {data._data("train")[i]["prompt"] for i in range(10)} <= set(data.prompts)
    assert ready(prompt="Breast", edges=None).prompts == ["Breast"]
    assert ready(edges=None).prompts == []


def test_a_prompt_names_what_is_known():
    assert ready(prompt="Breast, Ultrasound", edges=None)._data("val")[0]["prompt"] == "Breast, Ultrasound"
    with pytest.raises(ValueError, match=r"names \['race'\]; the samples' `attributes` are \['diagnosis'\]"):
        BUSIDataModule(prompt="{race}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"augmentation": "gamma"},
            "augmentation='gamma' for samples with edges: expected is none, rotate_flip or zoom",
        ),
        ({"augmentation": "zoom_rotate", "edges": None}, "augmentation='zoom_rotate' for samples without edges"),
        ({"augmentation": "blur", "edges": None}, "augmentation 'blur': expected one of contrast"),
        ({"merge": PatchMerge()}, "edges with merge"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BUSIDataModule(**({"edges": "scharr"} | arguments))


@pytest.mark.parametrize("module_class", [BUSIDataModule, LIDCDataModule])
def test_a_classical_augmentation_has_a_name(module_class):
    size = (32, 32, 16) if module_class is LIDCDataModule else 32
    data = ready(module_class, edges=None, augmentation="contrast", image_size=size)
    batch = next(iter(data.train_dataloader()))
    changed = data.augment({**batch}, generator(1))
    assert torch.equal(changed["mask"], batch["mask"])
    assert not torch.equal(changed["image"], batch["image"])
    off = ready(module_class, edges=None, augmentation="contrast", image_size=size, augment=False)
    assert torch.equal(off.augment({**batch}, generator(1))["image"], batch["image"])


def test_edges_of_volumes_are_refused():
    data = ready(LIDCDataModule, image_size=(16, 16, 8))
    with pytest.raises(ValueError, match="Make the slices of a volume a batch"):
        data.train_dataloader()
