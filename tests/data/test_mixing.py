from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairdiff_lightning.data import Record, equal_scale
from fairdiff_lightning.data.mixing import mix, quotas

GROUPS = {0: "Asian", 1: "Black", 2: "White"}


def records(counts, synthetic=False):
    return [
        Record(f"{g}-{i}{'s' if synthetic else ''}", {}, {"race": g}, f"{g}-{i}", synthetic=synthetic)
        for g, n in counts.items()
        for i in range(n)
    ]


def test_equal_scale_makes_the_shipped_lists(reference):
    check = reference("fairdiff")["dc01_equal_scale"]
    for case, expected in zip(check["inputs"]["cases"], check["expected"], strict=True):
        plan = equal_scale(case["real"], case["N"])
        assert {g: real for g, (real, _) in plan.items()} == expected["real"]
        assert {g: synthetic for g, (_, synthetic) in plan.items()} == expected["syn"]


@given(real=st.dictionaries(st.integers(0, 9), st.integers(0, 50), min_size=1), total=st.integers(0, 300))
def test_equal_scale_gives_every_group_its_quota_real_first(real, total):
    plan = equal_scale(real, total)
    sizes = {g: sum(pair) for g, pair in plan.items()}
    assert sum(sizes.values()) == total
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert all(used == real[g] or not synthetic for g, (used, synthetic) in plan.items())
    assert all(used <= real[g] for g, (used, _) in plan.items())


def test_the_remainder_goes_to_the_first_groups():
    assert quotas(8, ("a", "b", "c")) == {"a": 3, "b": 3, "c": 2}


def test_equal_scale_draws_real_first_without_repeats_and_is_seeded():
    real, synthetic = records({0: 4, 1: 10, 2: 30, -1: 5}), records({0: 20, 1: 20}, synthetic=True)
    mixed = mix(real, synthetic, "equal_scale", "race", GROUPS, 30, seed=0)
    assert Counter((r.attributes["race"], r.synthetic) for r in mixed) == {
        (0, False): 4,
        (0, True): 6,
        (1, False): 10,
        (2, False): 10,
    }
    assert len({r.id for r in mixed}) == 30
    assert mixed == mix(real, synthetic, "equal_scale", "race", GROUPS, 30, seed=0)
    assert mixed != mix(real, synthetic, "equal_scale", "race", GROUPS, 30, seed=1)


def test_equal_scale_without_enough_synthetic_samples_says_how_many_lack():
    with pytest.raises(ValueError, match=r"\{'Asian': 6\}.*synthetic"):
        mix(records({0: 4, 1: 10, 2: 16}), [], "equal_scale", "race", GROUPS, None, seed=0)


@pytest.mark.parametrize("balance", ["equal_scale", "natural_scale"])
def test_the_default_size_counts_the_balanced_groups_alone(balance):
    real, made = records({0: 4, 1: 10, 2: 16, -1: 30}), records({0: 30, 1: 30, 2: 30}, synthetic=True)
    assert len(mix(real, made, balance, "race", GROUPS, None, seed=0)) == 30


def test_oversampling_makes_all_groups_as_large_as_the_largest():
    mixed = mix(records({0: 2, 1: 3, 2: 7, -1: 1}), [], "oversample", "race", GROUPS, None, seed=0)
    assert Counter(r.attributes["race"] for r in mixed) == {0: 7, 1: 7, 2: 7}
    repeats = Counter(r.id for r in mixed if r.attributes["race"] == 0)
    assert sorted(repeats.values()) == [3, 4], "repeats are spread evenly"


def test_a_group_without_samples_cannot_be_oversampled():
    with pytest.raises(ValueError, match=r"\['Black'\]"):
        mix(records({0: 2, 2: 7}), [], "oversample", "race", GROUPS, None, seed=0)


def test_groups_that_are_filtered_out_need_no_samples():
    kept = {0: "Asian", 1: "Black"}
    mixed = mix(records({0: 2, 1: 6}), [], "oversample", "race", kept, None, seed=0)
    assert Counter(r.attributes["race"] for r in mixed) == {0: 6, 1: 6}
    mixed = mix(records({0: 2, 1: 6}), records({0: 9}, synthetic=True), "equal_scale", "race", kept, None, seed=0)
    assert Counter(r.attributes["race"] for r in mixed) == {0: 4, 1: 4}


def test_no_balance_takes_everything_and_refuses_a_total():
    real, synthetic = records({0: 2}), records({0: 1}, synthetic=True)
    assert mix(real, synthetic, "none", "race", GROUPS, None, seed=0) == [*real, *synthetic]
    with pytest.raises(ValueError, match="total=9"):
        mix(real, synthetic, "none", "race", GROUPS, 9, seed=0)


def test_repeat_sample_draws_equal_blocks_with_replacement():
    real = records({0: 4, 1: 10, 2: 300})
    mixed = mix(real, [], "repeat_sample", "race", GROUPS, None, seed=0)
    assert Counter(r.attributes["race"] for r in mixed) == {0: 300, 1: 300, 2: 300}
    distinct = len({r.id for r in mixed if r.attributes["race"] == 2})
    assert distinct == pytest.approx(300 * (1 - 2.718281828**-1), abs=25)


def test_natural_scale_keeps_a_quarter_real_in_natural_shares():
    real = records({0: 75, 1: 120, 2: 605, -1: 50})
    synthetic = records(dict.fromkeys(GROUPS, 900), synthetic=True)
    mixed = mix(real, synthetic, "natural_scale", "race", GROUPS, 2400, seed=0)
    assert Counter(r.attributes["race"] for r in mixed) == {0: 800, 1: 800, 2: 800}
    drawn = Counter(r.attributes["race"] for r in mixed if not r.synthetic)
    assert drawn.total() == 600
    assert drawn[2] == pytest.approx(600 * 605 / 800, abs=45)
    assert max(Counter(r.id for r in mixed if not r.synthetic).values()) > 1


def test_the_unknown_group_is_balanced_only_when_asked():
    real, synthetic = records({0: 4, 1: 6, 2: 9, -1: 5}), records(dict.fromkeys((-1, 0, 1, 2), 9), synthetic=True)
    without = mix(real, synthetic, "equal_scale", "race", GROUPS, 24, seed=0)
    assert Counter(r.attributes["race"] for r in without) == {0: 8, 1: 8, 2: 8}
    asked = mix(real, synthetic, "equal_scale", "race", GROUPS | {-1: "unknown"}, 24, seed=0)
    assert Counter(r.attributes["race"] for r in asked) == {0: 6, 1: 6, 2: 6, -1: 6}
