"""Two towers in one space: where each tower's embedding comes from, temperatures, learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import losses, sharding
from invideo_jax.errors import UserError
from invideo_jax.interop import models
from invideo_jax.models import alignment, clip_vit, uniformer_v2, video_clip, video_encoder
from invideo_jax.models.llama import LlamaText
from invideo_jax.models.text_encoder import ClipText

T, SIDE = 2, 16  # frames, pixels of a side; patches of 8


def text(**options):
    sizes = dict(width=16, depth=2, heads=2, mlp_width=32, output_width=24)
    return ClipText(**(sizes | dict(vocabulary=30, positions=8, scan=True) | options))


def internvideo2():
    encoder = video_encoder.build("Micro", frames=T, image_size=SIDE, pool_width=24, scan=True)
    words = LlamaText(24, 2, 4, 36, 24, 2, vocabulary=30, lora_rank=2, scan=True)
    return video_clip.VideoClip(video_clip.PooledEncoder(encoder), words)


def viclip():
    encoder = clip_vit.build("Micro", frames=T, image_size=SIDE, joint=True, scan=True)
    return video_clip.VideoClip(video_clip.PooledEncoder(encoder), text())


def internvideo1():
    encoder = uniformer_v2.build("Micro", frames=T, image_size=SIDE, scan=True)
    scale = dict(initial_temperature=0.07, temperature_range=(0.01, 1.0), logarithmic=True)
    return video_clip.VideoClip(video_clip.PooledEncoder(encoder), text(), **scale)


def small():
    encoder = video_encoder.build("Micro", frames=T, image_size=SIDE, pool_width=20, scan=True)
    return video_clip.VideoClip(alignment.ProjectedEncoder(encoder, 24), text(causal=False))


FORMS = dict(internvideo2=internvideo2, viclip=viclip, internvideo1=internvideo1, small=small)
VIDEO = np.random.default_rng(0).normal(size=(2, T, SIDE, SIDE, 3)).astype(np.float32)
IDS = np.array([[5, 3, 9, 7, 29], [4, 29, 0, 0, 0]], np.int32)  # each ends in the highest id
VALID = IDS > 0


@functools.cache
def ready(name):
    model = FORMS[name]()
    params = jax.jit(lambda: sharding.unbox(video_clip.init(model, jax.random.key(0))))()
    rng = np.random.default_rng(1)
    draw = lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) if x.ndim else x
    return model, jax.tree.map(draw, params)  # the temperature as it starts


def call(model, params, *inputs, method=None):
    return jax.jit(lambda p: model.apply({"params": p}, *inputs, method=method))(params)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol)


_SLOW = pytest.mark.slow  # each compiles a model
_QUICK_FIRST = ["viclip", *(pytest.param(n, marks=_SLOW) for n in FORMS if n != "viclip")]


@pytest.mark.parametrize("name", _QUICK_FIRST)
def test_embeddings_come_from_where_they_should(name):
    model, params = ready(name)
    out = call(model, params, VIDEO, None, IDS, VALID)
    encoder = model.vision.encoder
    inside = params["vision"]["encoder"]
    tokens = call(encoder, inside, VIDEO)[0]
    pooled = call(encoder, inside, tokens, method="pooled")
    close(out["tokens"], tokens)
    close(out["pooled"], pooled)
    if name == "small":
        p = params["vision"]
        centred = np.asarray(pooled) - np.asarray(pooled).mean(-1, keepdims=True)
        x = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
        x = x * p["align_norm"]["scale"] + p["align_norm"]["bias"]
        close(out["embedding"], x @ p["align"]["kernel"] + p["align"]["bias"])
    else:
        close(out["embedding"], pooled)
        close(out["embedding"], out["pooled"], 0)
    assert out["embedding"].shape == out["text_embedding"].shape == (2, 24)
    last = np.asarray(out["text_tokens"])[[0, 1], [4, 1]]
    close(out["text_pooled"], last, 0)
    close(out["text_embedding"], last @ params["text"]["projection"]["kernel"])


def test_the_end_of_a_text_is_its_last_real_token_or_the_highest_id():
    """The first for any tokeniser, the second as published; they agree for CLIP's own texts."""
    model, params = ready("viclip")
    encode = lambda ids, *valid: call(model, params, ids, *valid, method="encode_text")
    close(encode(IDS)["embedding"], encode(IDS, VALID)["embedding"], 0)
    other = np.array([[29, 3, 9, 7, 5], [29, 4, 0, 0, 0]], np.int32)  # the highest id stands first
    told, guessed = encode(other, VALID), encode(other)
    close(told["pooled"], np.asarray(told["tokens"])[[0, 1], [4, 1]], 0)
    close(guessed["pooled"], np.asarray(guessed["tokens"])[:, 0], 0)
    nothing = encode(other, np.zeros_like(VALID))
    assert np.isfinite(nothing["embedding"]).all()


def test_padding_is_hidden_where_all_tokens_see_all():
    model, params = ready("small")
    changed = np.where(VALID, IDS, 11)
    encode = lambda ids: call(model, params, ids, VALID, method="encode_text")
    close(encode(changed)["embedding"], encode(IDS)["embedding"], 1e-6)
    assert np.abs(encode(changed)["tokens"] - encode(IDS)["tokens"])[1, 2:].max() > 1e-2


def test_viclips_hidden_tokens_have_no_part_in_it():
    model, params = ready("viclip")
    visible = np.array([[0, 5], [3, 6]], np.int32)  # of 2 x 2 x 2 patches of 8 pixels

    @jax.jit
    def sensitivity(video):
        run = lambda v: model.apply({"params": params}, v, visible, method="encode_video")
        return jax.grad(lambda v: jnp.square(run(v)["embedding"]).sum())(video)

    grads = np.abs(sensitivity(VIDEO)).reshape(2, T, 2, 8, 2, 8, 3).max((3, 5, 6)).reshape(2, -1)
    for row, ids in zip(grads, visible):
        assert set(np.flatnonzero(row)) == set(ids)


def test_internvideo1s_video_tower_sees_every_patch():
    model, params = ready("internvideo1")
    with pytest.raises(UserError, match="mask ratio 0"):
        call(model, params, VIDEO, np.array([[0], [1]]), method="encode_video")


@pytest.mark.parametrize(
    "name, path, start, cases",
    [
        # Published: held from 0.01 on, with no upper end.
        ("viclip", "temperature", 0.01, [(0.2, 0.2), (7.0, 7.0), (1e-4, 0.01)]),
        # Published: exp(logit_scale) multiplies, logit_scale is held in 0 .. ln 100.
        ("internvideo1", "logit_scale", np.log(1 / 0.07), [(1.5, np.exp(-1.5)), (9.0, 0.01), (-2.0, 1)]),
    ],
)  # fmt: skip
def test_temperatures_start_and_are_held_as_published(name, path, start, cases):
    model, params = ready(name)
    np.testing.assert_allclose(params[path], start, rtol=1e-6)
    assert {"temperature", "logit_scale"} & set(params) == {path}
    for value, want in cases:
        now = lambda t: model.apply({"params": params | {path: t}}, method="temperature")
        held, slope = jax.value_and_grad(now)(jnp.float32(value))
        np.testing.assert_allclose(held, want, rtol=1e-5)
        # Held or not, it can move: the slope is that of the value without bounds, where it is held.
        np.testing.assert_allclose(slope, 1 if path == "temperature" else -want, rtol=1e-5)


def test_models_as_text_come_back():
    for make in FORMS.values():
        model = make()
        meta = models.describe(model)
        assert models.shapes(models.make(meta)) == models.shapes(model)
        assert models.encoder_of(model)[1] == "vision/encoder"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m.clone(text=text(output_width=10)), "24 channels of videos, 10 of texts"),
        (lambda m: m.clone(initial_temperature=0.001), "start within its range"),
        (lambda m: m.clone(temperature_range=(0.0, 1.0)), "begins above 0"),
    ],
)
def test_attributes_that_do_not_fit(change, words):
    with pytest.raises(UserError, match=words):
        change(viclip()).check()
    with pytest.raises(UserError, match="needs its pool"):
        video_clip.PooledEncoder(video_encoder.build("Micro", pool_width=0)).check()


@pytest.mark.slow  # 10 s of compiling
@pytest.mark.parametrize("name", FORMS)
def test_it_learns_which_text_belongs_to_which_video(name):
    model, _ = ready(name)
    params = jax.jit(lambda: sharding.unbox(video_clip.init(model, jax.random.key(0))))()

    def loss(p):
        out = model.apply({"params": p}, VIDEO, None, IDS, VALID)
        scale = model.apply({"params": p}, method="temperature")
        scores = losses.similarity(out["embedding"], out["text_embedding"], scale)
        return losses.contrastive(scores).value

    @jax.jit
    def descend(p):
        def step(p, _):
            value, grads = jax.value_and_grad(loss)(p)
            return jax.tree.map(lambda x, g: x - 0.01 * jnp.sign(g), p, grads), value

        return jax.lax.scan(step, p, None, length=60)

    _, values = descend(params)
    assert float(values[-1]) < max(float(values[0]) / 10, 0.01)
