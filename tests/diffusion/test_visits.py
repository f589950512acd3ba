import hashlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.diffusion.visits import check_jumps, check_visits, num_visits, visit_list


def test_lists_are_those_of_the_authors_code(reference):
    expected = reference("lefusion")["repaint_schedule"]
    assert visit_list(10, 2, 2) == expected["T10_L2_n2_full"]
    assert visit_list(12, 3, 3) == expected["T12_L3_n3_full"]
    assert visit_list(6, 10, 10) == expected["T6_L10_n10_full"]
    assert visit_list(300, 5, 5)[:40] == expected["T300_L5_n5_first40"]
    assert visit_list(300, 5, 5)[-12:] == expected["T300_L5_n5_last12"]


@pytest.mark.parametrize(("length", "samples"), [(1, 1), (2, 2), (5, 5), (10, 10), (2, 10), (10, 2)])
def test_whole_lists_agree_by_their_hash(reference, length, samples):
    expected = reference("lefusion")["repaint_schedule"][f"T300_L{length}_n{samples}"]
    levels = visit_list(300, length, samples)
    assert len(levels) == num_visits(300, length, samples) == expected["len"]
    assert sum(b < a for a, b in pairwise(levels)) == expected["nfe"]
    assert sum(b > a for a, b in pairwise(levels)) == expected["undo"]
    assert hashlib.sha1(",".join(map(str, levels)).encode()).hexdigest() == expected["sha1"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6))
def test_lists_are_walks_that_end_without_noise(num_steps, length, samples):
    levels = visit_list(num_steps, length, samples)
    check_visits(levels, num_steps, 10_000)
    assert len(levels) == num_visits(num_steps, length, samples)
    assert set(levels) == set(range(-1, num_steps))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1, 1), "num_steps=0; expected is at least 1"),
        ((10, 0, 2), "jump_length=0"),
        ((10, 3, 1), "jump_length=3 has no effect with jump_n_sample=1"),
        ((6, 10, 10), "jump_length=10 has no effect on 6 steps"),
        ((6, 6, 2), "Take one below 6"),
        ((300, 1, 10**12), "more than max_visits=5000; lower"),
        ((300, 10, 10), "visit 5521 noise levels, more than max_visits=5000"),
    ],
)
def test_jumps_that_do_nothing_or_too_much_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        check_jumps(*numbers, most=5000)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([1, 0], "expected is from 1"),
        ([1, -1], "goes from 1 to -1 at place 0"),
        ([0, 1, 0, -1], r"from \[0\]"),
        ([1, 0, -1, 0, -1], "goes from -1 to 0 at place 2"),
        ([1, 2, 1, 0, -1], "goes from 2 to 1 at place 1"),
        ([], "0 entries"),
        ([1, 0] * 40 + [-1], "81 entries, more than max_visits=80"),
    ],
)
def test_lists_that_no_chain_can_follow_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        check_visits(levels, 2, 80)
