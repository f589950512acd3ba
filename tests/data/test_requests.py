import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.data import FairSegDataModule, GenerationPlan, InvalidSampleError, Record
from fairdiff_lightning.data.busi import BUSI
from fairdiff_lightning.data.condition_masks import read_masks
from fairdiff_lightning.data.dbt import DBT
from fairdiff_lightning.data.decathlon import Decathlon
from fairdiff_lightning.data.decathlon_slices import DecathlonSlices
from fairdiff_lightning.data.emidec import Emidec
from fairdiff_lightning.data.fairseg import FairSeg
from fairdiff_lightning.data.ham10000 import HAM10000
from fairdiff_lightning.data.lidc import LIDC
from fairdiff_lightning.data.prostate import Prostate
from fairdiff_lightning.data.requests import RequestBatches, make_requests
from fairdiff_lightning.data.sample import AttributeSpec

GROUPS = {0: "Asian", 1: "Black", 2: "<20"}
REAL = {0: 4, 1: 10, 2: 31}


def masks(counts, synthetic=False):
    return [
        Record(f"m{g}-{i}", {}, {"race": g}, f"m{g}-{i}", synthetic=synthetic)
        for g, n in counts.items()
        for i in range(n)
    ]


def made(plan, pool=None):
    return make_requests(plan, GROUPS, REAL, pool, "race")


def ready(**arguments):
    data = FairSegDataModule(**({"image_size": (24, 32), "batch_size": 7} | arguments))
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (GenerationPlan(per_group=5), {0: 5, 1: 5, 2: 5}),
        (GenerationPlan(total=8), {0: 3, 1: 3, 2: 2}),
        (GenerationPlan(equal_scale=True), {0: 11, 1: 5}),
        (GenerationPlan(equal_scale=True, total=60), {0: 16, 1: 10}),
    ],
)
def test_a_plan_asks_for_what_it_says(plan, expected):
    assert Counter(request.group for request in made(plan)) == expected


def test_equal_scale_asks_for_exactly_what_mixing_will_lack():
    data = ready(generate=GenerationPlan(equal_scale=True, total=300))
    asked = Counter(request.group for request in data.requests())
    assert [n + asked[g] for g, n in enumerate(data.group_counts["race"])][:2] == [100, 100]
    assert asked[2] == 0


def test_what_equal_scale_asks_for_by_default_is_just_enough(tmp_path):
    attributes = {"attributes": ["ethnicity"]}
    real = ready(**attributes)
    assert any(r.attributes["ethnicity"] < 0 for r in real.splits["train"])
    asked = ready(generate=GenerationPlan(equal_scale=True), **attributes).requests()
    groups = Counter(request.group for request in asked)
    pixels = {"slo_fundus": np.zeros((12, 16), np.uint8), "disc_cup_mask": np.zeros((12, 16), np.int8)}
    for request in asked:
        np.savez(tmp_path / f"{request.id}.npz", **pixels, ethnicity=request.group, synthetic=1)
    mixing = {"synthetic": [str(tmp_path)], "balance": "equal_scale", **attributes}
    counts = ready(**mixing).group_counts["ethnicity"]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == sum(real.group_counts["ethnicity"])
    (tmp_path / f"{asked[0].id}.npz").unlink()
    with pytest.raises(ValueError, match=r"lacks synthetic samples: \{.*: 1\}"):
        ready(**mixing)
    assert groups.keys() == {1}


def test_a_plan_counts_the_real_samples_and_not_the_balanced_set():
    plan = GenerationPlan(equal_scale=True, masks="train")
    assert ready(generate=plan, balance="oversample").requests() == ready(generate=plan).requests()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"per_group": 3, "total": 9},
        {"per_group": 3, "equal_scale": True},
        {"per_source": 3, "per_group": 3, "masks": "train"},
        {"per_source": 3, "total": 9, "masks": "train"},
        {"per_source": 3, "equal_scale": True, "masks": "train"},
    ],
)
def test_a_plan_says_how_many_once(arguments):
    with pytest.raises(ValueError, match="give one of per_group, per_source, total, or equal_scale"):
        GenerationPlan(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"per_group": 0}, {"total": -3}, {"total": 0, "equal_scale": True}, {"per_source": 0, "masks": "train"}],
)
def test_a_plan_asks_for_one_sample_or_more(arguments):
    with pytest.raises(ValueError, match=r"(per_group|per_source|total)=(0|-3); ask for 1 sample or more"):
        GenerationPlan(**arguments)


@pytest.mark.parametrize(
    "places", [{}, {"backgrounds": "healthy", "masks": "own"}, {"backgrounds": "healthy", "masks": "train"}]
)
def test_samples_of_each_mask_need_masks_and_no_backgrounds(places):
    with pytest.raises(ValueError, match=r"per_source=2 with masks=.* Give masks='train' or a folder of masks"):
        GenerationPlan(per_source=2, **places)


@pytest.mark.parametrize("synthetic", [False, True])
def test_every_mask_is_followed_by_as_many_samples_whatever_its_group(synthetic):
    pool = masks({0: 1, 1: 4, -1: 2, 7: 3}, synthetic)  # none of group 2; 7 is left out by a filter
    asked = made(GenerationPlan(per_source=3, masks="train"), pool)
    assert Counter(r.condition.id for r in asked) == dict.fromkeys(
        ["m0-0", *[f"m1-{i}" for i in range(4)], "m-1-0", "m-1-1"], 3
    )
    assert all(r.group == r.condition.attributes["race"] for r in asked)
    assert len({r.id for r in asked}) == len({r.seed for r in asked}) == 21
    assert asked == made(GenerationPlan(per_source=3, masks="train"), pool)
    more = {r.id: r for r in made(GenerationPlan(per_source=5, masks="train"), pool)}
    assert [more[r.id] for r in asked] == asked
    grouped = {r.id: r for r in made(GenerationPlan(per_group=3, masks="train"), masks({0: 1, 1: 4, 2: 1}, synthetic))}
    assert all(grouped[r.id].seed == r.seed for r in asked if r.id in grouped)


def test_no_mask_for_so_many_samples_each_is_said():
    with pytest.raises(ValueError, match="per_source=3, but 'train' has no mask of a wanted group"):
        made(GenerationPlan(per_source=3, masks="train"), masks({7: 3}))


def test_each_training_image_gets_as_many_samples_without_attributes_too():
    for attributes in ([], ["race"]):
        data = ready(attributes=attributes, generate=GenerationPlan(per_source=2, masks="train"))
        assert Counter(r.condition.id for r in data.requests()) == {r.id: 2 for r in data.splits["train"]}


@pytest.mark.parametrize("plan", [GenerationPlan(per_source=50, masks="train"), GenerationPlan(total=153)])
def test_the_samples_of_a_mask_are_counted(plan):
    asked = made(plan, masks({0: 1, 1: 1, 2: 1}))
    rounds = {g: [r.round for r in asked if r.group == g] for g in GROUPS}
    assert rounds == {g: list(range(len(asked) // 3)) for g in GROUPS}
    asked = made(GenerationPlan(per_group=7), masks({0: 3, 1: 7, 2: 2}))
    followed = {}
    for request in asked:
        followed.setdefault(request.condition.id, []).append(request.round)
    assert all(found == list(range(len(found))) for found in followed.values())
    assert [r.round for r in made(GenerationPlan(per_group=4)) if r.group == 1] == [0, 1, 2, 3]
    batch = RequestBatches(asked, 6, ["race"], lambda request: {})[1]
    assert batch["round"].tolist() == [r.round for r in asked[6:12]]
    assert batch["round"].dtype == torch.int64


def test_equal_scale_needs_an_attribute():
    with pytest.raises(ValueError, match="equal_scale without attributes"):
        ready(attributes=[], generate=GenerationPlan(equal_scale=True)).requests()


@settings(max_examples=30, deadline=None)
@given(small=st.integers(1, 12), more=st.integers(0, 9), seed=st.integers(0, 5))
def test_a_larger_plan_begins_with_the_smaller_one(small, more, seed):
    pool = masks({0: 3, 1: 4, 2: 1})
    first = made(GenerationPlan(per_group=small, seed=seed), pool)
    second = {r.id: r for r in made(GenerationPlan(per_group=small + more, seed=seed), pool)}
    assert [second[r.id] for r in first] == first
    assert len({r.seed for r in second.values()}) == len(second)
    assert not {r.seed for r in made(GenerationPlan(per_group=small, seed=seed + 1))} & {r.seed for r in first}


def test_every_mask_of_a_group_is_used_before_one_is_used_again():
    asked = made(GenerationPlan(per_group=7), masks({0: 3, 1: 7, 2: 2}))
    used = {g: Counter(r.condition.id for r in asked if r.group == g) for g in GROUPS}
    assert sorted(used[0].values()) == [2, 2, 3]
    assert set(used[1].values()) == {1}
    assert all(r.condition.attributes["race"] == r.group for r in asked)
    firsts = {made(GenerationPlan(per_group=1, seed=s), masks({0: 9, 1: 9, 2: 9}))[0].condition.id for s in range(9)}
    assert len(firsts) > 3


def test_more_generated_masks_change_no_request_that_had_one_of_its_own():
    small, large = masks({0: 5, 1: 5, 2: 5}, synthetic=True), masks({0: 9, 1: 7, 2: 5}, synthetic=True)
    plan = GenerationPlan(per_group=5, seed=3)
    assert made(plan, small) == made(plan, large)
    assert [r.condition.id for r in made(plan, small)[:5]] == [f"m0-{i}" for i in range(5)]
    twice = made(GenerationPlan(per_group=12, seed=3), small)
    assert Counter(r.condition.id for r in twice if r.group == 0) == {
        "m0-0": 3,
        "m0-1": 3,
        "m0-2": 2,
        "m0-3": 2,
        "m0-4": 2,
    }


def test_a_group_without_masks_is_named():
    with pytest.raises(ValueError, match=r"no mask of 'race' Black in 'masks', but 2 samples"):
        made(GenerationPlan(per_group=2, masks="masks"), masks({0: 3, 2: 3}))


def test_ids_are_file_names_and_tell_the_group():
    asked = [r.id for r in made(GenerationPlan(per_group=1))]
    assert asked == ["synthetic_Asian_00000", "synthetic_Black_00000", "synthetic_below-20_00000"]


def test_batches_keep_their_composition_when_a_part_is_done():
    asked = made(GenerationPlan(per_group=4))
    whole = RequestBatches(asked, 5, ["race", "sex"], dict)
    done = frozenset(r.id for r in [*asked[:5], asked[6]])
    rest = RequestBatches(asked, 5, ["race", "sex"], dict, done)
    assert [len(b["id"]) for b in whole] == [5, 5, 2]
    assert [b["id"] for b in rest] == [b["id"] for b in whole][1:]
    assert whole[1]["attributes"]["sex"].tolist() == [-1] * 5
    assert whole[1]["attributes"]["race"].tolist() == [1, 1, 1, 2, 2]
    assert whole[2]["seed"].tolist() == [r.seed for r in asked[10:]]
    assert whole[2]["seed"].dtype == torch.int64


def test_the_loader_yields_requests_with_masks_of_training_cases_only():
    data = ready(generate=GenerationPlan(per_group=9, masks="train"), num_workers=1)
    by_id = {r.id: r for r in data.splits["train"]}
    seen = Counter()
    for batch in data.predict_dataloader():
        assert batch["mask"].shape[1:] == (1, 24, 32)
        for source, condition, group in zip(
            batch["source"], batch["condition"], batch["attributes"]["race"].tolist(), strict=True
        ):
            assert source == condition
            assert by_id[source].attributes["race"] == group
            seen[group] += 1
    assert seen == {0: 9, 1: 9, 2: 9}


def test_training_masks_are_the_ones_that_training_sees():
    data = ready(generate=GenerationPlan(per_group=2, masks="train"))
    train = data._data("train")
    position = {r.id: i for i, r in enumerate(train.records)}
    for batch in data.predict_dataloader():
        for condition, mask in zip(batch["condition"], batch["mask"], strict=True):
            assert torch.equal(mask, train[position[condition]]["mask"])


def test_other_processes_can_read_the_requests():
    data = ready(generate=GenerationPlan(per_group=2, masks="train"))
    data.skip_requests(lambda: ["synthetic_Asian_00000"])
    batches = data.predict_dataloader().dataset
    copy = pickle.loads(pickle.dumps(batches))  # what a spawned worker gets
    assert torch.equal(copy[0]["mask"], batches[0]["mask"])


def test_data_without_attributes_have_one_group():
    data = ready(attributes=[], generate=GenerationPlan(total=9))
    (first, second) = data.predict_dataloader()
    assert [*first["id"], *second["id"]] == [f"synthetic_sample_{i:05d}" for i in range(9)]
    assert first["attributes"] == {}


def table(folder, row):
    folder.mkdir(exist_ok=True)
    (folder / "a.npz").write_bytes(b"")
    (folder / "manifest.csv").write_text("id,file,seed,race,condition,source\n" + row + "\n")
    return folder


SPECS = [AttributeSpec("race", ("Asian", "Black"))]


def test_masks_are_read_from_the_table(tmp_path):
    (record,) = read_masks(table(tmp_path / "m", "a,a.npz,1,Black,,case7"), FairSeg(), SPECS)
    assert (record.id, record.attributes, record.source) == ("a", {"race": 1}, "case7")
    assert read_masks(table(tmp_path / "m", "a,a.npz,1,unknown,,"), FairSeg(), SPECS)[0].attributes == {"race": -1}


@pytest.mark.parametrize(
    ("dataset", "size"),
    [
        (FairSeg(), (4, 6)),
        (HAM10000(), (4, 6)),
        (DBT(), (4, 6)),
        (BUSI(), (4, 6)),
        (LIDC(), (4, 6, 2)),
        (Emidec(), (4, 6, 2)),
        (Prostate(), (4, 6, 2)),
        (Decathlon(), (4, 6, 2)),
        (DecathlonSlices(), (4, 6)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_masks_of_generated_pairs_are_followed_and_not_their_images(tmp_path, dataset, size):
    mask = torch.zeros(1, *size, dtype=torch.int64)
    mask[:, 1:3, 2:4] = 1
    image = torch.rand(dataset.channels, *size)
    attributes = {name: torch.tensor(0) for name in dataset.attributes}
    pair = {"id": "made", "image": image, "mask": mask, "attributes": attributes, "synthetic": torch.tensor(True)}
    written = {
        "pair": dataset.write(tmp_path / "pair", pair),
        "mask": dataset.write_mask(tmp_path / "mask", "made", mask[0].numpy().astype(np.uint8)),
    }
    for folder, path in written.items():
        name = path.relative_to(tmp_path / folder)
        (tmp_path / folder / "manifest.csv").write_text(f"id,file,seed\nmade,{name},1\n")
        (record,) = read_masks(tmp_path / folder, dataset, [])
        assert np.array_equal(dataset.read_mask(record), mask[0]), folder


def test_masks_of_one_id_that_were_made_otherwise_are_told_apart(tmp_path):
    (first,), (again,), (other,) = (
        read_masks(table(tmp_path / folder, f"a,a.npz,{seed},Black,,"), FairSeg(), SPECS)
        for folder, seed in (("m", 1), ("n", 1), ("n", 2))
    )
    assert first.digest == again.digest != other.digest


def test_predictions_of_held_out_cases_are_no_masks_to_follow(tmp_path):
    held_out = ready().splits["test"][0].id
    (tmp_path / "a.npz").write_bytes(b"")
    (tmp_path / "manifest.csv").write_text(f"id,file\n{held_out},a.npz\n")
    with pytest.raises(ValueError, match=f"test case '{held_out}'"):
        ready(attributes=[], generate=GenerationPlan(total=3, masks=str(tmp_path))).requests()


@pytest.mark.parametrize(
    ("row", "message"),
    [("a,b.npz,1,Black,,", "missing file '.*b.npz'"), ("a,a.npz,1,Green,,", "'Green'. Expected one of Asian, Black")],
)
def test_wrong_rows_are_named(tmp_path, row, message):
    with pytest.raises(InvalidSampleError, match=message):
        read_masks(table(tmp_path / "m", row), FairSeg(), SPECS)


def test_a_folder_without_a_table_is_refused(tmp_path):
    with pytest.raises(InvalidSampleError, match=r"manifest.csv: no such file.*predict"):
        ready(generate=GenerationPlan(total=3, masks=str(tmp_path))).requests()


def test_masks_derived_from_held_out_cases_are_refused(tmp_path):
    held_out = ready().splits["test"][0].id
    folder = table(tmp_path / "m", f"a,a.npz,1,Black,,{held_out}")
    with pytest.raises(ValueError, match=f"'a' .* test case '{held_out}'"):
        ready(generate=GenerationPlan(total=3, masks=str(folder))).requests()
