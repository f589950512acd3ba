import pytest
import torch
from lightning.pytorch import Trainer

from fairdiff_lightning.data import GenerationPlan, InvalidSampleError, LIDCDataModule, PatchMerge
from fairdiff_lightning.data.busi import BUSIDataModule
from fairdiff_lightning.data.provenance import TRAINING_CASES, marks, write_training_cases
from fairdiff_lightning.data.seeding import generator
from fairdiff_lightning.modules import Segmenter

SIZES = {BUSIDataModule: (24, 32), LIDCDataModule: (16, 16, 8)}
REAL, MADE = 0.75, 0.25


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def ready(module_class=BUSIDataModule, **arguments):
    data = module_class(
        **({"image_size": SIZES[module_class], "seed": 0, "batch_size": 4, "augment": False} | arguments)
    )
    data.prepare_data()
    data.setup()
    return data


def write_partners(folder, data, greys=(MADE,), count=None, change=None):
    """Synthetic samples of training ones, each of one grey, with the same masks."""
    samples = data._data("train")
    for i in range(len(samples) if count is None else count):
        for k, grey in enumerate(greys):
            made = {**samples[i], "image": torch.full_like(samples[i]["image"], grey), "synthetic": torch.tensor(True)}
            data.write_sample(folder, made | {"id": f"s{i:03d}-{k}", "source": samples[i]["id"]} | (change or {}))
    return str(folder)


@pytest.mark.parametrize("module_class", SIZES)
def test_real_samples_come_with_a_partner_of_the_same_mask_and_are_merged_with_it(tmp_path, module_class):
    folder = write_partners(tmp_path / "made", ready(module_class))
    patch = (8, 8) if module_class is BUSIDataModule else (8, 8, 4)
    data = ready(module_class, synthetic=[folder], merge=PatchMerge(0.5, patch), augment=True)
    assert not any(record.synthetic for record in data.splits["train"]), "partners are no samples of their own"
    batch = next(iter(data.train_dataloader()))
    assert torch.allclose(batch["partner"], torch.tensor(MADE), atol=0.01)
    assert batch["partner"].shape == batch["image"].shape
    batch["image"] = torch.full_like(batch["image"], REAL)
    data.augmentation = None
    merged = data.augment(batch, generator(0))
    assert "partner" not in merged
    levels = merged["image"].unique()
    assert ((levels - MADE).abs().lt(0.01) | (levels == REAL)).all()
    assert levels.min() < 0.5 < levels.max(), "patches of both"
    cells = merged["image"][0, 0, : patch[0], : patch[1]].flatten()
    assert (cells - cells[0]).abs().max() < 0.01, "a patch is of one image"
    assert "partner" not in next(iter(data.val_dataloader()))


def test_pairs_are_augmented_alike_before_they_are_merged(tmp_path):
    folder = write_partners(tmp_path / "made", ready())
    data = ready(synthetic=[folder], merge=PatchMerge(0.5, 8, level="logits"), augment=True, image_size=32)
    image = torch.rand(6, 1, 32, 32)
    batch = {"image": image, "partner": 1 - image, "mask": (image > 0.5).long(), "id": ["a"] * 6, "attributes": {}}
    data.augmentation.interpolation = "nearest"
    moved = data.augment(batch, generator(3))
    shown = moved["image"] + moved["partner"] > 0.5  # zero outside of what was rotated
    assert not torch.equal(moved["image"], image)
    assert torch.allclose((moved["image"] + moved["partner"])[shown], torch.ones(()))
    assert moved["keep_real"].dtype == torch.bool
    assert moved["keep_real"].shape == (6, 1, 32, 32)


def test_blocks_of_volumes_and_of_their_partners_lie_at_one_place(tmp_path):
    plain = ready(LIDCDataModule)
    folder, samples = tmp_path / "made", plain._data("train")
    for i, sample in enumerate(samples):
        made = {**sample, "id": f"s{i}", "source": sample["id"], "synthetic": torch.tensor(True)}
        plain.write_sample(folder, made)
    data = ready(LIDCDataModule, synthetic=[str(folder)], merge=PatchMerge(0.5, 4), patch_size=(8, 8, 4))
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape[2:] == (8, 8, 4)
    torch.testing.assert_close(batch["partner"], batch["image"], atol=0.01, rtol=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_another_partner_in_each_epoch_the_same_for_a_seed(tmp_path, num_workers):
    folder = write_partners(tmp_path / "made", ready(), (0.0, 0.5, 1.0))

    def epochs():
        data = ready(synthetic=[folder], merge=PatchMerge(0.5, 8), num_workers=num_workers)
        loader = data.train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            means = {i: float(p.mean()) for b in loader for i, p in zip(b["id"], b["partner"], strict=True)}
            found.append([round(means[name], 2) for name in sorted(means)])
        return found

    first, again = epochs(), epochs()
    assert first == again
    assert first[0] != first[1]
    assert set(first[0]) == {0.0, 0.5, 1.0}


def test_a_sample_without_a_partner_is_trained_on_as_it_is(tmp_path):
    folder = write_partners(tmp_path / "made", ready(), count=3)
    with pytest.warns(UserWarning, match=r"45 of 48 real training samples, .* have no synthetic partner"):
        data = ready(synthetic=[folder], merge=PatchMerge(0.0, 8))
    samples = data._data("train")
    alone = [sample for sample in samples if torch.equal(sample["image"], sample["partner"])]
    assert len(alone) == 45


def test_a_partner_of_another_mask_is_refused_by_name(tmp_path):
    plain = ready()
    other = {"mask": 1 - plain._data("train")[0]["mask"]}
    folder = write_partners(tmp_path / "made", plain, count=1, change=other)
    data = ready(synthetic=[folder], merge=PatchMerge(0.5, 8))
    with pytest.raises(InvalidSampleError, match=r"s000-0.png.*another mask in \d+ of \d+ voxels.*masks='train'"):
        data._data("train")[0]


def test_a_partner_of_another_size_is_refused_by_name(tmp_path):
    folder = write_partners(tmp_path / "made", ready(LIDCDataModule), count=1)
    data = ready(LIDCDataModule, image_size=None, synthetic=[folder], merge=PatchMerge(0.5, 8))
    with pytest.raises(InvalidSampleError, match=r"size \(16, 16, 8\).*xpected \(\d+, \d+, \d+\) and the mask of"):
        data._data("train")[0]


def test_merging_needs_something_to_merge_with():
    with pytest.raises(ValueError, match="merge: there are no synthetic samples to merge with"):
        ready(merge=PatchMerge())
    assert len(ready(merge=PatchMerge(num_synthetic=0))._data("train")[0]["partner"]) == 1


class Mean(torch.nn.Module):
    """Logits that tell which image passed, and when."""

    def __init__(self):
        super().__init__()
        self.norm, self.seen = torch.nn.BatchNorm2d(1), []

    def forward(self, image):
        self.seen.append(float(image.mean()))
        return torch.cat([image, 1 - image], 1)


def test_logits_are_merged_after_a_pass_for_each_image(monkeypatch):
    model = Segmenter(network="unet", in_channels=1, image_size=32)
    model.network = Mean()
    keep = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    keep[..., :16] = True
    batch = {"image": torch.full((2, 1, 32, 32), 0.25), "partner": torch.full((2, 1, 32, 32), 0.75)}
    batch |= {"keep_real": keep, "mask": torch.zeros(2, 1, 32, 32).long(), "attributes": {}, "id": ["a", "b"]}
    given = []
    monkeypatch.setattr(model, "objective", lambda logits, batch: given.append(logits) or logits.mean())
    model.losses(batch)
    assert model.network.seen == [0.25, 0.75], "two passes, so that norms see the images apart"
    assert torch.equal(given[0][:, 0], torch.where(keep[:, 0], 0.25, 0.75))


@pytest.mark.parametrize("level", ["input", "logits"])
def test_segmenters_train_on_merged_volumes(tmp_path, level):
    folder = write_partners(tmp_path / "made", ready(LIDCDataModule))
    merge = PatchMerge(0.5, (8, 8, 4), level=level)
    data = ready(LIDCDataModule, synthetic=[folder], merge=merge, augment=True)
    model = Segmenter("unet", {"channels": (4, 8), "strides": (2,)}, data.num_classes, 1, (16, 16, 8))
    before, seen, losses = [p.clone() for p in model.parameters()], [], model.losses
    model.losses = lambda batch: seen.append("partner" in batch) or losses(batch)
    trainer = Trainer(fast_dev_run=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, data)
    assert seen == [level == "logits"], "at the input the pair is one image already"
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_fold_holds_its_cases_out_once_and_refuses_what_was_made_from_them(tmp_path):
    folds = [ready(fold=fold, fractions=(0.9, 0.1, 0.0)) for fold in range(3)]
    tested = [{record.unit for record in data.splits["test"]} for data in folds]
    assert set.union(*tested) == {r.unit for part in folds[0].splits.values() for r in part}
    assert sum(map(len, tested)) == len(set.union(*tested)) == 60
    assert folds[0].splits["val"]
    folder = write_partners(tmp_path / "made", folds[0])
    for arguments in ({}, {"merge": PatchMerge(0.5, 8)}):
        ready(fold=0, fractions=(0.9, 0.1, 0.0), synthetic=[folder], **arguments)
        with pytest.raises(ValueError, match=r"synthetic sample .*s\d+-0' .* derived from the validation or test case"):
            ready(fold=1, fractions=(0.9, 0.1, 0.0), synthetic=[folder], **arguments)
    with pytest.raises(ValueError, match=r"fold=3 of k=3: expected 0 to 2"):
        ready(fold=3)
    with pytest.raises(ValueError, match=r"fractions=\(0, 0, 1\) with fold=0: no case of the other folds would train"):
        ready(fold=0, fractions=(0, 0, 1))


def test_another_folds_generator_is_refused_by_the_cases_that_it_has_seen(tmp_path):
    first, second = (ready(fold=fold, fractions=(0.9, 0.1, 0.0)) for fold in (0, 1))
    state = first.state_dict()
    ready(fold=0, fractions=(0.9, 0.1, 0.0)).load_state_dict(state)
    leaked = {r.id for r in first.splits["train"]} & {r.id for p in ("val", "test") for r in second.splits[p]}
    with pytest.raises(
        ValueError, match=rf"checkpoint was trained on {len(leaked)} validation or test cases: '"
    ) as told:
        second.load_state_dict(state)
    assert min(leaked) in str(told.value)
    innocent = next(r for r in first.splits["train"] if r.id not in leaked)
    sample = first._data("train")[first._data("train").records.index(innocent)]
    made = {**sample, "id": "s", "source": innocent.id, "synthetic": torch.tensor(True)}
    first.write_sample(tmp_path / "made", made)
    write_training_cases(tmp_path / "made", frozenset(state["training_cases"]))
    assert len((tmp_path / "made" / TRAINING_CASES).read_text().splitlines()) == len(first.splits["train"])
    ready(fold=0, fractions=(0.9, 0.1, 0.0), synthetic=[str(tmp_path / "made")]).train_dataloader()
    with pytest.raises(
        ValueError, match=rf"generator of '.*made' was trained on {len(leaked)} validation or test cases"
    ):
        ready(fold=1, fractions=(0.9, 0.1, 0.0), synthetic=[str(tmp_path / "made")]).train_dataloader()
    plan = GenerationPlan(total=1, masks=str(tmp_path / "made"))
    (tmp_path / "made" / "manifest.csv").write_text("id,file,diagnosis,source\ns,unknown/s_mask.png,benign,\n")
    (tmp_path / "made" / "unknown").mkdir(exist_ok=True)
    (tmp_path / "made" / "unknown" / "s_mask.png").touch()
    with pytest.raises(ValueError, match=r"generator of '.*made' was trained on"):
        ready(fold=1, fractions=(0.9, 0.1, 0.0), generate=plan).requests()


def test_cases_of_one_name_in_two_data_sets_are_told_apart(tmp_path):
    first = ready()
    other = tmp_path / "other"
    first.dataset.write_phantom(other, seed=7)
    elsewhere = ready(root=str(other), fold=1)
    names = {record.id for record in first.splits["train"]}
    assert names & {record.id for record in elsewhere.splits["test"]}
    assert not marks(first.splits["train"]) & marks(elsewhere.splits["test"])
    elsewhere.load_state_dict(first.state_dict())
