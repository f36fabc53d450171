"""The order is a function of (seed, stage, position): permutations per epoch, exact shares, the same as Grain's own."""

import collections
import math
import pickle

import grain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invideo_jax.data.order import InTurn, Order, Place, pick, whole_weights

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)
seeds = st.integers(0, 2**40)


def order_of(sizes, seed=0, stage="masked", weights=None):
    return Order(sizes, weights or [1.0] * len(sizes), seed=seed, stage=stage)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 60), seed=seeds)
def test_each_epoch_is_a_permutation(n, seed):
    order = order_of([n], seed)
    for epoch in range(3):
        places = [order[epoch * n + i] for i in range(n)]
        assert sorted(p.record for p in places) == list(range(n))
        assert {(p.source, p.epoch) for p in places} == {(0, epoch)}


@settings(max_examples=15, deadline=None)
@given(sizes=lengths, seed=seeds, data=st.data())
def test_mixture_is_permutations_in_exact_shares(sizes, seed, data):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    order = order_of(sizes, seed, weights=weights)
    period = sum(order.parts)
    count = period * data.draw(st.integers(1, 12))
    places = [order[i] for i in range(count)]
    for source, size in enumerate(sizes):
        mine = [p for p in places if p.source == source]
        assert len(mine) == count * weights[source] // sum(weights)
        for start in range(0, len(mine) - size + 1, size):  # each of its epochs
            assert sorted(p.record for p in mine[start : start + size]) == list(range(size))
            assert {p.epoch for p in mine[start : start + size]} == {start // size}


@settings(max_examples=15, deadline=None)
@given(sizes=lengths, seed=seeds, position=st.integers(0, 2**32 - 1))
def test_a_far_position_alone_and_after_pickling(sizes, seed, position):
    place = order_of(sizes, seed)[position]
    assert place == pickle.loads(pickle.dumps(order_of(sizes, seed)))[position]
    assert 0 <= place.record < sizes[place.source]


@settings(max_examples=6, deadline=None)
@given(sizes=lengths, seed=seeds)
def test_same_as_grains_own_datasets(sizes, seed):
    order = order_of(sizes, seed)
    parts = [
        grain.MapDataset.range(n).shuffle(seed=s).repeat() for n, s in zip(sizes, order._seeds)
    ]
    mixed = grain.MapDataset.mix(parts)
    assert [order[i].record for i in range(60)] == [int(mixed[i]) for i in range(60)]


def test_shares_hold_at_every_prefix():
    parts = whole_weights([0.5, 0.3, 0.2])
    counts = collections.Counter()
    for k in range(1000):
        source, turn = pick(k, parts)
        assert turn == counts[source]  # its examples come in order, none left out
        counts[source] += 1
        for s, part in enumerate(parts):
            assert abs(counts[s] - (k + 1) * part / sum(parts)) < len(parts)


def test_weights_are_exact_decimals():
    assert whole_weights([0.1, 0.2, 0.7]) == (1, 2, 7)
    assert whole_weights([3, 10]) == (3, 10)  # Grain's own scaling makes 100:333 of it
    assert whole_weights([5.0]) == (1,)
    assert whole_weights([1e-3, 1]) == (1, 1000)


def test_seed_stage_source_and_epoch_each_change_the_order():
    def records(order, source=0, start=0):
        return [order[i].record for i in range(start, start + 100)]

    base = records(order_of([100]))
    assert base == records(order_of([100]))
    assert base != records(order_of([100], seed=1))
    assert base != records(order_of([100], stage="contrastive"))
    assert base != records(order_of([100]), start=100)
    both = [order_of([100, 100])[i] for i in range(200)]
    first, second = ([p.record for p in both if p.source == s] for s in (0, 1))
    assert first == base and second != base
    # seed + 1 must not be the same order one epoch later
    assert records(order_of([100], seed=1)) != records(order_of([100]), start=100)


def test_shuffle_is_thorough():
    """Mean distance of neighbours in a permutation of n is (n + 1) / 3; and every record reaches every tenth."""
    n, order = 1000, order_of([1000])
    records = [order[i].record for i in range(n)]
    steps = [abs(a - b) for a, b in zip(records, records[1:])]
    assert math.isclose(sum(steps) / len(steps), (n + 1) / 3, rel_tol=0.05)
    tenth = collections.Counter(order[e * n].record // 100 for e in range(500))
    assert len(tenth) == 10 and max(tenth.values()) < 90


def test_evaluation_takes_each_once():
    order = InTurn([2, 0, 3])
    assert order.epoch == 5
    assert [order[i] for i in range(6)] == [
        Place(0, 0, 0),
        Place(0, 1, 0),
        Place(2, 0, 0),
        Place(2, 1, 0),
        Place(2, 2, 0),
        None,
    ]


@pytest.mark.parametrize(
    "sizes,weights,words",
    [
        ([], [], "lengths=\\[\\]"),
        ([3, 0], [1, 1], "lengths=\\[3, 0\\]"),
        ([3], [1, 2], "2 weights for 1 sources"),
        ([3], [0.0], "weights=\\[0.0\\]"),
        ([3], [float("nan")], "above 0"),
        ([3], [-1], "above 0"),
    ],
)
def test_errors(sizes, weights, words):
    with pytest.raises(ValueError, match=words):
        Order(sizes, weights, seed=0, stage="s")
