"""Options of the contrastive step: sigmoid and its bias, adapters alone, negatives, parts, small types."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import optim, sharding, state
from invideo_jax.errors import UserError
from invideo_jax.models import alignment, stage2, video_clip, video_encoder
from invideo_jax.models.llama import LlamaText
from invideo_jax.models.text_encoder import Bert
from invideo_jax.steps import contrastive, masked, matching, pair_losses, update
from tests.steps import small_alignment as small

RATE = 1e-3


def sigmoid_loop(a, b, temperature, bias, ids, valid):
    """SigLIP's loss and its gradients by both sides' lengths-of-any-kind, temperature and bias."""
    rows, size = np.flatnonzero(valid), valid.sum()
    length = lambda x: np.linalg.norm(x, axis=1, keepdims=True)
    u, v = a / length(a), b / length(b)
    total, by_t, by_bias = 0.0, 0.0, 0.0
    by_u, by_v = np.zeros_like(u), np.zeros_like(v)
    for i in rows:
        for j in rows:
            cosine, same = u[i] @ v[j], ids[i] == ids[j]
            z = cosine / temperature + bias
            total += np.log1p(np.exp(-z if same else z)) / size
            slope = (1 / (1 + np.exp(-z)) - same) / size
            by_t -= slope * cosine / temperature**2
            by_bias += slope
            by_u[i] += slope * v[j] / temperature
            by_v[j] += slope * u[i] / temperature
    turn = lambda g, x, e: (g - x * (g * x).sum(1, keepdims=True)) / length(e)
    return total, turn(by_u, u, a), turn(by_v, v, b), by_t, by_bias


def values(of, params, encoded, batch):
    """What the second part of the losses makes of these embeddings; `params` are those that matter."""
    params = small.params() | params
    keys = masked.example_keys(small.KEY, batch["position"])
    return of.join(params, encoded, batch, keys, False)


def random_sides(*names, rows=8, width=8):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(rows, width)).astype(np.float32) for name in names}


# ------------------------------------------------------------------------------------ sigmoid


def test_the_sigmoid_loss_needs_a_model_with_a_bias():
    with pytest.raises(
        UserError, match="kind='sigmoid' needs a model with a bias.*initial_bias=None"
    ):
        small.objective(dict(vtc=1.0), kind="sigmoid")
    small.objective(dict(vtc=1.0), small.model(initial_bias=-10.0), kind="sigmoid")


@pytest.mark.parametrize("start", [None, -10.0])
def test_only_a_model_of_the_sigmoid_loss_has_a_bias(start):
    for make, init in ((small.model, stage2.init), (two_towers, video_clip.init)):
        made = make(initial_bias=start)
        shapes = sharding.unbox(jax.eval_shape(functools.partial(init, made, jax.random.key(0))))
        assert ("bias" in shapes) == (start is not None)
        if start is not None:
            run = lambda key, made=made, init=init: sharding.unbox(init(made, key))["bias"]
            assert jax.jit(run)(jax.random.key(0)) == start


def test_the_sigmoid_loss_of_every_pair_of_modalities_is_a_loop_over_pairs():
    weights = dict(vtc=1.0, avc=0.5)
    made = small.model(initial_bias=-2.0)
    of = small.objective(weights, made, kind="sigmoid", chunk=3, form="chunked")
    batch, encoded = small.batch(), random_sides("video", "audio", "text_caption")

    def loss(encoded, temperature, bias):
        params = {"temperature": temperature, "bias": bias}
        total, averages = values(of, params, encoded, batch)
        return total.value, averages

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (total, averages), (by_x, by_t, by_bias) = run(encoded, np.float32(0.2), np.float32(-1.5))
    there = batch["valid"] & batch["has_video"]
    rows = dict(
        vtc=there & batch["text_caption_valid"].any(1), avc=there & (batch["audio_frames"] > 0)
    )
    sides = dict(vtc=("video", "text_caption"), avc=("audio", "video"))
    want = {k: np.zeros_like(x) for k, x in encoded.items()} | dict(t=0.0, bias=0.0, total=0.0)
    for name, factor in weights.items():
        a, b = (encoded[k].astype(np.float64) for k in sides[name])
        value, *slopes = sigmoid_loop(a, b, 0.2, -1.5, batch["example"], rows[name])
        np.testing.assert_allclose(averages[name].value, value, rtol=1e-5)
        for key, slope in zip((*sides[name], "t", "bias"), slopes):
            want[key] = want[key] + factor * slope
        want["total"] += factor * value
    np.testing.assert_allclose(total, want["total"], rtol=1e-5)
    np.testing.assert_allclose([by_t, by_bias], [want["t"], want["bias"]], rtol=1e-4)
    for name in encoded:
        np.testing.assert_allclose(by_x[name], want[name], atol=1e-5)


# ------------------------------------------------------------------------------------ two towers


def two_towers(**options):
    """InternVideo2-CLIP 1B in small: an encoder with its pool, LLaMA with LoRA."""
    encoder = video_encoder.build(
        "Nano", width=16, depth=1, heads=2, mlp_width=24, patch=4, frames=2, image_size=8,
        pool_heads=2, pool_width=8, scan=False,
    )  # fmt: skip
    text = LlamaText(
        8, 1, 2, 12, 8, 2, vocabulary=small.WORDS, lora_rank=2, dropout=0.0, scan=False
    )
    options = dict(initial_temperature=0.2) | options
    return video_clip.VideoClip(video_clip.PooledEncoder(encoder), text, **options)


@functools.cache
def trained():
    """A model, its parameters, which are trained, and what a step of descent with decay makes of them."""
    made = two_towers(initial_bias=-1.5)
    boxed = jax.eval_shape(lambda: video_clip.init(made, jax.random.key(0)))
    rng = np.random.default_rng(0)
    draw = lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32)
    params = jax.tree.map(draw, sharding.unbox(boxed))
    params |= {"temperature": np.float32(0.2), "bias": np.float32(-1.5)}
    freeze = (r"^vision/", r"^text/(?!.*lora_[ab]$)")
    mask = optim.trainable_mask(boxed, freeze)
    options = dict(freeze=freeze, weight_decay=0.1, momentum=0.0)
    tx, _ = optim.make_optimizer("sgd", schedule=lambda _: RATE, params=boxed, **options)
    step = contrastive.make_train_step(
        model=made, tx=tx, stage_key=small.KEY, weights=dict(vtc=1.0), kind="sigmoid",
        accumulation=2, trainable=mask, slots=dict(video="caption"), mask=dict(video=0.0, image=0.0),
    )  # fmt: skip
    start = state.create(jax.tree.map(jnp.array, params), tx, keep_ema=False)
    now, metrics = jax.device_get(jax.jit(step)(start, small.batch()))
    return made, params, mask, now.params, metrics


def test_the_step_of_two_towers_moves_adapters_temperature_and_bias_and_nothing_else():
    _, params, mask, now, metrics = trained()
    paths = [sharding.path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    free = [path for path, on in zip(paths, jax.tree.leaves(mask)) if on]
    assert len(free) == 6 and sum("lora" in path for path in free) == 4
    assert {"temperature", "bias"} < set(free)
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(now))]
    assert [path for path, still in zip(paths, same) if not still] == free
    assert int(metrics["first_nonfinite"]) == -1


def test_a_step_moves_the_bias_by_the_gradient_of_the_loop():
    made, params, _, now, metrics = trained()
    batch = small.batch()
    run = lambda *args, method: made.apply({"params": params}, *args, method=method)["embedding"]
    video = jax.jit(functools.partial(run, method="encode_video"))(batch["video"])
    given = batch["text_caption"], batch["text_caption_valid"]
    text = jax.jit(functools.partial(run, method="encode_text"))(*given)
    valid = batch["valid"] & batch["has_video"] & batch["text_caption_valid"].any(1)
    sides = (np.asarray(x, np.float64) for x in (video, text))
    want, _, _, by_t, by_bias = sigmoid_loop(*sides, 0.2, -1.5, batch["example"], valid)
    np.testing.assert_allclose(metrics["vtc"].value, want, rtol=1e-4)
    moved = {k: (params[k] - now[k]) / RATE for k in ("bias", "temperature")}
    np.testing.assert_allclose(moved["bias"], by_bias, rtol=1e-3)
    np.testing.assert_allclose(moved["temperature"], by_t, rtol=1e-3)
    assert abs(by_bias) > 0.1


# ------------------------------------------------------------------------------------ rows


def test_uniform_negatives_do_not_look_at_likeness(monkeypatch):
    batch, found = small.batch(64), {}
    monkeypatch.setattr(
        matching, "scores", lambda *args, **_: found.update(of=args[3]) or jnp.zeros((3, 64, 2))
    )
    sides = random_sides("video", "text_caption", rows=64)
    likeness = {}
    for kind in ("hard", "uniform"):
        of = small.objective(dict(vtm=1.0), negatives=dict(kind=kind))
        for name, encoded in dict(a=sides, b={k: x[::-1] for k, x in sides.items()}).items():
            given = encoded | {"text_caption/tokens": 0, "video/tokens": 0, "video/seen": 0}
            values(of, {"temperature": np.float32(0.01)}, given, batch)
            likeness[kind, name] = jax.device_get(found["of"])
    assert not np.array_equal(likeness["hard", "a"].clips, likeness["hard", "b"].clips)
    for a, b in zip(likeness["uniform", "a"], likeness["uniform", "b"]):
        np.testing.assert_array_equal(a, b)
    drawn = likeness["uniform", "a"]
    there = batch["valid"] & batch["has_video"] & batch["text_caption_valid"].any(1)
    for columns, exists in ((drawn.clips, drawn.has_clip), (drawn.texts, drawn.has_text)):
        np.testing.assert_array_equal(exists, there)
        assert there[columns[there]].all() and len(set(columns[there])) > 15
        assert (batch["example"][columns[there]] != batch["example"][there]).all()


def test_the_teacher_of_images_alone_says_nothing_of_videos():
    of = small.objective(dict(uta=1.0), uta=dict(images_only=True))
    encoded, params = {"uta": np.arange(8.0, dtype=np.float32)}, {"temperature": np.float32(0.2)}
    _, of_videos = values(of, params, encoded, small.batch(frames=2))
    assert of_videos["uta"].weight == 0 == of_videos["uta"].value
    batch = small.batch(frames=1)
    _, of_images = values(of, params, encoded, batch)
    there = batch["valid"] & batch["has_video"]
    np.testing.assert_allclose(of_images["uta"].value, np.flatnonzero(there).mean(), rtol=1e-6)


def test_a_shorter_batch_is_one_whose_last_rows_are_marked():
    """Rows that are not there, and rows that are marked as padding, give the same averages."""
    weights = dict(vtc=1.0, atc=1.0, avc=1.0, vsc=1.0, uta=1.0, mlm=1.0)
    of, params = small.objective(weights), {"temperature": np.float32(0.2)}
    whole = random_sides("video", "audio", "text_caption", "text_sound", "text_speech")
    whole |= {"uta": np.arange(8.0), "mlm": np.arange(8.0), "mlm/words": np.full(8, 2.0)}
    batch = small.batch()
    marked = dict(batch, valid=batch["valid"] & (np.arange(8) < 5))
    cut = lambda tree: {k: v[:5] for k, v in tree.items()}
    loss, averages = values(of, params, whole, marked)
    other, shorter = values(of, params, cut(whole), cut(batch))
    np.testing.assert_allclose(loss.value, other.value, rtol=1e-6)
    for name in averages:
        np.testing.assert_allclose(averages[name].value, shorter[name].value, rtol=1e-6)
        assert averages[name].weight == shorter[name].weight > 0


LACKING = dict(
    texts=lambda b: {k: v & False for k, v in b.items() if k.startswith("text") and "valid" in k},
    sounds=lambda b: {"audio_frames": b["audio_frames"] * 0},
    pictures=lambda b: {"has_video": b["has_video"] & False},
)


@pytest.mark.parametrize("lost", LACKING)
def test_a_batch_without_a_modality_has_no_loss_and_no_gradient_of_it(lost):
    weights = dict(vtc=1.0, atc=1.0, vsc=1.0) if lost == "texts" else dict(atc=1.0, avc=1.0)
    weights = dict(vtc=1.0, vsc=1.0, avtc=1.0) if lost == "pictures" else weights
    names = "video", "audio", "audio_video", "text_caption", "text_sound", "text_speech"
    batch = small.batch()
    batch |= LACKING[lost](batch)
    for form in ("dense", "chunked"):
        of = small.objective(weights, form=form, chunk=3)

        def loss(encoded, temperature, of=of):
            return values(of, {"temperature": temperature}, encoded, batch)[0].value

        value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(
            random_sides(*names), np.float32(0.2)
        )
        assert value == 0 and all((x == 0).all() for x in jax.tree.leaves(grads))


def test_rows_that_cannot_be_cut_are_an_error_by_name():
    loss = small.make_loss(dict(vtm=1.0), match_parts=3)
    with pytest.raises(UserError, match="multiple of match_parts; got batch=8, match_parts=3"):
        jax.eval_shape(loss, small.params(), small.batch())


def test_as_many_rows_as_there_may_be_at_a_time():
    for size, rows, want in ((8, 8, 1), (8, 3, 4), (12, 5, 3), (13, 4, 13), (6, 99, 1)):
        assert update.parts_of(size, rows) == want


def largest(jaxpr):
    """Numbers in the largest array that is computed anywhere in it."""
    found = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                found.append(largest(getattr(inner, "jaxpr", inner)))
    return max(found, default=0)


def test_an_evaluation_of_many_rows_holds_what_a_microbatch_does():
    def held(rows, count):
        loss = small.make_loss(dict(vtm=1.0, mlm=1.0), made=tiny(), rows=rows, form="chunked")
        return largest(jax.make_jaxpr(loss)(params_of(tiny()), small.batch(count)).jaxpr)

    inside = held(None, 8)
    assert held(None, 64) == 8 * inside  # the hidden layer of an MLP
    assert held(8, 64) == inside


def tiny(dtype=jnp.float32):
    """Video and text alone, with wide MLPs, one block of each kind."""
    same = dict(scan=False, dtype=dtype)
    vision = alignment.build(
        "Nano", width=16, depth=1, heads=2, mlp_width=1024, patch=4, frames=2, image_size=8,
        pool_heads=2, pool_width=16, mae_layers=0, clip_layers=1, clip_width=8, final_width=8,
        **same,
    )  # fmt: skip
    text = Bert(16, 2, 2, 1024, fusion_from=1, vocabulary=small.WORDS, positions=8, **same)
    return stage2.Stage2(vision, text, width=8)


@functools.cache
def params_of(made):
    abstract = jax.eval_shape(lambda: stage2.init(made, jax.random.key(0)))
    rng = np.random.default_rng(0)
    draw = lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32)
    return jax.tree.map(draw, sharding.unbox(abstract)) | {"temperature": np.float32(0.2)}


# ------------------------------------------------------------------------------------ types


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_of_small_types_are_float32(dtype):
    weights = {name: small.ALL[name] for name in ("vtc", "vtm", "mlm", "uta")}
    loss = small.make_loss(weights, made=tiny(dtype))
    total, averages = jax.eval_shape(loss, params_of(tiny()), small.batch())
    assert {x.dtype for x in jax.tree.leaves((total, averages))} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_losses_of_small_types_are_near_those_of_float32():
    weights = {name: small.ALL[name] for name in ("vtc", "mlm", "uta")}
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        loss = jax.jit(small.make_loss(weights, made=tiny(dtype)))
        _, averages = loss(params_of(tiny()), small.batch())
        found[dtype] = {name: float(averages[name].value) for name in weights}
    for dtype, tolerance in ((jnp.bfloat16, 0.05), (jnp.float16, 0.01)):
        for name in weights:
            assert abs(found[dtype][name] / found[jnp.float32][name] - 1) < tolerance


@pytest.mark.slow
def test_evaluation_in_parts_has_the_same_values_and_less_memory():
    weights = {name: small.ALL[name] for name in ("vtc", "vtm", "mlm", "uta")}
    params, batch, held, found = params_of(tiny()), small.batch(512), {}, {}
    for rows in (None, 64):
        loss = small.make_loss(weights, made=tiny(), rows=rows, form="chunked", chunk=64)
        run = jax.jit(loss).lower(params, batch).compile()
        held[rows] = run.memory_analysis().temp_size_in_bytes
        found[rows] = jax.device_get(run(params, batch))
    assert held[64] < 0.5 * held[None], held
    for a, b in zip(*(jax.tree.leaves(x) for x in found.values()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.slow
def test_the_compiled_step_computes_nothing_backward_for_frozen_towers():
    params, batch = params_of(tiny()), small.batch(64)
    loss = lambda mask: small.make_loss(dict(vtc=1.0), made=tiny(), trainable=mask)

    def cost(*frozen):
        mask = {k: jax.tree.map(lambda _: k not in frozen, v) for k, v in params.items()}  # noqa: B023
        made = loss(mask)
        run = lambda p, b: update.two_pass(made, p, b, trainable=mask)[2]
        return jax.jit(run).lower(params, batch).compile().cost_analysis()["flops"]

    forward = jax.jit(loss(None)).lower(params, batch).compile().cost_analysis()["flops"]
    both = cost("vision", "text")
    assert cost() > 2.3 * forward and both < 1.3 * forward
    assert both < cost("vision") < 0.9 * cost()


def test_all_random_draws_of_a_loss_have_a_use_of_their_own():
    uses = [getattr(pair_losses, name) for name in ("_AUDIO", "_TEXT", "_WORDS", "_FUSED_WORDS")]
    uses += [pair_losses._NEGATIVES, pair_losses._MATCH, masked.MASK, masked.DROP_PATH]
    assert len(set(uses)) == len(uses)


def test_towers_offer_only_what_the_model_has_parameters_for():
    judged, plain = (tiny().clone(views=views) for views in (("video",), ()))
    offered = lambda model: contrastive.make_towers(model, lambda texts: None)
    assert offered(judged).match is not None and offered(plain).match is None
    assert offered(small.model()).audio_video is not None
    assert offered(small.model().clone(joint=False)).audio_video is None
