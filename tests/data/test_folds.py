import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairdiff_lightning.data import ProstateDataModule, Record
from fairdiff_lightning.data.folds import case_folds, cross_fold_summary, fold_records
from fairdiff_lightning.data.splits import check_disjoint


@pytest.mark.parametrize("count", [32, 41, 147])
def test_folds_in_order_are_the_authors(reference, count):
    expected = reference("diffboost")["kfold_test_[first,last,count]"][str(count)]
    folds = case_folds([f"case_{i:03d}" for i in range(count)])
    assert [[int(fold[0][-3:]), int(fold[-1][-3:]), len(fold)] for fold in folds] == expected
    assert all(fold == sorted(fold) for fold in folds), "contiguous"


@given(slices=st.lists(st.integers(0, 30), min_size=1), k=st.integers(2, 5), seed=st.none() | st.integers(0, 3))
def test_every_case_is_held_out_once(slices, k, seed):
    cases = [f"p{i}" for i in slices]
    if len(set(cases)) < k:
        with pytest.raises(ValueError, match=f"k={k} folds of {len(set(cases))} cases"):
            case_folds(cases, k, seed)
        return
    folds = case_folds(cases, k, seed)
    assert sorted(case for fold in folds for case in fold) == sorted(set(cases))
    assert max(map(len, folds)) - min(map(len, folds)) <= 1


def test_shuffled_folds_depend_on_the_seed_and_not_on_the_order_of_the_files():
    cases = [f"p{i:02d}" for i in range(20)]
    assert case_folds(cases, 3, seed=0) == case_folds(cases[::-1], 3, seed=0)
    assert len({str(case_folds(cases, 3, seed=seed)) for seed in (None, 0, 1)}) == 3


def test_one_fold_alone_is_an_error():
    with pytest.raises(ValueError, match="k=1 folds of 4 cases"):
        case_folds("abcd", 1)


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_slices_of_a_case_stay_together_and_validation_is_no_test_case(seed):
    records = [Record(f"p{i}-{j}", {}, {}, f"p{i}") for i in range(11) for j in range(3)]
    tested = []
    for fold in range(3):
        splits = fold_records(records, fold, val=0.2, seed=seed)
        check_disjoint(splits)
        assert all(splits.values())
        assert sorted(r.id for part in splits.values() for r in part) == sorted(r.id for r in records)
        tested += splits["test"]
    assert sorted(r.id for r in tested) == sorted(r.id for r in records)


def test_cases_that_the_owner_marks_for_the_test_stay_there_in_every_fold():
    marks = {"p1": "test", "p4": "test", "p5": "train"}
    records = [Record(f"p{i}-{j}", {}, {}, f"p{i}", marks.get(f"p{i}")) for i in range(11) for j in range(2)]
    validated = []
    for fold in range(3):
        splits = fold_records(records, fold, val=0.2)
        check_disjoint(splits)
        assert {record.unit for record in splits["test"]} == {"p1", "p4"}
        assert len(splits["train"]) + len(splits["val"]) == 2 * 9
        validated += [record.id for record in splits["val"]]
    assert sorted(validated) == sorted(record.id for record in records if record.split != "test")
    with pytest.raises(ValueError, match="k=3 folds of 2 cases"):
        fold_records([replace(record, split="test") for record in records[:-4]] + records[-4:], 0)


def test_folds_of_a_table_leave_its_test_cases_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path))
    sizes = {"image_size": (16, 16, 8), "patch_size": None, "spacing": None}
    folds = [ProstateDataModule(fold=fold, num_folds=3, **sizes) for fold in range(3)]
    for data in folds:
        data.prepare_data()
        data.setup()
    tested = [{record.id for record in data.splits["test"]} for data in folds]
    assert tested[0] == tested[1] == tested[2]
    assert len(tested[0]) == 16, "as the phantom's table marks them"
    validated = [record.id for data in folds for record in data.splits["val"]]
    assert len(validated) == len(set(validated)) == 24


def test_a_fold_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"fold=3 of k=3: expected 0 to 2"):
        fold_records([Record(str(i), {}, {}, str(i)) for i in range(5)], 3)


def test_summary_over_folds_is_the_authors(reference):
    check = reference("diffboost")["cross_fold_summary"]
    mean, spread = cross_fold_summary(check["fold_means"], check["fold_stds"])
    assert (mean, spread) == pytest.approx((check["mean"], check["pm"]), abs=1e-6)


def test_spread_over_equal_folds_of_equal_mean_is_that_of_all_cases():
    scores = np.array([[0.1, 0.5, 0.9], [0.3, 0.5, 0.7]])
    mean, spread = cross_fold_summary(scores.mean(1).tolist(), scores.std(1).tolist())
    assert mean == pytest.approx(scores.mean())
    assert spread == pytest.approx(math.sqrt(scores.var()))


def test_summary_wants_a_std_for_each_mean():
    with pytest.raises(ValueError, match="2 means and 1 stds"):
        cross_fold_summary([0.5, 0.6], [0.1])
    with pytest.raises(ValueError, match="0 means and 0 stds"):
        cross_fold_summary([], [])
