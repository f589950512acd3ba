"""A generator whose images and masks are a function of the request's seed, so that every file can be checked."""

import csv
import hashlib
import warnings

import numpy as np
import pytest
import torch
from callback_fakes import trainer

from fairdiff_lightning.callbacks import SyntheticDatasetWriter
from fairdiff_lightning.callbacks.manifest import Manifest
from fairdiff_lightning.data import FairSeg, FairSegDataModule, GenerationPlan, HAM10000DataModule
from fairdiff_lightning.data.provenance import TRAINING_CASES, read_training_cases
from fairdiff_lightning.diffusion import gaussian, generators
from fairdiff_lightning.modules import GenerativeModule


class Painter(GenerativeModule):
    def __init__(self, channels=1, brightness=0.5, masks_only=False, dies_after=None):
        super().__init__(torch.optim.SGD, None, "step", 0)
        self.save_hyperparameters(ignore=["dies_after"])
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.dies_after, self.batches = dies_after, []

    def losses(self, batch):
        return {"loss": self.weight.sum()}

    def generate(self, requests):
        if self.dies_after is not None and len(self.batches) == self.dies_after:
            raise RuntimeError("power cut")
        self.batches.append(list(requests["id"]))
        random = generators(requests["seed"])
        size = len(random)
        noise = gaussian(torch.empty(size, self.hparams["channels"], 12, 16), random)
        disc = torch.zeros(size, 1, 12, 16, dtype=torch.int64)
        disc[:, :, 2:10, 2:12] = 1
        mask = requests.get("mask", disc)
        image = (self.hparams["brightness"] + 0.1 * noise).clamp(0, 1)
        return {"mask": mask} if self.hparams["masks_only"] else {"image": image, "mask": mask}


def predict(folder, module, plan, batch_size=4, data_class=FairSegDataModule, **arguments):
    data = data_class(image_size=(12, 16), batch_size=batch_size, generate=plan, **arguments)
    assert trainer(folder, SyntheticDatasetWriter(str(folder))).predict(module, data) is None
    return folder


def rows(folder):
    with (folder / "manifest.csv").open(newline="") as stream:
        return {row["id"]: row for row in csv.DictReader(stream)}


def content(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.npz"))}


def arrays(path):
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def test_samples_read_back_and_are_listed_with_where_they_come_from(tmp_path):
    predict(tmp_path, Painter(), GenerationPlan(per_group=3, masks="train", seed=5))
    listed = rows(tmp_path)
    assert list(listed) == [f"synthetic_{g}_{i:05d}" for g in ("Asian", "Black", "White") for i in range(3)]
    index = {r.id: r for r in FairSeg().index(tmp_path).records}
    assert index.keys() == listed.keys()
    for name, row in listed.items():
        record = index[name]
        assert record.synthetic
        assert record.source == row["source"] == row["condition"]
        assert FairSeg().attributes["race"].groups[record.attributes["race"]] == row["race"]
        assert (row["generator"], len(row["checkpoint"])) == ("Painter", 64)
        assert (tmp_path / row["config"]).read_text().count("brightness") == 1
        noise = torch.randn(1, 1, 12, 16, generator=torch.Generator().manual_seed(int(row["seed"])))
        expected = (0.5 + 0.1 * noise[0, 0]).clamp(0, 1).mul(255).round().numpy()
        assert np.array_equal(arrays(tmp_path / row["file"])["slo_fundus"], expected)
    assert not list(tmp_path.glob(".*"))


def test_a_killed_run_goes_on_and_ends_with_the_same_files(tmp_path):
    plan = GenerationPlan(total=11, seed=2)
    whole = predict(tmp_path / "whole", Painter(), plan)
    with pytest.raises(RuntimeError, match="power cut"):
        predict(tmp_path / "killed", Painter(dies_after=2), plan)
    assert len(content(tmp_path / "killed")) == 8
    assert not (tmp_path / "killed" / "manifest.csv").exists()
    (unlisted,) = (tmp_path / "killed").glob(".manifest-0.csv")
    lines = unlisted.read_text().splitlines(keepends=True)
    unlisted.write_text("".join(lines[:7]) + lines[7][:20])  # the kill fell into a write of the table
    second = Painter()
    predict(tmp_path / "killed", second, plan)
    assert content(tmp_path / "killed") == content(whole)
    assert rows(tmp_path / "killed") == rows(whole)
    assert [len(batch) for batch in second.batches] == [4, 3]


def test_a_run_killed_before_its_last_line_of_work_is_finished(tmp_path):
    plan = GenerationPlan(total=4)
    whole = rows(predict(tmp_path / "whole", Painter(), plan))
    folder = predict(tmp_path / "killed", Painter(), plan)
    lines = (folder / "manifest.csv").read_text().splitlines(keepends=True)
    (folder / ".manifest-0.csv").write_text("".join(lines))
    (folder / "manifest.csv").unlink()
    again = Painter()
    assert rows(predict(folder, again, plan)) == whole
    assert again.batches == []


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    plan = GenerationPlan(total=5)
    predict(tmp_path, Painter(), plan)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.npz")}
    again = Painter()
    predict(tmp_path, again, plan)
    assert again.batches == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.npz")} == before
    assert len(rows(tmp_path)) == 5


def test_a_larger_plan_adds_to_the_folder(tmp_path):
    predict(tmp_path, Painter(), GenerationPlan(per_group=2))
    first = content(tmp_path)
    predict(tmp_path, Painter(), GenerationPlan(per_group=3))
    assert first.items() <= content(tmp_path).items()
    assert len(rows(tmp_path)) == 9


@pytest.mark.parametrize("batch_size", [1, 8])
def test_samples_do_not_depend_on_the_batch(tmp_path, batch_size):
    plan = GenerationPlan(total=9)
    assert content(predict(tmp_path / "a", Painter(), plan)) == content(
        predict(tmp_path / "b", Painter(), plan, batch_size)
    )


@pytest.mark.parametrize(
    ("module", "plan"),
    [(Painter(brightness=0.4), GenerationPlan(total=3)), (Painter(), GenerationPlan(total=3, seed=1))],
)
def test_a_folder_of_another_generator_or_seed_is_refused(tmp_path, module, plan):
    predict(tmp_path, Painter(), GenerationPlan(total=3))
    with pytest.raises(
        ValueError, match=r"'synthetic_Asian_00000' of another run: (config|seed) '.*another output_dir"
    ):
        predict(tmp_path, module, plan)
    assert len(rows(tmp_path)) == 3


def test_other_weights_of_the_same_settings_are_refused_without_a_checkpoint_too(tmp_path):
    predict(tmp_path, Painter(), GenerationPlan(total=3))
    again, other = Painter(), Painter()
    predict(tmp_path, again, GenerationPlan(total=3))
    assert again.batches == []
    torch.nn.init.constant_(other.weight, 2)
    with pytest.raises(ValueError, match=r"of another run: checkpoint '.*another output_dir"):
        predict(tmp_path, other, GenerationPlan(total=3))


def test_samples_that_followed_other_masks_are_refused(tmp_path):
    for folder, seed in (("masks", 0), ("others", 1)):
        predict(tmp_path / folder, Painter(masks_only=True), GenerationPlan(per_group=2, seed=seed))
    images = tmp_path / "images"
    predict(images, Painter(), GenerationPlan(per_group=2, masks=str(tmp_path / "masks")))
    before = content(images)
    with pytest.raises(ValueError, match="of another run: condition_digest '"):
        predict(images, Painter(), GenerationPlan(per_group=2, masks=str(tmp_path / "others")))
    with pytest.raises(ValueError, match="of another run: condition 'synthetic_Asian_00000', here 'data_"):
        predict(images, Painter(), GenerationPlan(per_group=2, masks="train"))
    with pytest.raises(ValueError, match="of another run: condition 'synthetic_Asian_00000', here ''"):
        predict(images, Painter(), GenerationPlan(per_group=2))
    predict(tmp_path / "masks", Painter(masks_only=True), GenerationPlan(per_group=3))
    predict(images, Painter(), GenerationPlan(per_group=3, masks=str(tmp_path / "masks")))
    assert before.items() <= content(images).items(), "more masks of the same generator are welcome"


def test_the_checkpoint_is_listed_by_its_hash_and_another_one_is_refused(tmp_path):
    plan = GenerationPlan(total=3)
    run = trainer(tmp_path)
    checkpoints = []
    for i in range(2):
        module = Painter()
        torch.nn.init.constant_(module.weight, i)
        run.strategy.connect(module)
        run.save_checkpoint(tmp_path / f"{i}.ckpt")
        checkpoints.append(tmp_path / f"{i}.ckpt")
    for path in checkpoints:
        data = FairSegDataModule(image_size=(12, 16), batch_size=4, generate=plan)
        writing = trainer(tmp_path, SyntheticDatasetWriter(str(tmp_path / "made")))
        if path == checkpoints[0]:
            writing.predict(Painter(), data, ckpt_path=path, return_predictions=False)
        else:
            with pytest.raises(ValueError, match="checkpoint"):
                writing.predict(Painter(), data, ckpt_path=path, return_predictions=False)
    digest = hashlib.sha256(checkpoints[0].read_bytes()).hexdigest()
    assert {row["checkpoint"] for row in rows(tmp_path / "made").values()} == {digest}


def folded(fold, **arguments):
    data = FairSegDataModule(image_size=(12, 16), fold=fold, fractions=(0.9, 0.1, 0.0), **arguments)
    data.prepare_data()
    data.setup()
    return data


def test_a_generator_that_is_loaded_without_the_trainer_is_known_by_what_it_has_seen(tmp_path):
    data = folded(0)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(Painter(), data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    module, plan = Painter.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True), GenerationPlan(total=3)
    predict(tmp_path / "made", module, plan, fold=0, fractions=(0.9, 0.1, 0.0))
    seen = read_training_cases(tmp_path / "made")
    assert {mark.partition("\t")[0] for mark in seen} == {record.id for record in data.splits["train"]}
    folded(0, synthetic=[str(tmp_path / "made")]).train_dataloader()
    with pytest.raises(ValueError, match=r"generator of '.*made' was trained on \d+ validation or test cases"):
        folded(1, synthetic=[str(tmp_path / "made")]).train_dataloader()
    with pytest.raises(ValueError, match=r"the generator Painter was trained on \d+ validation or test cases: 'data_"):
        predict(tmp_path / "other", module, plan, fold=1, fractions=(0.9, 0.1, 0.0))
    assert not (tmp_path / "other").exists()


def test_training_does_not_start_from_weights_that_have_seen_held_out_cases(tmp_path):
    module = Painter()
    module.training_cases = frozenset(folded(0).state_dict()["training_cases"])
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"what Painter starts from was trained on \d+ .* test cases: 'data_"):
        run.fit(module, folded(1))
    assert run.global_step == 0


@pytest.mark.parametrize("other", [{"prompt": "left"}, {"crop": 600}])
def test_a_folder_of_samples_that_were_read_otherwise_is_refused(tmp_path, other):
    predict(tmp_path / "made", Painter(), GenerationPlan(total=3), prompt="right")
    predict(tmp_path / "made", Painter(), GenerationPlan(total=6), prompt="right")
    with pytest.raises(ValueError, match=r"of another run: config 'generator-"):
        predict(tmp_path / "made", Painter(), GenerationPlan(total=6), **{"prompt": "right", **other})


def test_what_module_and_data_module_know_is_joined(tmp_path):
    module, data = Painter(), FairSegDataModule(image_size=(12, 16), batch_size=4, generate=GenerationPlan(total=3))
    module.training_cases, data.training_cases = frozenset(["a\t1", "b\t2"]), frozenset(["b\t2", "c\t3"])
    trainer(tmp_path, SyntheticDatasetWriter(str(tmp_path / "made"))).predict(module, data)
    assert read_training_cases(tmp_path / "made") == {"a\t1", "b\t2", "c\t3"}


def test_a_generator_of_which_nothing_is_known_is_named(tmp_path):
    with pytest.warns(UserWarning, match="nothing is known of what the generator Painter was trained on") as told:
        predict(tmp_path, Painter(), GenerationPlan(total=3))
    assert sum("nothing is known" in str(warning.message) for warning in told) == 1
    assert not (tmp_path / TRAINING_CASES).exists()
    known = Painter()
    known.training_cases = frozenset(["a\t1"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="nothing is known")
        predict(tmp_path / "known", known, GenerationPlan(total=3))


def test_masks_of_one_generator_condition_the_next(tmp_path):
    predict(tmp_path / "masks", Painter(masks_only=True), GenerationPlan(per_group=2))
    plan = GenerationPlan(per_group=3, masks=str(tmp_path / "masks"))
    predict(tmp_path / "images", Painter(), plan)
    made = rows(tmp_path / "images")
    assert {row["condition"] for row in made.values()} == set(rows(tmp_path / "masks"))
    assert {row["source"] for row in made.values()} == {""}
    data = FairSegDataModule(synthetic=[str(tmp_path / "images")], image_size=(12, 16), drop_unknown=True)
    data.prepare_data()
    data.setup()
    assert sum(r.synthetic for r in data.splits["train"]) == 9


def test_colour_images_are_written_and_read_in_their_layout(tmp_path):
    plan = GenerationPlan(per_group=2, masks="train")
    predict(tmp_path, Painter(channels=3), plan, data_class=HAM10000DataModule, drop_unknown=True)
    data = HAM10000DataModule(synthetic=[str(tmp_path)], image_size=(12, 16), drop_unknown=True)
    data.prepare_data()
    data.setup()
    made = [r for r in data.splits["train"] if r.synthetic]
    assert len(made) == 10
    assert {r.source for r in made} == {row["source"] for row in rows(tmp_path).values()}


def test_a_plan_that_asks_for_nothing_says_so(tmp_path, caplog):
    races = dict.fromkeys(range(10), 0) | dict.fromkeys(range(10, 20), 1) | dict.fromkeys(range(20, 30), 2)
    pixels = {"slo_fundus": np.zeros((12, 16), np.uint8), "disc_cup_mask": np.zeros((12, 16), np.int8)}
    for folder in ("real", "made"):
        (tmp_path / folder).mkdir()
    for i, race in races.items():
        np.savez(tmp_path / "real" / f"data_{i:05d}.npz", **pixels, race=race)
    plan = GenerationPlan(equal_scale=True, total=3)
    with caplog.at_level("INFO"):
        predict(tmp_path / "made", Painter(), plan, root=str(tmp_path / "real"), race_codes="public")
    assert "The plan asks for nothing: no group lacks a sample." in caplog.text
    assert rows(tmp_path / "made") == {}


def test_a_run_leaves_the_data_module_as_it_was(tmp_path):
    data = FairSegDataModule(image_size=(12, 16), batch_size=4, generate=GenerationPlan(total=6))
    trainer(tmp_path, SyntheticDatasetWriter(str(tmp_path / "made"))).predict(Painter(), data)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path, SyntheticDatasetWriter(str(tmp_path / "more"))).predict(Painter(dies_after=1), data)
    second = Painter()
    trainer(tmp_path).predict(second, data)
    assert sum(map(len, second.batches)) == 6


def test_what_a_killed_run_left_half_written_is_swept(tmp_path):
    left = tmp_path / ".synthetic_Asian_00000.npz.abcd1234.part"
    left.write_bytes(b"half")
    predict(tmp_path, Painter(), GenerationPlan(total=3))
    assert not left.exists()


def test_the_source_reaches_the_file_of_a_module_that_does_not_carry_it(tmp_path):
    class Forgetful(Painter):
        def predict_step(self, batch, batch_idx=0):
            return {k: v for k, v in super().predict_step(batch, batch_idx).items() if k not in ("source", "condition")}

    predict(tmp_path, Forgetful(), GenerationPlan(total=3, masks="train"))
    listed = rows(tmp_path)
    sources = {r.id: r.source for r in FairSeg().index(tmp_path).records}
    assert sources == {name: row["condition"] for name, row in listed.items()}
    assert all(sources.values())
    predict(tmp_path, Forgetful(), GenerationPlan(total=3, masks="train"))
    assert rows(tmp_path) == listed


def test_samples_that_nobody_asked_for_are_refused(tmp_path):
    class Other(Painter):
        def generate(self, requests):
            return {**super().generate(requests), "id": [f"{name}b" for name in requests["id"]]}

    with pytest.raises(
        ValueError, match=r"Other.predict_step: sample 'synthetic_Asian_00000b', which nobody asked for"
    ):
        predict(tmp_path, Other(), GenerationPlan(total=3))


def test_a_predict_without_a_plan_says_how_to_give_one(tmp_path):
    with pytest.raises(ValueError, match=r"--data.generate.per_group=N"):
        predict(tmp_path, Painter(), None)


@pytest.mark.parametrize("name", ["manifest.csv", ".manifest-1.csv"])
def test_rows_of_a_run_with_other_attributes_are_not_mixed_in(tmp_path, name):
    (tmp_path / name).write_text("id,file,sex\na,a.npz,male\n")
    with pytest.raises(ValueError, match=rf"{name}' has the columns \['id', 'file', 'sex'\].*another output_dir"):
        Manifest(tmp_path, ("id", "file", "race")).rows()


def test_a_part_that_was_cut_within_its_header_is_begun_again(tmp_path):
    (tmp_path / ".manifest-0.csv").write_text("id,fi")
    table = Manifest(tmp_path, ("id", "file"))
    assert table.rows() == {}
    table.start(0)
    table.append(0, [("a", "a.npz")])
    table.merge()
    assert (tmp_path / "manifest.csv").read_text().split() == ["id,file", "a,a.npz"]
