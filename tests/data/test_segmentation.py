import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fairdiff_lightning.data import (
    HAM10000,
    FairSeg,
    FairSegDataModule,
    GenerationPlan,
    HAM10000DataModule,
    InvalidSampleError,
    validate,
)
from fairdiff_lightning.geometry import mask_to_points


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def ready(module_class=FairSegDataModule, **arguments):
    data = module_class(**({"image_size": (24, 32), "batch_size": 16} | arguments))
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("module_class", [FairSegDataModule, HAM10000DataModule])
@pytest.mark.parametrize("resize", ["area", "zoom"])
def test_every_loader_yields_the_contract(module_class, resize):
    data = ready(module_class, resize=resize)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batch = next(iter(loader))
        validate(
            batch,
            num_classes=data.num_classes,
            attributes=data.attribute_specs,
            intensity_range=data.intensity_range,
            batched=True,
        )
        assert batch["image"].shape[1:] == (data.in_channels, 24, 32)


@pytest.mark.parametrize(("module_class", "attribute"), [(FairSegDataModule, "race"), (HAM10000DataModule, "age")])
def test_phantoms_are_unbalanced_and_shifted_by_group(module_class, attribute):
    data = ready(module_class)
    counts = data.group_counts[attribute]
    assert min(counts) > 0
    assert max(counts) > 3 * min(counts)
    train = data._data("train")
    groups = torch.tensor(train.groups(attribute))
    contrast = torch.stack([_contrast(sample) for sample in train])
    means = [float(contrast[groups == g].mean()) for g in range(len(counts))]
    assert max(means) > 0.05 > -0.02 > min(means), "lesion or disc are bright in some groups and dark in others"


def _contrast(sample):
    image, inside = sample["image"].mean(0), sample["mask"][0] > 0
    return image[inside].mean() - image[~inside].mean()


def test_phantom_is_written_once_and_the_same_everywhere(tmp_path):
    FairSeg().write_phantom(tmp_path / "a", seed=0)
    FairSeg().write_phantom(tmp_path / "b", seed=0)
    for file in list((tmp_path / "a").glob("*.npz"))[::40]:
        with np.load(file) as a, np.load(tmp_path / "b" / file.name) as b:
            assert all(np.array_equal(a[key], b[key]) for key in a.files)


def test_batches_depend_on_the_seed_alone():
    ids = [[i for batch in ready(seed=seed).train_dataloader() for i in batch["id"]] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    assert sorted(ids[0]) == sorted(ids[2])


def test_group_filter_keeps_only_what_is_asked_for():
    data = ready(groups={"race": ["Black"], "gender": ["Female"]})
    kept = [r for records in data.splits.values() for r in records]
    assert {r.attributes["race"] for r in kept} == {1}
    assert {r.attributes["gender"] for r in kept} == {0}


def where(data):
    return {record.id: part for part, records in data.splits.items() for record in records}


@pytest.mark.parametrize(
    "filters",
    [
        {"groups": {"race": ["Asian", "White"]}},
        {"attributes": ["gender"], "drop_unknown": True},
        {"groups": {"gender": ["Male"]}, "drop_unknown": True, "on_error": "skip"},
    ],
)
def test_a_filter_moves_no_case_to_another_split(tmp_path, filters):
    write_folder(tmp_path, [0, 1, 2] * 10, gender=1)
    write_folder(tmp_path, [0, 1, 2, -1] * 5, start=30)
    whole = where(ready(root=str(tmp_path), race_codes="public"))
    if "on_error" in filters:
        mask = np.full((12, 16), 9)
        np.savez(tmp_path / "syn_00007.npz", slo_fundus=mask, disc_cup_mask=mask, race=1, gender=1)
    with pytest.warns(UserWarning, match="Left out"):
        kept = where(ready(root=str(tmp_path), race_codes="public", **filters))
    assert 0 < len(kept) < len(whole) == 50
    assert kept.items() <= whole.items()


def test_lesions_keep_their_split_whatever_is_known_of_them():
    whole = where(ready(HAM10000DataModule))
    with pytest.warns(UserWarning, match="unknown age"):
        kept = where(ready(HAM10000DataModule, drop_unknown=True))
    assert 0 < len(kept) < len(whole)
    assert kept.items() <= whole.items()


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match=r"no 'colour'; it has race, gender.*age"):
        FairSegDataModule(attributes=["colour"])
    with pytest.raises(ValueError, match=r"no group \['Blue'\]; the groups are Asian, Black, White"):
        FairSegDataModule(groups={"race": ["Blue"]})
    with pytest.raises(ValueError, match="name the one to balance"):
        FairSegDataModule(attributes=[], balance="oversample")


def test_a_group_without_training_samples_is_reported(tmp_path):
    write_folder(tmp_path, [0] * 6 + [2] * 6)
    with pytest.warns(UserWarning, match="No training sample of 'race' Black"):
        ready(root=str(tmp_path), race_codes="public")


def test_unknown_groups_are_kept_counted_and_dropped_when_asked(tmp_path):
    write_folder(tmp_path, [0] * 8 + [1] * 8 + [-1] * 4)
    data = ready(root=str(tmp_path), race_codes="public")
    assert sum(table["race"]["unknown"] for table in data.counts().values()) == 4
    with pytest.warns(UserWarning, match="4 unknown race"):
        dropped = ready(root=str(tmp_path), race_codes="public", drop_unknown=True)
    assert sum(table["race"]["unknown"] for table in dropped.counts().values()) == 0


def test_oversampling_and_balanced_sampler_equalise_groups():
    over = ready(balance="oversample")
    assert len(set(over.group_counts["race"])) == 1
    assert over.counts()["test"] == ready().counts()["test"]
    groups = torch.cat([b["attributes"]["race"] for b in ready(sampler="group_balanced").train_dataloader()])
    assert len(set(groups.bincount().tolist())) == 1


def write_folder(folder, races, start=0, **extra):
    for i, race in enumerate(races, start):
        path = folder / f"syn_{i:05d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros((12, 16), np.int8)
        mask[4:8, 4:8] = -1
        np.savez(path, slo_fundus=np.full((12, 16), 9 * race + 20), disc_cup_mask=mask, race=race, **extra)


def test_synthetic_folders_are_read_by_the_same_reader_for_training_only(tmp_path):
    real = ready()
    write_folder(tmp_path, [0] * 60 + [1] * 60)
    data = ready(synthetic=[str(tmp_path)], balance="equal_scale", total=300, race_codes="public")
    assert data.group_counts["race"] == [100, 100, 100]
    made = [r for r in data.splits["train"] if r.synthetic]
    assert len(made) == 200 - sum(real.group_counts["race"][:2])
    assert data.counts()["test"] == real.counts()["test"]
    batch = next(iter(data.train_dataloader()))
    assert batch["synthetic"].any()
    assert not batch["synthetic"].all()


@pytest.mark.parametrize("part", ["val", "test"])
def test_synthetic_samples_of_held_out_cases_are_refused_by_name(tmp_path, part):
    held_out = ready().splits[part][0].id
    write_folder(tmp_path, [0] * 3, source_id=held_out)
    write_folder(tmp_path, [0] * 2, start=3)
    with pytest.raises(ValueError, match=rf"'.*syn_00000' .* test case '{held_out}', as are 2 others"):
        ready(synthetic=[str(tmp_path)], race_codes="public")


def test_copies_of_held_out_cases_are_refused_in_a_folder_of_synthetic_samples(tmp_path):
    record = ready().splits["test"][0]
    (tmp_path / f"{record.id}.npz").write_bytes(Path(record.files["image"]).read_bytes())
    with pytest.raises(ValueError, match=f"derived from the validation or test case '{record.id}'"):
        ready(synthetic=[str(tmp_path)], race_codes="public")


def test_a_held_out_case_is_known_by_its_number_whatever_its_padding(tmp_path):
    held_out = ready().splits["test"][0].id
    number = held_out.removeprefix("data_")
    write_folder(tmp_path, [0], source_id=f"data_0{number}", synthetic=1)
    with pytest.raises(ValueError, match=f"test case 'data_0{number}'"):
        ready(synthetic=[str(tmp_path)], race_codes="public")


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_case_that_is_filtered_out_is_held_out_all_the_same(tmp_path, part):
    held_out = next(r for r in ready(HAM10000DataModule).splits[part] if r.attributes["age"] == 2)
    made = {"image": torch.rand(3, 12, 16), "mask": torch.ones(1, 12, 16), "attributes": {"age": 1}, "id": "made"}
    HAM10000().write(tmp_path, made | {"synthetic": True, "source": held_out.id})
    arguments = {"synthetic": [str(tmp_path)], "groups": {"age": ["20-39"]}}
    with pytest.raises(ValueError, match=f"test case '{held_out.id}'"):
        ready(HAM10000DataModule, **arguments)


def test_synthetic_samples_of_training_cases_are_welcome(tmp_path):
    write_folder(tmp_path, [0] * 3, source_id=ready().splits["train"][0].id)
    data = ready(synthetic=[str(tmp_path)], race_codes="public")
    assert sum(r.synthetic for r in data.splits["train"]) == 3


def test_samples_carry_the_outline_of_their_mask():
    data = ready(num_points=64)
    for _ in range(2):  # decoded, and from the cache
        batch = next(iter(data.val_dataloader()))
        assert batch["points"].shape == (len(batch["id"]), 64, 3)
        assert batch["points"].dtype == torch.float32
        for points, mask in zip(batch["points"], batch["mask"], strict=True):
            torch.testing.assert_close(points, mask_to_points(mask[0], 64))
    assert data.augmentation is None


def test_outlines_and_patches_exclude_each_other():
    with pytest.raises(ValueError, match="num_points=8 with patch_size=16"):
        FairSegDataModule(num_points=8, patch_size=16)


def test_a_mask_without_a_structure_is_named_or_left_out(tmp_path):
    write_folder(tmp_path, [0, 1] * 6)  # a rim, no cup
    cup = np.zeros((12, 16), np.int8)
    cup[2:10, 2:10], cup[4:8, 4:8] = -1, -2
    for i in range(20, 32):
        np.savez(tmp_path / f"cup_{i}.npz", slo_fundus=np.full((12, 16), 9.0), disc_cup_mask=cup, race=1)
    arguments = {"root": str(tmp_path), "race_codes": "public", "num_points": 16}
    with pytest.raises(InvalidSampleError, match=r"syn_0.*cup"):
        list(ready(**arguments).train_dataloader())
    with pytest.warns(UserWarning, match="12 unreadable, the first: .*syn_00000"):
        data = ready(**arguments, on_error="skip")
    assert sum(map(len, data.splits.values())) == 12


def test_two_synthetic_folders_of_one_name_stay_apart(tmp_path):
    for name, race in (("a", 0), ("b", 1)):
        write_folder(tmp_path / name / "made", [race] * 3)
    data = ready(synthetic=[str(tmp_path / "a" / "made"), str(tmp_path / "b" / "made")], race_codes="public")
    train = data._data("train")
    made = [train[i] for i, record in enumerate(train.records) if record.synthetic]
    assert [round(float(s["image"].max() * 255)) for s in made] == [9 * int(s["attributes"]["race"]) + 20 for s in made]
    assert len(made) == 6


def test_an_id_that_comes_twice_is_refused(tmp_path):
    for name in ("a", "b"):
        write_folder(tmp_path / name, [0, 1])
    with pytest.raises(InvalidSampleError, match=r"id 'syn_00000' twice.*a/syn_00000.npz.*b/syn_00000.npz"):
        ready(root=str(tmp_path), race_codes="public")


def test_generated_samples_in_the_root_are_for_training_only(tmp_path):
    write_folder(tmp_path, [0, 1] * 6)
    write_folder(tmp_path, [0] * 5, start=20, synthetic=1)
    data = ready(root=str(tmp_path), race_codes="public")
    assert sum(r.synthetic for r in data.splits["train"]) == 5
    assert not any(r.synthetic for part in ("val", "test") for r in data.splits[part])


@pytest.mark.parametrize("where", ["root", "synthetic"])
def test_truncated_files_are_skipped_when_asked(tmp_path, where):
    write_folder(tmp_path, [0, 1] * 6)
    broken = tmp_path / "syn_00003.npz"
    broken.write_bytes(broken.read_bytes()[:100])
    arguments = {"root": str(tmp_path)} if where == "root" else {"synthetic": [str(tmp_path)]}
    with pytest.warns(UserWarning, match="1 unreadable, the first: .*syn_00003.npz"):
        data = ready(**arguments, race_codes="public", on_error="skip")
    used = [r for part in data.splits.values() for r in part if "syn_" in r.id]
    assert len(used) == 11
    with pytest.raises(InvalidSampleError, match=r"syn_00003.npz: unreadable"):
        ready(**arguments, race_codes="public")


def test_the_seed_of_the_run_reaches_the_data(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert FairSegDataModule().seed == 7
    assert FairSegDataModule(seed=3).seed == 3


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_broken_file_stops_or_is_skipped_and_counted(tmp_path, on_error):
    write_folder(tmp_path, [0, 1] * 6)
    mask = np.full((12, 16), 9)
    np.savez(tmp_path / "syn_00003.npz", slo_fundus=mask, disc_cup_mask=mask, race=0)
    if on_error == "skip":
        with pytest.warns(UserWarning, match=r"1 unreadable.*syn_00003.npz.*\[9\]"):
            data = ready(root=str(tmp_path), race_codes="public", on_error="skip")
        assert sum(map(len, data.splits.values())) == 11
        return
    data = ready(root=str(tmp_path), race_codes="public")
    with pytest.raises(InvalidSampleError, match=r"syn_00003.npz\[disc_cup_mask\].*\[9\]"):
        [list(data._data(part)) for part in ("train", "val", "test")]


def test_an_empty_split_is_an_error_that_names_the_fractions(tmp_path):
    write_folder(tmp_path, [0, 1] * 4)
    data = ready(root=str(tmp_path), race_codes="public", fractions=(1.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"val split.*\(1.0, 0.0, 0.0\)"):
        data.val_dataloader()


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_split_smaller_than_the_number_of_processes_is_refused(tmp_path, part):
    write_folder(tmp_path, [0, 1] * 4)
    data = ready(root=str(tmp_path), race_codes="public", generate=GenerationPlan(total=3))
    data.trainer = SimpleNamespace(world_size=20, global_rank=0)
    with pytest.raises(ValueError, match=rf"the {part} split of '.*' has \d samples for 20 processes"):
        getattr(data, f"{part}_dataloader")()


def test_native_masks_come_with_the_region_they_were_cropped_from():
    data = ready(HAM10000DataModule, evaluate_at="native", crop=100)
    batch = next(iter(data.test_dataloader()))
    assert batch["native_mask"].shape[1:] == (1, 112, 150)
    assert batch["region"][0].tolist() == [6, 25, 100, 100]
    assert batch["native_size"][0].tolist() == [112, 150]


def test_splits_are_stored_as_a_table(tmp_path):
    data = ready(HAM10000DataModule)
    data.write_splits(tmp_path / "splits.csv")
    with (tmp_path / "splits.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["id", "lesion", "split", "synthetic", "age"]
    assert len(rows) == sum(map(len, data.splits.values()))


def test_the_debug_check_finds_a_broken_batch():
    data = ready(check=True)
    batch = next(iter(data.train_dataloader()))
    assert data.on_before_batch_transfer(batch, 0) is batch
    with pytest.raises(ValueError, match="key 'mask'"):
        data.on_before_batch_transfer({**batch, "mask": batch["mask"] + 7}, 0)
