from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairdiff_lightning.data import GroupBalancedSampler
from fairdiff_lightning.data.samplers import EpochSampler, SequentialShards

GROUPS = [0] * 3 + [1] * 11 + [2] * 40 + [-1] * 4


def test_every_group_is_seen_equally_often_and_every_member_too():
    seen = list(GroupBalancedSampler(GROUPS, seed=1))
    assert Counter(GROUPS[i] for i in seen) == {0: 40, 1: 40, 2: 40}
    assert set(seen) == set(range(54)), "unknown groups are left out, everybody else is seen"
    repeats = Counter(i for i in seen if GROUPS[i] == 0)
    assert max(repeats.values()) - min(repeats.values()) <= 1


@pytest.mark.parametrize("replicas", [2, 3])
def test_every_device_sees_balanced_groups(replicas):
    shares = [list(GroupBalancedSampler(GROUPS, 1, replicas, rank)) for rank in range(replicas)]
    assert len({len(share) for share in shares}) == 1
    for share in shares:
        assert len(set(Counter(GROUPS[i] for i in share).values())) == 1
        for start in range(0, len(share), 3):
            assert {GROUPS[i] for i in share[start : start + 3]} == {0, 1, 2}, "each round has every group"


def test_devices_together_see_what_one_would():
    alone = list(GroupBalancedSampler(GROUPS, 1))
    shares = [list(GroupBalancedSampler(GROUPS, 1, 2, rank)) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(alone)


def test_epochs_differ_and_repeat():
    sampler = GroupBalancedSampler(GROUPS)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert len(sampler) == len(first)


def test_no_known_group_is_an_error():
    with pytest.raises(ValueError, match="known group"):
        GroupBalancedSampler([-1, -1])


@given(length=st.integers(0, 40), replicas=st.integers(1, 5))
def test_shards_cover_every_sample_exactly_once(length, replicas):
    shards = [SequentialShards(range(length), replicas, rank) for rank in range(replicas)]
    assert sorted(i for shard in shards for i in shard) == list(range(length))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_no_sample_of_a_small_group_comes_twice_as_the_same_draw_of_an_epoch(replicas):
    """Blocks and partners are drawn from these numbers."""
    samplers = [EpochSampler(GroupBalancedSampler(GROUPS, 1, replicas, rank)) for rank in range(replicas)]
    for sampler in samplers:
        sampler.set_epoch(4)
    drawn = [one for sampler in samplers for one in sampler]
    assert len(set(drawn)) == len(drawn)
    assert {epoch for _, epoch, _ in drawn} == {4}
    assert sorted(index for index, _, _ in drawn) == sorted(i for sampler in samplers for i in sampler.sampler)
    assert max(visit for index, _, visit in drawn if GROUPS[index] == 0) >= 13, "each of three comes some 13 times"
    assert {visit for index, _, visit in drawn if GROUPS[index] == 2} <= {0, 1}
