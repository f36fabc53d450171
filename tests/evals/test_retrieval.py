"""The retrieval evaluator on towers that are known, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_towers import Texts, given_of, towers_of, unit

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.evals import EVALUATORS

RNG = np.random.default_rng(0)


def case(count=21, captions=3, width=6, seed=0):
    """Features of clips, captions of each (one has none), and the texts' embeddings."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, width))
    listed = [
        tuple(f"clip {i} text {j}" for j in range(rng.integers(1, captions + 1)))
        for i in range(count)
    ]
    listed[4] = ()
    vectors = {t: features[i] + rng.normal(size=width) for i, ts in enumerate(listed) for t in ts}
    return features, listed, vectors


def naive(features, listed, vectors, valid=None, score=lambda s: s):
    """Ranks of texts among videos, and of videos among texts."""
    kept = [i for i, ts in enumerate(listed) if ts and (valid is None or valid[i])]
    texts = [(t, i) for i in kept for t in listed[i]]
    s = unit(np.stack([vectors[t] for t, _ in texts])) @ unit(features[kept]).T
    owner = np.array([i for _, i in texts])
    forth = [int((row > row[kept.index(i)]).sum()) + 1 for row, i in zip(score(s), owner)]
    back = [int((col > col[owner == i].max()).sum()) + 1 for col, i in zip(score(s.T), kept)]
    return np.array(forth), np.array(back)


def run(given, name="retrieval", **options):
    return dict(EVALUATORS.get(name)(given, **options).run(1.0, 0))


def assert_ranks(found, ranks, name, end=""):
    for k in (1, 5, 10):
        assert found[f"{name}_r{k}{end}"] == pytest.approx(np.mean(ranks <= k)), (name, k)
    assert found[f"{name}_median_rank{end}"] == np.median(ranks)
    assert found[f"{name}_mean_rank{end}"] == pytest.approx(np.mean(ranks))


@pytest.fixture(scope="module")
def plain():
    """A case, what is given of it, and what the evaluator finds."""
    features, listed, vectors = case()
    valid = np.arange(21) != 7  # could not be read
    texts = Texts(vectors)
    given = given_of(features, {"video": listed}, valid=valid, towers=towers_of(texts))
    found = run(given, examples=21, dual_softmax=True, temperature=0.1, text_batch=16)
    return features, listed, vectors, valid, texts, found


def test_both_ways_equal_plain_loops(plain):
    features, listed, vectors, valid, _, found = plain
    forth, back = naive(features, listed, vectors, valid)
    assert_ranks(found, forth, "text_video")
    assert_ranks(found, back, "video_text")
    assert found["examples"] == 19 and found["texts"] == len(forth) > 30
    assert found["chance_r1"] == pytest.approx(1 / 19)
    assert found["video_text_chance_r1"] == pytest.approx(1 / 19)  # mean captions / all captions


def test_dual_softmax_is_over_the_queries_of_each_way(plain):
    features, listed, vectors, valid, _, found = plain

    def dual(s):
        powers = np.exp(s / 0.1)
        return s * powers / powers.sum(0)

    forth, back = naive(features, listed, vectors, valid, dual)
    assert_ranks(found, forth, "text_video", "_dsl")
    assert_ranks(found, back, "video_text", "_dsl")


def test_texts_of_what_is_left_out_are_not_embedded(plain):
    _, listed, _, _, texts, _ = plain
    assert not set(listed[7]) & set(texts.asked) and set(listed[8]) <= set(texts.asked)


def test_fewer_examples_are_the_first_ones():
    features, listed, vectors = case()
    given = given_of(features, {"video": listed}, towers=towers_of(Texts(vectors)))
    found = run(given, examples=10)
    forth, back = naive(features[:10], listed[:10], vectors)
    assert_ranks(found, forth, "text_video")
    assert_ranks(found, back, "video_text")
    assert found["examples"] == 9


def test_captions_all_first_and_joined():
    features, listed, vectors = case()
    vectors |= {" ".join(ts): RNG.normal(size=6) for ts in listed if len(ts) > 1}
    given = given_of(features, {"video": listed}, towers=towers_of(Texts(vectors)))
    for how, cut in (
        ("first", lambda ts: ts[:1]),
        ("joined", lambda ts: (" ".join(ts),) if ts else ()),
    ):
        found = run(given, examples=21, captions=how)
        forth, back = naive(features, [cut(ts) for ts in listed], vectors)
        assert_ranks(found, forth, "text_video")
        assert_ranks(found, back, "video_text")
        assert found["texts"] == found["examples"] == 20


def test_the_same_text_of_several_clips():
    """By choice all of them are right; also for each other's texts."""
    features, listed, vectors = case()
    listed = [(*ts, f"kind {i % 3}") if i != 4 else () for i, ts in enumerate(listed)]
    vectors |= {f"kind {k}": RNG.normal(size=6) for k in range(3)}
    cosine = lambda words, videos: jnp.sum(words * videos, axis=1)
    towers = towers_of(Texts(vectors), match=cosine)
    given = given_of(features, {"video": listed}, towers=towers)
    kept = [i for i in range(21) if i != 4]
    texts = [(t, i) for i in kept for t in listed[i]]
    s = unit(np.stack([vectors[t] for t, _ in texts])) @ unit(features[kept]).T
    right = np.array([[t in listed[i] for i in kept] for t, _ in texts])
    best = lambda s, right: np.array(
        [1 + (row > row[r].max() + 1e-9).sum() for row, r in zip(s, right)]
    )
    found = run(given, examples=21, same_text=True, rerank=40)
    for end in ("", "_rerank"):
        assert found[f"text_video_mean_rank{end}"] == pytest.approx(best(s, right).mean())
        back = best(s.T, right.T)
        if not end:  # re-ranked, texts that are no candidates are tied
            assert found["video_text_mean_rank"] == pytest.approx(back.mean())
        assert found[f"video_text_r1{end}"] == pytest.approx(np.mean(back == 1))
    strict = run(given, examples=21)
    assert strict["text_video_mean_rank"] > found["text_video_mean_rank"]
    assert strict["chance_r1"] == pytest.approx(1 / 20) and found["chance_r1"] > 0.1


def test_a_model_that_says_the_same_of_all_is_at_chance():
    features, listed, vectors = case()
    same = Texts(dict.fromkeys(vectors, np.ones(6)))
    judge = lambda words, videos: jnp.zeros(len(words))
    given = given_of(np.ones_like(features), {"video": listed}, towers=towers_of(same, match=judge))
    found = run(given, examples=21, dual_softmax=True, rerank=20)
    for end in ("", "_dsl", "_rerank"):
        if end != "_rerank":
            assert found[f"video_text_r1{end}"] == pytest.approx(found["video_text_chance_r1"])
        assert found[f"text_video_r1{end}"] == pytest.approx(found["chance_r1"]) == 1 / 20


def rerank_loop(scores, match, owner, own, k, choose):
    """Ranks where the k best by `choose` have their match scores, all others -100."""
    found = []
    for q in range(len(scores)):
        full = np.full(scores.shape[1], -100.0)
        chosen = np.argsort(-choose[q])[:k]
        full[chosen] = match[q][chosen]
        right = owner == own[q]
        best = full[right].max()
        above, tied = (full[~right] > best).sum(), (full[~right] == best).sum()
        found.append(1 + above + tied / (1 + (full[right] == best).sum()))
    return np.array(found)


@pytest.mark.parametrize("by_dual", [False, True])
def test_reranking_judges_the_best_pairs_and_no_others(by_dual):
    features, listed, vectors = case()
    mixing = np.random.default_rng(5).normal(size=(6, 6))
    judge = lambda words, videos: jnp.einsum(
        "bp,pq,bq->b", words, jnp.asarray(mixing, jnp.float32), videos
    )
    towers = towers_of(Texts(vectors), match=judge)
    given = given_of(features, {"video": listed}, towers=towers)
    found = run(
        given, examples=21, rerank=5, use_dsl_for_match=by_dual, temperature=0.1, text_batch=7
    )
    kept = [i for i in range(21) if listed[i]]
    texts = [(t, i) for i in kept for t in listed[i]]
    words, videos = unit(np.stack([vectors[t] for t, _ in texts])), unit(features[kept])
    owner, kept = np.array([i for _, i in texts]), np.array(kept)
    scores, match = words @ videos.T, words @ mixing @ videos.T

    def dual(s):
        powers = np.exp(s / 0.1)
        return s * powers / powers.sum(0) if by_dual else s

    forth = rerank_loop(scores, match, kept, owner, 5, dual(scores))
    back = rerank_loop(scores.T, match.T, owner, kept, 5, dual(scores.T))
    for ranks, name in ((forth, "text_video"), (back, "video_text")):
        assert found[f"{name}_mean_rank_rerank"] == pytest.approx(ranks.mean())
        assert found[f"{name}_median_rank_rerank"] == np.median(ranks)
        assert found[f"{name}_r1_rerank"] == pytest.approx(np.mean(ranks == 1))


def test_more_candidates_than_items_are_all_of_them():
    features, listed, vectors = case()
    cosine = lambda words, videos: jnp.sum(words * videos, axis=1)
    given = given_of(features, {"video": listed}, towers=towers_of(Texts(vectors), match=cosine))
    found = run(given, examples=21, rerank=128)
    for name in ("text_video", "video_text"):  # judged as before, so nothing moves
        assert found[f"{name}_mean_rank_rerank"] == pytest.approx(found[f"{name}_mean_rank"])


def test_sound_without_sound_is_left_out():
    features, listed, vectors = case()
    frames = np.where(np.arange(21) % 3 == 0, 0, 5).astype(np.int32)
    towers = towers_of(Texts(vectors), audio="sound")
    options = dict(towers=towers, sound=features, audio_frames=frames)
    given = given_of(RNG.normal(size=(21, 6)), {"audio": listed}, **options)
    found = run(given, "retrieval_audio", examples=21)
    forth, back = naive(features, listed, vectors, frames > 0)
    assert_ranks(found, forth, "text_audio")
    assert_ranks(found, back, "audio_text")
    assert found["examples"] == 13 and "audio_text_chance_r1" in found


def test_speech_finds_videos_and_sound_only_examples_have_none():
    features, listed, vectors = case()
    seen = np.arange(21) % 4 != 0
    towers = towers_of(Texts(vectors))
    given = given_of(features, {"speech": listed}, towers=towers, has_video=seen)
    found = run(given, "retrieval_speech", examples=21)
    forth, back = naive(features, listed, vectors, seen)
    assert_ranks(found, forth, "text_video")
    assert_ranks(found, back, "video_text")


@pytest.mark.parametrize(
    "sizes",
    [dict(data=2, fsdp=2, tensor=2), pytest.param(dict(data=8), marks=pytest.mark.slow)],
)
def test_devices_change_nothing(sizes):
    features, listed, vectors = case(count=37, seed=3)
    judge = lambda words, videos: jnp.sum(words * videos[:, ::-1], axis=1)
    towers = towers_of(Texts(vectors), match=judge)
    given = given_of(features, {"video": listed}, towers=towers)
    options = dict(examples=37, rerank=6, text_batch=12)
    want = run(given, **options)
    with sharding.use(sharding.make_mesh(**sizes)):
        found = run(given, **options)
    assert found.keys() == want.keys()
    for name in want:
        assert found[name] == pytest.approx(want[name], abs=1e-12), name


def test_embeddings_lie_spread_over_the_devices():
    features, listed, vectors = case(count=32)
    given = given_of(features, {"video": listed}, towers=towers_of(Texts(vectors)), rows=16)
    made = EVALUATORS.get("retrieval")(given, examples=32)
    with sharding.use(sharding.make_mesh()):
        for rows in (
            made.embedder.videos(1.0, given.batches(32)),
            made.embedder.texts(1.0, list(vectors)[:16]),
        ):
            n, rows_, width = rows.embedding.shape
            shapes = {s.data.shape for s in rows.embedding.addressable_shards}
            assert shapes == {(n, rows_ // 8, width)}


def test_what_is_missing_is_named():
    features, listed, vectors = case()
    texts = {"video": listed}
    towers = towers_of(Texts(vectors))
    full = given_of(features, texts, towers=towers)
    wrong = [
        (given_of(features, texts), {}, "'retrieval' needs a model of video and text"),
        (full, dict(gallery="audio"), "that embeds audio, which this stage's does not"),
        (full, dict(gallery="vido"), 'got .vido.. Did you mean "video"'),
        (full, dict(rerank=8), "that judges pairs of video and text"),
        (full, dict(captions="al"), 'got captions=.al.. Did you mean "all"'),
        (full, dict(temperature=0.0), "temperature must be above 0"),
        (full, dict(text_batch=0), "text_batch must be at least 1"),
    ]
    for given, options, said in wrong:
        with pytest.raises(UserError, match=said):
            EVALUATORS.get("retrieval")(given, examples=9, **options)
    judged = given_of(
        features,
        texts,
        towers=towers_of(Texts(vectors), match=lambda a, b: a[:, 0], audio="features"),
    )
    with pytest.raises(UserError, match="rerank=8 with gallery='audio'"):
        EVALUATORS.get("retrieval")(judged, examples=9, rerank=8, gallery="audio")
    with pytest.raises(UserError, match="texts of the kind 'speech'; got none"):
        run(full, examples=9, text="speech")
    unread = given_of(features, texts, towers=towers, valid=np.zeros(21, bool))
    with pytest.raises(
        UserError, match="videos that have video and texts of the kind 'video'; got none"
    ):
        run(unread, examples=9)
    blank = given_of(features, {"video": [(" ",)] * 21}, towers=towers)
    with pytest.raises(UserError, match="got none among the held_out videos"):
        run(blank, examples=9)


def test_parameters_are_not_changed_and_the_step_changes_nothing():
    features, listed, vectors = case()
    given = given_of(features, {"video": listed}, towers=towers_of(Texts(vectors)))
    made, params = EVALUATORS.get("retrieval")(given, examples=21), jnp.float32(2.0)
    assert dict(made.run(params, 0)) == dict(made.run(params, 99)) and float(params) == 2.0
    assert jax.tree.leaves(params)[0].is_deleted() is False
