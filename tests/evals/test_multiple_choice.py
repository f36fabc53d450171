"""Multiple choice on towers that are known."""

import jax.numpy as jnp
import numpy as np
import pytest
from fake_towers import Texts, given_of, towers_of, unit

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.evals import EVALUATORS
from invideo_jax.evals.multiple_choice import accuracy


def case(count=19, seed=0):
    """Features, candidates of each clip (2 to 5), the right ones, and the texts' embeddings."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 6))
    number = rng.integers(2, 6, count)
    listed = [tuple(f"clip {i} choice {j}" for j in range(n)) for i, n in enumerate(number)]
    right = rng.integers(0, number)
    vectors = {t: rng.normal(size=6) for ts in listed for t in ts}
    for i, ts in enumerate(listed):
        vectors[ts[right[i]]] += 0.3 * features[i]
    return features, listed, right, vectors


def run(given, **options):
    return dict(EVALUATORS.get("multiple_choice")(given, **options).run(1.0, 0))


def test_the_highest_score_is_chosen_among_its_own_candidates():
    features, listed, right, vectors = case()
    listed[2], right[3], right[4] = listed[2][:1], -1, 9  # no choice; right one unknown; beyond
    valid = np.arange(19) != 6
    mixing = np.random.default_rng(5).normal(size=(6, 6))
    judge = lambda words, videos: jnp.einsum("bp,pq,bq->b", words, jnp.float32(mixing), videos)
    towers = towers_of(Texts(vectors), match=judge)
    given = given_of(features, {"video": listed}, labels=right, valid=valid, towers=towers)
    found = run(given, examples=19, match=True, text_batch=9)
    kept = [i for i in range(19) if i not in (2, 3, 4, 6)]
    for name, weights in (("accuracy", np.eye(6)), ("accuracy_match", mixing)):
        scores = [[unit(vectors[t]) @ weights @ unit(features[i]) for t in listed[i]] for i in kept]
        want = np.mean([np.argmax(s) == right[i] for s, i in zip(scores, kept)])
        assert found[name] == pytest.approx(want) and 0 < want < 1
    assert found["examples"] == len(kept) == 15
    assert found["chance"] == pytest.approx(np.mean([1 / len(listed[i]) for i in kept]))
    with sharding.use(sharding.make_mesh(data=4, fsdp=2)):
        assert run(given, examples=19, match=True, text_batch=9) == pytest.approx(found)


def test_equal_scores_share_the_point():
    number, right = np.array([2, 4, 3]), np.array([0, 3, 1])
    assert accuracy(np.zeros(9), number, right) == pytest.approx((1 / 2 + 1 / 4 + 1 / 3) / 3)
    scores = np.array([1, 0, 0, 0, 0, 5, 9, 1, 2.0])  # right; right; wrong
    assert accuracy(scores, number, right) == pytest.approx(2 / 3)
    assert accuracy(-np.ones(9), number, right) == pytest.approx((1 / 2 + 1 / 4 + 1 / 3) / 3)
    scores[0] = np.nan  # never right by not being a number
    assert accuracy(scores, number, right) == pytest.approx(1 / 3)


def test_what_is_missing_is_named():
    features, listed, right, vectors = case()
    towers = towers_of(Texts(vectors))
    make = EVALUATORS.get("multiple_choice")
    with pytest.raises(UserError, match="'multiple_choice' needs a model of video and text"):
        make(given_of(features, {"video": listed}), examples=9)
    with pytest.raises(UserError, match="judges pairs of video and text"):
        make(given_of(features, {"video": listed}, towers=towers), examples=9, match=True)
    with pytest.raises(UserError, match="needs texts of the kind 'audio'; got none"):
        run(given_of(features, {"video": listed}, towers=towers), examples=9, text="audio")
    with pytest.raises(UserError, match="the number of the right one as label; got none"):
        run(given_of(features, {"video": listed}, towers=towers), examples=9)
