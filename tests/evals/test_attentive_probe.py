"""The attentive probe on tokens that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_towers import given_of

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.evals import EVALUATORS, attentive_probe


def tokens_of(rows, seed, classes=4, ordered=False):
    """One token in nine has a mark, and the class beside it; others have classes without the mark."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, rows)
    label = np.sort(label) if ordered else label
    tokens = 0.3 * rng.normal(size=(rows, 9, 8))
    other = rng.integers(0, classes, (rows, 9))
    np.put_along_axis(tokens, other[..., None], 3.0, axis=2)
    at = rng.integers(0, 9, rows)
    tokens[np.arange(rows), at] = 0
    tokens[np.arange(rows), at, label] = 3.0
    tokens[np.arange(rows), at, 7] = 6.0
    return tokens.astype(np.float32), label


def given_both(train, held_out, rows=32):
    """Training clips and held-out ones, which are different."""
    make = lambda part: given_of(part[0], labels=part[1], rows=rows, **more)
    more = dict(encode_tokens=lambda params, batch: batch["features"] * params)
    parts = dict(train=make(train), held_out=make(held_out))
    batches = lambda examples, *, of="held_out", taught=True: parts[of].batches(examples)
    return parts["train"].__class__(batches, None, None, **more)


OPTIONS = dict(examples=100, train_examples=256, epochs=25, learning_rate=5e-3, heads=2)


def run(given, **options):
    return dict(EVALUATORS.get("attentive_probe")(given, **{**OPTIONS, **options}).run(1.0, 0))


@pytest.fixture(scope="module")
def parts():
    return tokens_of(256, 1, ordered=True), tokens_of(100, 2)


@pytest.fixture(scope="module")
def found(parts):
    return run(given_both(*parts))


def test_attention_finds_what_the_mean_hides(parts, found):
    train, held_out = parts
    assert found["top1"] > 0.9 and found["train_top1"] > 0.9 and found["top5"] == 1.0
    commonest = np.bincount(train[1]).argmax()
    assert found["majority"] == pytest.approx(np.mean(held_out[1] == commonest))
    from invideo_jax.evals import probe

    pooled = [probe.Labelled(x.mean(1), y) for x, y in parts]
    score = probe.fit(pooled[0], 4, l2=1e-3, iterations=60)
    assert probe.share_right(score(pooled[1].features), held_out[1], 1) < found["top1"] - 0.2


@pytest.mark.slow
def test_it_is_deterministic_and_devices_change_little(parts, found):
    with sharding.use(sharding.make_mesh(data=4, fsdp=2)):
        again = run(given_both(*parts))
    for name in found:
        assert again[name] == pytest.approx(found[name], abs=0.03), name


def test_without_signal_it_is_at_chance(parts):
    noise = lambda part, seed: (np.random.default_rng(seed).normal(size=part[0].shape), part[1])
    made = [(np.float32(x), y) for x, y in (noise(parts[0], 3), noise(parts[1], 4))]
    assert run(given_both(*made))["top1"] < 0.45


def test_every_clip_is_seen_once_an_epoch_and_clips_are_mixed(monkeypatch):
    seen = {}
    monkeypatch.setattr(attentive_probe, "_fit", lambda *args: seen.update(order=args[-1]))
    labels = np.zeros((6, 4), np.int32)
    rates = dict(learning_rate=1e-3, weight_decay=0.0)
    attentive_probe.fit(None, None, labels, epochs=3, **rates)
    order = seen["order"].reshape(3, 6, 4)
    np.testing.assert_array_equal(
        np.sort(order, axis=1), np.broadcast_to(np.arange(6)[None, :, None], (3, 6, 4))
    )
    assert len({tuple(order[e, :, b]) for e in range(3) for b in range(4)}) > 10


def test_rows_that_do_not_count_are_not_learned_from(parts):
    """Clips of unknown class, and what fills a batch up, change nothing."""
    tokens, label = tokens_of(40, 5)
    label[:3] = -1
    other = tokens.copy()
    other[:3] = 9.0
    head = attentive_probe.make_head(4, 8, heads=2, width=0, mlp=True)
    rates = dict(epochs=2, learning_rate=1e-2, weight_decay=0.1)
    fitted = []
    for x in (tokens, other):
        got = attentive_probe.collect(given_both((x, label), (x, label)), 1.0, 40, 1.0)
        assert got.labels.shape == (2, 32) and (got.labels >= 0).sum() == 37
        fitted.append(attentive_probe.fit(head, *got, **rates))
    for a, b in zip(*map(jax.tree.leaves, fitted)):
        np.testing.assert_array_equal(a, b)


def test_the_residual_mlp_is_nothing_at_first():
    tokens = jnp.asarray(tokens_of(4, 6)[0])
    with_mlp = attentive_probe.make_head(4, 8, heads=2, width=0, mlp=True)
    without = attentive_probe.make_head(4, 8, heads=2, width=0, mlp=False)
    weights = jax.jit(with_mlp.init)(jax.random.key(0), tokens)
    same = {"params": {k: v for k, v in weights["params"].items() if not k.startswith("mlp")}}
    found, want = jax.jit(with_mlp.apply)(weights, tokens), jax.jit(without.apply)(same, tokens)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert weights["params"]["mlp_in"]["kernel"].unbox().shape == (8, 32)


def test_what_is_wrong_is_named(parts):
    given = given_both(*parts)
    with pytest.raises(UserError, match="heads=3, width=8. Use one of .1, 2, 4, 8."):
        run(given, heads=3)
    with pytest.raises(UserError, match="at least 1 epoch; got epochs=0"):
        run(given, epochs=0)
    with pytest.raises(
        UserError, match=r"must fit in memory_gb=1e-05; 64 clips take 0.00 GB. Lower"
    ):
        run(given, memory_gb=1e-5)
    blind = [(x, np.full_like(y, -1)) for x, y in parts]
    with pytest.raises(UserError, match="needs labels; got none among the train videos"):
        run(given_both(*blind), epochs=1)
    with pytest.raises(UserError, match="needs labels; got none among the held_out videos"):
        run(given_both(parts[0], blind[1]))
    with pytest.raises(UserError, match="needs an encoder that gives tokens"):
        EVALUATORS.get("attentive_probe")(given_of(parts[0][0]), examples=1, train_examples=1)
