"""Ranks against plain loops; ties, dual softmax, re-ranking, several right items, any number of devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invideo_jax import sharding
from invideo_jax.evals import ranking
from invideo_jax.evals.ranking import Rows, Standing


def rows_of(vectors, owner, rows=8):
    """As an evaluator holds them: whole batches, the last filled up."""
    n = -(-len(vectors) // rows)
    spare = n * rows - len(vectors)
    made = np.pad(np.float32(vectors), ((0, spare), (0, 0)), constant_values=7.0)
    owner = np.pad(np.int32(owner), (0, spare), constant_values=-1)
    return Rows(jnp.asarray(made.reshape(n, rows, -1)), owner.reshape(n, rows, 1))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def loop_ranks(scores, query_owner, owner):
    """Rank of the best right item of each query, the first is 1; no ties in `scores`."""
    found = []
    for row, own in zip(scores, query_owner):
        order = [owner[j] for j in np.argsort(-row) if owner[j] >= 0]
        found.append(order.index(own) + 1)
    return np.array(found)


def loop_dual(scores, temperature):
    powers = np.exp(scores / temperature)
    return scores * powers / powers.sum(0, keepdims=True)


def random_case(seed, examples=23, captions=3, width=5):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(examples), rng.integers(1, captions + 1, examples))
    text, video = rng.normal(size=(len(owner), width)), rng.normal(size=(examples, width))
    return unit(text), owner, unit(video), np.arange(examples)


@pytest.mark.parametrize("temperature", [None, 1.0, 0.05])
def test_ranks_of_embeddings_equal_a_plain_loop_both_ways(temperature):
    text, owner, video, own = random_case(0)
    for a, a_owner, b, b_owner in ((text, owner, video, own), (video, own, text, owner)):
        scores = a @ b.T
        scores = scores if temperature is None else loop_dual(scores, temperature)
        want = loop_ranks(scores, a_owner, b_owner)
        found = ranking.rank(rows_of(a, a_owner), rows_of(b, b_owner), dual_softmax=temperature)
        np.testing.assert_array_equal(ranking.expected_rank(found), want)
        assert (found.items == len(b)).all()
        np.testing.assert_array_equal(found.right, [(b_owner == i).sum() for i in a_owner])
        values = ranking.measures(found)
        assert values["r1"] == np.mean(want == 1) and values["r10"] == np.mean(want <= 10)
        assert values["median_rank"] == np.median(want)
        assert values["mean_rank"] == pytest.approx(np.mean(want))


def test_the_dual_softmax_goes_over_the_queries():
    """A hub, the nearest of all texts, loses to what only its own text is near to."""
    scores = np.array([[0.9, 0.8, 0.1], [0.95, 0.1, 0.9], [0.99, 0.0, 0.0]])
    dual = loop_dual(scores, 0.1)
    assert scores.argmax(1).tolist() == [0, 0, 0] and dual.argmax(1).tolist() == [1, 2, 0]
    basis = np.eye(3)
    found = ranking.rank(rows_of(scores, [1, 2, 0]), rows_of(basis, [0, 1, 2]), dual_softmax=0.1)
    assert ranking.measures(found)["r1"] == 1.0
    plain = ranking.rank(rows_of(scores, [1, 2, 0]), rows_of(basis, [0, 1, 2]))
    assert ranking.measures(plain)["r1"] == pytest.approx(1 / 3)


def test_embeddings_that_are_all_equal_give_chance():
    text, owner, _, own = random_case(1)
    same = np.broadcast_to(unit(np.ones((1, 5))), (len(owner), 5))
    rounded = same + 1e-7 * np.random.default_rng(2).normal(size=same.shape)
    for temperature, vectors in ((None, same), (1.0, same), (None, rounded), (0.05, rounded)):
        pairs = rows_of(vectors, owner), rows_of(vectors[: len(own)], own)
        found = ranking.rank(*pairs, dual_softmax=temperature)
        values = ranking.measures(found)
        for k in (1, 5, 10):
            assert values[f"r{k}"] == pytest.approx(k / 23) == ranking.chance(found, k)
        assert values["median_rank"] == 12.0  # the middle of 23
        # One of m right texts of N is the first with probability m / N.
        back = ranking.rank(*pairs[::-1], dual_softmax=temperature)
        assert ranking.measures(back)["r1"] == pytest.approx(1 / 23) == ranking.chance(back)


def test_numbers_that_are_none_are_last():
    scores = np.full((3, 4), np.nan)
    assert ranking.measures(ranking.standings(scores, [0, 1, 2], np.arange(4)))["r1"] == 0.25
    scores[:] = np.eye(3, 4)
    scores[0, 0] = np.nan
    found = ranking.standings(jnp.asarray(scores), jnp.arange(3), jnp.arange(4))
    np.testing.assert_array_equal(ranking.expected_rank(found), [4, 1, 1])


def test_rounding_is_a_tie():
    scores = np.float32([[0.7, 0.7 + 1e-7, 0.7 - 1e-7, 0.6, 0.8]])
    found = ranking.standings(scores, [0], np.arange(5))
    assert (found.above[0], found.tied[0]) == (1, 2)
    assert ranking.recall(found, 2)[0] == pytest.approx(1 / 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_ties_are_the_mean_over_all_orders(seed, k):
    rng = np.random.default_rng(seed)
    owner = rng.integers(-1, 3, 6)
    scores = rng.integers(0, 3, (1, 6)).astype(np.float64)
    if not (owner == 1).any():
        owner[0] = 1
    found = ranking.standings(scores, np.array([1]), owner)
    items = [i for i in range(6) if owner[i] >= 0]
    ranks = []
    for order in itertools.permutations(items):
        listed = sorted(order, key=lambda i: -scores[0, i])  # stable: equal ones as permuted
        ranks.append([owner[i] for i in listed].index(1) + 1)
    ranks = np.array(ranks)
    assert ranking.recall(found, k)[0] == pytest.approx(np.mean(ranks <= k))
    assert ranking.expected_rank(found)[0] == pytest.approx(ranks.mean())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_reranking_is_the_full_matrix_with_minus_100_elsewhere(seed, k):
    rng = np.random.default_rng(seed)
    owner, queries = rng.integers(0, 4, 9), np.arange(4)
    owner[:4] = queries
    match = rng.integers(-3, 4, (4, 9)).astype(np.float64)  # with ties
    chosen = np.argsort(-rng.normal(size=(4, 9)), axis=1)[:, :k]
    full = np.full((4, 9), -100.0)
    np.put_along_axis(full, chosen, np.take_along_axis(match, chosen, 1), 1)
    want = ranking.standings(full, queries, owner)
    right = owner[None] == queries[:, None]
    found = ranking.rerank_standings(
        np.take_along_axis(match, chosen, 1),
        np.take_along_axis(right, chosen, 1),
        all_right=right.sum(1),
        items=9,
    )
    for name, a, b in zip(Standing._fields, found, want):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_candidates_are_those_of_the_highest_scores(temperature):
    text, owner, video, own = random_case(2)
    scores = text @ video.T
    scores = scores if temperature is None else loop_dual(scores, temperature)
    found = ranking.top(rows_of(text, owner), rows_of(video, own), 6, dual_softmax=temperature)
    np.testing.assert_array_equal(found[: len(text)], np.argsort(-scores, axis=1)[:, :6])
    everything = ranking.top(rows_of(text, owner), rows_of(video, own), 23)
    assert everything[: len(text)].max() == 22  # no row that only fills up


def placed(rows, mesh):
    where = sharding.NamedSharding(mesh, sharding.PartitionSpec(None, sharding.BATCH_AXES))
    return rows._replace(embedding=jax.device_put(rows.embedding, where))


@pytest.mark.parametrize(
    "sizes",
    [dict(data=2, fsdp=2, tensor=2), pytest.param(dict(data=8), marks=pytest.mark.slow)],
)
def test_any_mesh_gives_the_same_and_no_device_holds_all_pairs(sizes):
    text, owner, video, own = random_case(3, examples=64, captions=4)
    pairs = rows_of(text, owner, rows=16), rows_of(video, own, rows=16)
    mesh = sharding.make_mesh(**sizes)
    for temperature in (None, 1.0):
        want = ranking.rank(*pairs, dual_softmax=temperature)
        with sharding.use(mesh):
            a, b = (placed(rows, mesh) for rows in pairs)
            found = ranking.rank(a, b, dual_softmax=temperature)
            top = ranking.top(a, b, 5, dual_softmax=temperature)
            compiled = ranking._rank.lower(*a, *b, temperature).compile().as_text()
        for x, y in zip(found, want):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(top, ranking.top(*pairs, 5, dual_softmax=temperature))
        parts = sizes["data"] * sizes.get("fsdp", 1)
        assert f"f32[16,4,{16 // parts}]" in compiled  # scores of a block, of one device
        assert "f32[16,4,16]" not in compiled and "f32[4,16,4,16]" not in compiled


def test_duplicated_examples_are_all_right():
    """A text of a clip that is there twice counts the better of both."""
    scores = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    found = ranking.standings(scores, np.array([0, 5]), np.array([0, 0, 5]))
    np.testing.assert_array_equal(ranking.expected_rank(found), [1, 3])


def test_owners_may_be_several():
    """Query 0 has two; item 2 belongs to one of them, item 1 to the other and to somebody else."""
    scores = np.array([[0.9, 0.5, 0.7, 0.8], [0.9, 0.5, 0.7, 0.8]])
    owner = np.array([[3, -1], [9, 0], [1, -1], [-1, -1]])
    for xp in (np, jnp):
        found = ranking.standings(xp.asarray(scores), np.array([[0, 1], [3, -1]]), owner)
        np.testing.assert_array_equal(ranking.expected_rank(found), [2, 1])
        np.testing.assert_array_equal(found.right, [2, 1])
        np.testing.assert_array_equal(found.items, [3, 3])


def test_recall_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(50, 12)), rng.integers(0, 12, 50)
    found = ranking.standings(scores, labels, np.arange(12))
    for k in (1, 5, 10):
        want = metrics.top_k_accuracy_score(labels, scores, k=k, labels=np.arange(12))
        assert np.mean(ranking.recall(found, k)) == pytest.approx(want)
