"""The losses of the contrastive stage against plain NumPy; rows that lack a modality; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from invideo_jax import losses, masking, state
from invideo_jax.errors import UserError
from invideo_jax.models.attention import fold
from invideo_jax.models.text_encoder import Bert
from invideo_jax.scale import flops
from invideo_jax.steps import contrastive, masked, matching, pair_losses, positives, update
from invideo_jax.text_masking import draw_words, mask_words
from tests import golden_stage2
from tests.steps import small_alignment as small

MODEL = small.model()


def apply(params, method, *args, **more):
    return MODEL.apply({"params": params}, *args, method=method, **more)


@functools.cache
def compiled():
    """(params, batch) -> loss, averages, what was encoded; and what an oracle needs, made directly."""
    of = small.objective()

    def run(params, batch):
        keys = masked.example_keys(small.KEY, batch["position"])
        encoded = of.encode(params, batch, keys, False)
        return of.join(params, encoded, batch, keys, False), encoded

    return jax.jit(run)


@functools.cache
def measured():
    (loss, averages), encoded = compiled()(small.params(), small.batch())
    return jax.device_get((loss, averages, encoded))


def rows_of(name, batch):
    """The rows that have both sides, written out."""
    there = []
    slot = {"vsc": "speech", "uta": None, "avc": None}.get(name, "")
    if slot == "":
        slot = "sound" if name[:2] in ("at", "am") else "caption"
    for i in range(len(batch["valid"])):
        ok = batch["valid"][i]
        if name in ("vtc", "vtm", "mlm", "vsc", "uta") or name.startswith("av"):
            ok &= batch["has_video"][i]
        if name[0] == "a":
            ok &= batch["audio_frames"][i] > 0
        if slot:
            ok &= batch[f"text_{slot}_valid"][i].any()
        there.append(bool(ok))
    return np.array(there)


def contrast_loop(a, b, temperature, ids):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    total = 0.0
    for one, other in ((a, b), (b, a)):
        for i in range(len(ids)):
            logits = other @ one[i] / temperature
            log_share = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            total -= np.mean([log_share[j] for j in range(len(ids)) if ids[j] == ids[i]])
    return total / len(ids) / 2


SIDES = {
    "vtc": ("video", "text_caption"), "atc": ("audio", "text_sound"), "avc": ("audio", "video"),
    "avtc": ("audio_video", "text_caption"), "vsc": ("video", "text_speech"),
}  # fmt: skip


def test_contrastive_losses_are_loops_over_the_rows_that_have_both_sides():
    _, averages, encoded = measured()
    batch = small.batch()
    for name, (a, b) in SIDES.items():
        keep = rows_of(name, batch)
        want = contrast_loop(encoded[a][keep], encoded[b][keep], 0.2, batch["example"][keep])
        np.testing.assert_allclose(averages[name].value, want, rtol=2e-5)
        assert averages[name].weight == keep.sum() < 6


def test_the_total_is_the_sum_of_means_by_factor():
    loss, averages, _ = measured()
    want = sum(weight * averages[name].value for name, weight in small.ALL.items())
    np.testing.assert_allclose(loss.value, want, rtol=1e-6)
    assert loss.weight == small.batch()["valid"].sum()
    np.testing.assert_allclose(averages["temperature"].value, 0.2, rtol=1e-6)


def test_retrieval_within_the_batch_is_counted():
    _, averages, encoded = measured()
    batch = small.batch()
    keep = rows_of("vtc", batch)
    a, b = (encoded[k][keep] for k in SIDES["vtc"])
    ids = batch["example"][keep]
    cosines = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    for name, table in (("video_to_text", cosines), ("text_to_video", cosines.T)):
        right = [
            all(table[i, i] > table[i, j] for j in range(len(ids)) if ids[j] != ids[i])
            for i in range(len(ids))
        ]
        np.testing.assert_allclose(averages[f"vtc_{name}"].value, np.mean(right), rtol=1e-6)
        assert averages[f"vtc_{name}"].weight == len(ids)


def test_words_and_the_teacher_against_their_formulas():
    _, averages, _ = measured()
    batch = small.batch()

    @jax.jit
    def run(params, batch):
        keys = masked.example_keys(small.KEY, batch["position"])
        visible, _ = masking.random(fold(keys, masked.MASK), grid=(2, 2, 2), ratio=0.5)
        seen = apply(params, "encode_video", batch["video"], visible)
        use = fold(fold(keys, pair_losses._WORDS), list(pair_losses.LOSSES).index("mlm"))
        ids, real = batch["text_caption"], batch["text_caption_valid"]
        draws = draw_words(use, length=small.LENGTH, vocabulary=small.WORDS)
        shown, chosen = mask_words(ids, draws, pad=0, first=1, mask=2)
        logits = apply(params, "words", shown, real, apply(params, "context", seen["tokens"], None))
        return visible, seen, jax.nn.log_softmax(logits), chosen

    visible, seen, shares, chosen = jax.device_get(run(small.params(), batch))
    keep = rows_of("mlm", batch)
    places = [(i, j) for i, j in zip(*np.nonzero(chosen)) if keep[i]]
    terms = [-shares[i, j, batch["text_caption"][i, j]] for i, j in places]
    np.testing.assert_allclose(averages["mlm"].value, np.mean(terms), rtol=2e-5)
    assert averages["mlm"].weight == len(places) > 3
    terms = []
    for i in np.flatnonzero(rows_of("uta", batch)):
        at = [0, *(visible[i] + 1)]
        middle = 2 - 2 * (seen["clip_middle"][i, 0] * batch["clip_middle"][i, 0, at]).sum(-1)
        terms.append(middle.mean() + 2 - 2 * seen["clip_final"][i] @ batch["clip_final"][i])
    np.testing.assert_allclose(averages["uta"].value, np.mean(terms), rtol=2e-5)


def test_a_row_is_not_touched_by_what_is_missing_or_padding():
    """Other numbers where nothing counts: all averages stay, to the last bit."""
    batch = small.batch()
    other = {k: v.copy() for k, v in batch.items()}
    rng = np.random.default_rng(9)
    other["video"][~batch["has_video"]] = rng.normal(size=other["video"].shape[1:]) * 9
    other["audio"][batch["audio_frames"] == 0] = rng.normal(size=other["audio"].shape[1:]) * 9
    padding = ~batch["valid"]
    for name in ("video", "audio"):
        other[name][padding] = 7.0
    for slot in ("caption", "sound", "speech"):
        other[f"text_{slot}"][~batch[f"text_{slot}_valid"].any(1)] = 5
        other[f"text_{slot}_valid"][padding] = True
    other["clip_middle"][padding] = np.nan
    _, averages, _ = measured()
    (_, found), _ = compiled()(small.params(), other)
    for name in averages:
        np.testing.assert_allclose(found[name].value, averages[name].value, rtol=1e-6)
        assert found[name].weight == averages[name].weight


def test_rows_without_a_text_count_as_if_they_were_not_there():
    batch = small.batch()
    half = np.arange(8) < 4
    lacking = dict(batch, text_caption_valid=batch["text_caption_valid"] & half[:, None])
    absent = dict(batch, valid=batch["valid"] & half)
    run = lambda b: jax.device_get(compiled()(small.params(), b)[0][1])
    a, b, whole = run(lacking), run(absent), measured()[1]
    for name in ("vtc", "vtm", "mlm", "avtc", "avtm", "avmlm"):
        np.testing.assert_allclose(a[name].value, b[name].value, rtol=1e-6)
        assert 0 < a[name].weight == b[name].weight <= whole[name].weight
    assert a["vtc"].weight < whole["vtc"].weight
    for name in ("vsc", "avc", "uta", "atc"):
        np.testing.assert_allclose(a[name].value, whole[name].value, rtol=1e-6)


def test_a_batch_without_a_modality_gives_zero():
    batch = small.batch()
    none = dict(batch, audio_frames=np.zeros(8, np.int32))
    averages = jax.device_get(compiled()(small.params(), none)[0][1])
    for name in small.ALL:
        silent = name[0] == "a"
        assert (averages[name].weight == 0) == silent
        assert (averages[name].value == 0) == silent and np.isfinite(averages[name].value)


def test_matching_takes_other_rows_and_scores_each_pair():
    """Pieces, three kinds of pairs and weights, with a stand-in for the fusion blocks."""
    rng = np.random.default_rng(0)
    size = 8
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)
    texts, real, clips = make(size, 3, 4), rng.random((size, 3)) < 0.7, make(size, 5, 4)
    found = matching.Negatives(
        *(np.roll(np.arange(size), k).astype(np.int32) for k in (1, 3)),
        np.arange(size) != 2,
        np.arange(size) != 5,
    )

    def match(text, real, clip, keys):
        both = (text * real[..., None]).sum(1) * clip["tokens"].mean(1)
        return jnp.stack([both[:, :2].sum(1), both[:, 2:].sum(1)], 1)

    one = lambda t, v: np.asarray(
        match(texts[t][None], real[t][None], {"tokens": clips[v][None]}, None)[0]
    )
    valid = np.arange(size) != 7
    for parts in (1, 2, 4):
        scores = matching.scores(
            match, (texts, real), {"tokens": clips}, found, keys=None, parts=parts, form="dense"
        )
        for i in range(size):
            np.testing.assert_allclose(scores[0, i], one(i, i), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(scores[1, i], one(i, found.clips[i]), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(scores[2, i], one(found.texts[i], i), rtol=1e-4, atol=1e-5)
    terms, right = [], []
    for kind, there in enumerate((valid, valid & found.has_clip, valid & found.has_text)):
        for i in np.flatnonzero(there):
            logits, label = np.asarray(scores[kind, i]), int(kind == 0)
            terms.append(np.log(np.exp(logits).sum()) - logits[label])
            right.append((logits[1] > logits[0]) == label)
    loss, share = matching.loss(scores, found, valid)
    np.testing.assert_allclose(loss.value, np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(share.value, np.mean(right), rtol=1e-6)
    assert loss.weight == share.weight == 7 + 6 + 6


@pytest.mark.parametrize("case", ["vtm_hard", "vtm_hard_idx"])
def test_matching_has_the_published_loss(shared, case):
    """With the file's negatives, and the stand-in for the fusion blocks that it states."""
    tensors = load_file(shared / "golden" / "c_stage2_losses.safetensors")
    inputs = {name.removeprefix("in/"): x for name, x in tensors.items()}
    flags = np.ones(len(inputs["t2"]), bool)
    given = (inputs[f"{case}/{side}_neg_indices"].astype(np.int32) for side in ("vision", "txt"))
    found = matching.Negatives(*given, flags, flags)
    match = lambda text, real, clip, keys: golden_stage2._fake_scores(inputs, clip, text, real)
    texts = jnp.asarray(inputs["text_embeds"]), jnp.asarray(inputs["text_atts"]).astype(bool)
    clips = jnp.asarray(inputs["vision_embeds"])
    for parts in (1, len(flags)):
        scores = matching.scores(match, texts, clips, found, keys=None, parts=parts, form="dense")
        loss, _ = matching.loss(scores, found, flags)
        np.testing.assert_allclose(loss.value, inputs[f"{case}/loss"], rtol=1e-5)


def test_the_gradient_factor_is_of_embeddings_and_not_of_the_temperature():
    rng = np.random.default_rng(0)
    encoded = {k: rng.normal(size=(8, 8)).astype(np.float32) for k in SIDES["vtc"]}
    batch, found = small.batch(), []
    for factor in (1.0, 0.25):
        of = small.objective(dict(vtc=1.0), gradient_factor=factor)

        def loss(encoded, temperature, of=of):
            params = small.params() | {"temperature": temperature}
            keys = masked.example_keys(small.KEY, batch["position"])
            return of.join(params, encoded, batch, keys, False)[0].value

        found.append(jax.jit(jax.value_and_grad(loss, (0, 1)))(encoded, np.float32(0.2)))
    (value, (by_x, by_t)), (other, (fewer, same)) = found
    assert value == other and by_t == same != 0
    for name in encoded:
        np.testing.assert_allclose(fewer[name], 0.25 * by_x[name], rtol=1e-6)
        assert np.abs(by_x[name]).max() > 1e-3


# ------------------------------------------------------------------------------- shapes, traced only


def shapes(weights, frames=2, **options):
    of, batch = small.objective(weights, **options), small.batch(frames=frames)

    def run(params, batch):
        keys = masked.example_keys(small.KEY, batch["position"])
        return of.encode(params, batch, keys, False)

    return {k: v.shape for k, v in jax.eval_shape(run, small.params(), batch).items()}


def test_masks_of_videos_and_of_images():
    mask = lambda video, image: dict(mask=dict(name="random", video=video, image=image))
    tokens = lambda frames, **m: shapes(dict(vtm=1.0), frames, **m)["video/tokens"]
    assert tokens(2, **mask(0.75, 0.5)) == (8, 1 + 2, 16)
    assert tokens(1, **mask(0.75, 0.5)) == (8, 1 + 2, 16)
    assert tokens(1, **mask(0.75, 0.25)) == (8, 1 + 3, 16)
    assert tokens(2, **mask(0.0, 0.5)) == (8, 1 + 8, 16)
    assert tokens(1, **mask(0.5, 0.0)) == (8, 1 + 4, 16)


def test_only_what_is_compared_is_encoded_and_a_shared_text_once():
    assert set(shapes(dict(vtc=1.0, vtm=0.0))) == {"video", "text_caption"}
    assert set(shapes(dict(avc=1.0))) == {"video", "audio"}
    assert set(shapes(dict(mlm=1.0))) == {"mlm", "mlm/words"}
    shared = dict(slots=dict(video="caption", audio_video="caption"))
    names = set(shapes(dict(vtc=1.0, avtc=1.0), **shared))
    assert names == {"video", "audio_video", "text_caption"}


def test_nothing_is_computed_for_factor_0_or_the_gradient_of_a_frozen_tower():
    batch = small.batch()

    def cost(weights, frozen=(), parts=1):
        mask = {
            k: jax.tree.map(lambda _: k not in frozen, v)  # noqa: B023
            for k, v in small.params().items()
        }
        split = small.make_loss(weights, trainable=mask)
        run = lambda p, b: update.two_pass(split, p, b, trainable=mask, accumulation=parts)[2]
        return flops.jaxpr_flops(run, small.params(), batch)

    full = cost(dict(vtm=1.0))
    assert cost(dict(vtm=1.0, atm=0.0, amlm=0.0)) == full < cost(dict(vtm=1.0, atm=1.0))
    seen = jnp.zeros((8, 4), jnp.int32)
    forward = flops.jaxpr_flops(
        lambda p, b: apply(p, "encode_video", b["video"], seen)["tokens"], small.params(), batch
    )
    saved = [cost(dict(vtm=1.0), parts=n) - cost(dict(vtm=1.0), ("vision",), n) for n in (1, 2)]
    assert saved[0] > 1.7 * forward  # a backward pass is two forward ones
    assert saved[1] > 1.9 * forward  # and nothing is kept for the gradient of tokens either


def test_the_step_names_its_metrics_and_keeps_the_shapes():
    tx, weights = optax.sgd(0.1), dict(vtc=1.0, vtm=1.0)
    step = contrastive.make_train_step(
        model=MODEL, tx=tx, stage_key=small.KEY, accumulation=2, **small.OPTIONS, weights=weights
    )
    before = state.create(small.params(), tx, keep_ema=False)
    after, metrics = jax.eval_shape(step, before, small.batch())
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, before, after)
    assert all(jax.tree.leaves(same))
    more = {"vtc_video_to_text", "vtm_accuracy", "temperature", "grad_norm", "skipped"}
    assert set(metrics) >= set(weights) | more


# ------------------------------------------------------------------------------- positives, bounds


def test_texts_and_examples_together_make_classes():
    ids = np.array([[3, 4, 0], [5, 6, 7], [3, 4, 9], [3, 4, 0], [0, 0, 0], [0, 0, 0], [5, 6, 7]])
    valid = np.array(
        [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1], [0] * 3, [0] * 3, [1, 1, 1]], bool
    )
    text = np.asarray(jax.jit(positives.text_ids)(ids, valid))
    assert text[0] == text[2] and text[1] == text[6]
    assert len(set(text)) == 5
    examples = np.array([10, 11, 12, 11, 13, 13, 14])
    merged = np.asarray(jax.jit(positives.merged)(examples, text))
    groups = [{0, 2}, {1, 3, 6}, {4, 5}]
    for i in range(7):
        for j in range(7):
            assert (merged[i] == merged[j]) == any(i in g and j in g for g in groups)


def test_many_links_are_followed_to_the_end():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 60, 80), rng.integers(0, 60, 80)
    labels = np.arange(80)
    for _ in range(80):
        for group in (first, second):
            labels = np.array([labels[group == g].min() for g in group])
    found = np.asarray(jax.jit(positives.merged)(first, second))
    np.testing.assert_array_equal(found, labels)


def test_the_temperature_is_put_back_as_it_is_or_as_a_logarithm():
    hold = contrastive.hold_temperature
    for value, want in ((0.6, 0.5), (0.0, 0.001), (0.3, 0.3)):
        found = hold({"temperature": jnp.float32(value)}, bounds=(0.001, 0.5))["temperature"]
        np.testing.assert_allclose(found, want, rtol=1e-6)
    for value, want in ((5.0, np.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        found = hold({"logit_scale": jnp.float32(value)}, bounds=(0.01, 1.0))["logit_scale"]
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)
    free = hold({"temperature": jnp.float32(7.0)}, bounds=(0.01, float("inf")))
    assert free["temperature"] == 7.0


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "weights, options, text",
    [
        (dict(vtc=0.0), {}, "at least one of vtc"),
        (dict(vtx=1.0), {}, "Did you mean"),
        (dict(vsc=1.0), dict(slots=dict(video="caption")), "slots.speech"),
        (dict(vtm=1.0), dict(negatives=dict(kind="soft")), "'hard' or 'uniform'"),
        (dict(mlm=1.0), dict(words=dict(hiden=0.5)), "got 'hiden'"),
        (dict(mlm=1.0), dict(words=dict(mask=None, vocabulary=5)), "mask word"),
        (dict(mlm=1.0), dict(words=dict(vocabulary=500)), "words.vocabulary=500"),
        (
            dict(uta=1.0),
            dict(uta=dict(clip_middle=0.0, clip_final=0.0)),
            "clip_middle or clip_final",
        ),
    ],
)
def test_wrong_options_are_refused(weights, options, text):
    with pytest.raises(UserError, match=text):
        small.objective(weights, **options)


def test_a_loss_that_the_model_cannot_give_is_refused():
    silent = small.model(audio=None, views=("video",))
    for name in ("atc", "avc", "avtm"):
        with pytest.raises(UserError, match=f"{name} needs a model with an audio tower"):
            small.objective({name: 1.0}, silent)
    apart = small.model(joint=False)
    with pytest.raises(UserError, match="avtc needs an embedding of sound and video"):
        small.objective(dict(avtc=1.0), apart)
    one = small.model(views=("video",))
    with pytest.raises(UserError, match="atm needs a matching head for the view audio"):
        small.objective(dict(atm=1.0), one)
    plain = small.model(text=Bert(16, 1, 2, 24, fusion_from=1, vocabulary=small.WORDS))
    with pytest.raises(UserError, match="vtm needs a text tower with fusion blocks"):
        small.objective(dict(vtm=1.0), plain)
    without = {k: v for k, v in small.batch().items() if k != "clip_final"}
    loss = small.make_loss(dict(uta=1.0))
    with pytest.raises(UserError, match="none called clip_final"):
        jax.eval_shape(loss, small.params(), without)


# ------------------------------------------------------------------------------- gradients, towers


@pytest.mark.slow  # 20 s of compiling
def test_hidden_tokens_and_missing_rows_have_no_gradient_and_nothing_gives_nothing():
    loss = small.make_loss(dict(vtc=1.0, vtm=1.0, mlm=1.0))
    value = lambda params, video, batch: loss(params, batch | {"video": video})[0].value
    grad = jax.jit(jax.grad(value, (0, 1)))
    batch = small.batch()
    by_params, by_video = jax.device_get(grad(small.params(), batch["video"], batch))
    keys = masked.example_keys(small.KEY, batch["position"])
    visible, _ = masking.random(fold(keys, masked.MASK), grid=(2, 2, 2), ratio=0.5)
    cubes = by_video.reshape(8, 2, 2, 4, 2, 4, 3).transpose(0, 1, 2, 4, 3, 5, 6).reshape(8, 8, -1)
    for row, seen, there in zip(np.abs(cubes).max(-1), visible, rows_of("vtc", batch)):
        assert (np.delete(row, seen) == 0).all()
        assert (row[seen] > 0).all() if there else (row == 0).all()
    assert np.abs(by_params["temperature"]) > 0
    nothing = dict(batch, valid=np.zeros(8, bool))
    for leaf in jax.tree.leaves(grad(small.params(), batch["video"], nothing)):
        assert (np.asarray(leaf) == 0).all()


@pytest.mark.slow
def test_towers_are_of_whole_clips_and_of_length_1():
    towers = contrastive.make_towers(MODEL, tokenize=lambda texts: None)
    batch, params = small.batch(), small.params()
    assert towers.vocabulary == small.WORDS
    video, audio, both = (
        jax.jit(f)(params, batch) for f in (towers.video, towers.audio, towers.audio_video)
    )
    ids, valid = batch["text_caption"], batch["text_caption_valid"]
    text = jax.jit(towers.text)(params, ids, valid)
    for made in (video, audio, both, text):
        assert made["embedding"].dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(made["embedding"], axis=1), 1, rtol=1e-5)
    assert video["tokens"].shape == (8, 9, 16)
    for made in (audio, both):
        np.testing.assert_array_equal(made["valid"], batch["audio_frames"] > 0)
    score = jax.jit(towers.match)(params, text["tokens"], valid, video["tokens"])
    context = apply(params, "context", video["tokens"], None)
    want = apply(params, "match", text["tokens"], valid, context)[:, 1]
    np.testing.assert_allclose(score, want, rtol=1e-4, atol=1e-5)
    alone = losses.unit(
        apply(params, "encode_audio", batch["audio"], batch["audio_frames"])["embedding"]
    )
    np.testing.assert_allclose(audio["embedding"], alone, rtol=1e-4, atol=1e-5)
    deaf = contrastive.make_towers(small.model(audio=None, views=("video",)), tokenize=None)
    assert deaf.audio is None and deaf.audio_video is None and deaf.match is not None
