import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairdiff_lightning.data import Record, split_units
from fairdiff_lightning.data.splits import check_disjoint, split_records


def record(name, unit=None, split=None, synthetic=False):
    return Record(name, {}, {}, unit or name, split, synthetic)


@given(
    units=st.lists(st.sampled_from([f"u{i}" for i in range(30)]), min_size=3, max_size=80),
    seed=st.integers(0, 5),
    held_out=st.sampled_from([(0.1, 0.1), (0.3, 0.2), (0.01, 0.01)]),
)
def test_units_are_assigned_once_and_no_part_is_empty(units, seed, held_out):
    val, test = held_out
    parts = split_units(units, (1 - val - test, val, test), seed)
    assert parts.keys() == set(units)
    assert parts == split_units(list(reversed(units)), (1 - val - test, val, test), seed), "order does not matter"
    if len(parts) >= 3:
        assert set(parts.values()) == {"train", "val", "test"}


def test_fractions_of_zero_leave_a_part_empty():
    assert set(split_units(map(str, range(9)), (0.5, 0.5, 0.0), 0).values()) == {"train", "val"}
    assert set(split_units(map(str, range(9)), (0.5, 0.0, 0.5), 0).values()) == {"train", "test"}
    assert set(split_units(map(str, range(9)), (1.0, 0.0, 0.0), 0).values()) == {"train"}


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (0.8, 0.3, 0.1), (1.2, -0.1, -0.1)])
def test_fractions_must_be_three_shares(fractions):
    with pytest.raises(ValueError, match="three shares"):
        split_units(["a", "b"], fractions, 0)


def test_the_owners_test_set_stays_and_validation_comes_from_the_rest():
    records = [record(f"t{i}", split="test") for i in range(5)] + [record(f"r{i}", split="train") for i in range(90)]
    splits = split_records(records, (0.8, 0.1, 0.1), 0)
    assert {r.id for r in splits["test"]} == {f"t{i}" for i in range(5)}
    assert (len(splits["train"]), len(splits["val"])) == (80, 10)


@given(blank=st.integers(0, 9), unmarked=st.sampled_from([None, "age"]), seed=st.integers(0, 3))
def test_what_is_marked_for_training_is_never_tested_on(blank, unmarked, seed):
    marked = [Record(f"t{i}", {}, {"age": i % 2 - 1}, f"t{i}", "train") for i in range(20)]
    free = [Record(f"b{i}", {}, {"age": 0}, f"b{i}") for i in range(blank)]
    shared = Record("again", {}, {"age": 0}, "t3")  # of a patient whose other image is marked
    splits = split_records([*marked, *free, shared], (0.8, 0.1, 0.1), seed, unmarked)
    check_disjoint(splits)
    assert {r.id for r in splits["test"]} <= {r.id for r in free}
    assert bool(splits["test"]) == (blank > 0)
    assert {r.id for r in splits["val"]} & {r.id for r in marked}, "they may validate"
    assert sum(map(len, splits.values())) == 21 + blank
    assert splits["test"] == split_records(free, (0.8, 0.1, 0.1), seed)["test"]
    everything = split_records([*marked, *free], (0, 0, 1), seed, unmarked)
    assert len(everything["test"]) == 20 + blank


@given(known=st.integers(0, 20), unknown=st.integers(0, 20), seed=st.integers(0, 3))
def test_units_of_unknown_attribute_do_not_move_the_others(known, unknown, seed):
    sure = [Record(f"k{i}", {}, {"age": 0}, f"k{i}") for i in range(known)]
    unsure = [Record(f"u{i}", {}, {"age": -1}, f"u{i}") for i in range(unknown)]
    alone = split_records(sure, (0.6, 0.2, 0.2), seed, "age")
    both = split_records([*unsure, *sure], (0.6, 0.2, 0.2), seed, "age")
    assert {part: [r for r in records if r in sure] for part, records in both.items()} == alone
    assert sum(map(len, both.values())) == known + unknown


def test_a_unit_in_two_splits_and_synthetic_evaluation_are_refused():
    with pytest.raises(ValueError, match=r"'p'.*train.*test"):
        check_disjoint({"train": [record("a", "p")], "test": [record("b", "p")]})
    with pytest.raises(ValueError, match="synthetic sample 'x'"):
        check_disjoint({"val": [record("x", synthetic=True)]})
