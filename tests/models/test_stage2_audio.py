"""Stage 2 with sound: what is joined, which head speaks, what a text may look at; towers without heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax.errors import UserError
from invideo_jax.interop import models
from invideo_jax.models import alignment, stage2, video_mae
from invideo_jax.models.audio_encoder import AudioViT, Beats
from invideo_jax.models.text_encoder import Bert

B, L, F = 3, 5, 12
TEXT = Bert(16, 2, 2, 24, fusion_from=1, vocabulary=30, positions=8, scan=True)
SOUND = dict(width=16, depth=1, heads=2, mlp_width=24, patch=4, mels=8, scan=True)
BEATS = Beats(**SOUND, embed=12, conv_positions=6, conv_groups=4, buckets=16, max_distance=20)
VIEWS = ("video", "audio", "audio_video")


def vision():
    encoder = video_mae.VideoMAEEncoder(
        20, 1, 2, 24, patch=4, tubelet=1, frames=2, image_size=8, scan=True
    )
    return alignment.AlignedEncoder(encoder)


def made(**options):
    settings = dict(width=6, audio=BEATS, fusion_width=12, views=VIEWS) | options
    return stage2.Stage2(vision(), TEXT, **settings)


def random_params(model):
    rng = np.random.default_rng(0)
    draw = lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32)
    return jax.tree.map(draw, models.abstract(model))


def example():
    rng = np.random.default_rng(1)
    video = rng.normal(size=(B, 2, 8, 8, 3)).astype(np.float32)
    audio = rng.normal(size=(B, F, 8)).astype(np.float32)
    ids = rng.integers(5, 30, (B, L))
    valid = np.arange(L) < np.array([[5], [3], [4]])
    return video, audio, ids, valid


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def tokens_of(p, x):
    y = dense(p["linear"], x)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    return y * p["norm"]["scale"] + p["norm"]["bias"]


FRAMES = np.array([F, 5, 0], np.int32)


@jax.jit
def run(params, video, ids, valid, audio, frames):
    return made().apply({"params": params}, video, None, ids, valid, audio, frames)


@pytest.fixture(scope="module")
def ready():
    model = made()
    params = random_params(model)
    video, audio, ids, valid = example()
    return model, params, jax.device_get(run(params, video, ids, valid, audio, FRAMES))


def test_sound_comes_first_and_is_pooled_before_its_projection(ready):
    model, p, out = ready
    np.testing.assert_allclose(out["audio_pooled"], out["audio_tokens"].mean(1), atol=1e-6)
    heard = dense(p["audio_projection"], out["audio_pooled"])
    np.testing.assert_allclose(out["audio_embedding"], heard, atol=1e-5)
    seen = dense(p["vision_projection"], out["pooled"])
    np.testing.assert_allclose(out["embedding"], seen, atol=1e-5)
    both = dense(p["av_fusion"], np.concatenate([heard, seen], -1))
    np.testing.assert_allclose(out["audio_video_embedding"], both, atol=1e-5)
    context = jax.jit(lambda p, v, a: model.apply({"params": p}, v, a, method="context"))(
        p, out["tokens"], out["audio_tokens"]
    )
    of_sound = tokens_of(p["audio_tokens"], out["audio_tokens"])
    of_video = tokens_of(p["vision_tokens"], out["tokens"])
    np.testing.assert_allclose(context, np.concatenate([of_sound, of_video], 1), atol=1e-4)
    assert context.shape == (B, 6 + 8, 12)
    np.testing.assert_array_equal(out["audio_seen"].sum(1), [6, 6, 0])
    np.testing.assert_allclose(out["pooled"], out["tokens"].mean(1), atol=1e-6)


def test_each_view_has_its_own_context_and_head_and_looks_at_what_is_seen(ready):
    model, params, out = ready
    valid, text = jnp.asarray(example()[3]), out["text_tokens"]
    apply = lambda *inputs, **options: model.apply({"params": params}, *inputs, **options)
    rows = {"video": (1, 0), "audio": (0, 1), "audio_video": (1, 1)}

    @jax.jit
    def parts_of(video, audio):
        found = {}
        for view, (of_video, of_audio) in rows.items():
            parts = video if of_video else None, audio if of_audio else None
            context = apply(*parts, method="context")
            noise = jnp.concatenate([context, 3 + context[:, :2]], 1)
            real = jnp.arange(noise.shape[1]) < context.shape[1]
            real = jnp.broadcast_to(real, noise.shape[:2])
            found[view] = apply(text, valid, noise, real, view=view, method="match")
        ids = jnp.asarray(example()[2])
        words = apply(ids, valid, noise, real, method="words")
        return found, words, apply(ids, valid, context, method="words")

    found, words, plain = parts_of(out["tokens"], out["audio_tokens"])
    names = {v: "match" if v == "video" else f"{v}_match" for v in rows}
    for view, name in names.items():
        np.testing.assert_allclose(found[view], out[name], atol=1e-5, err_msg=view)
    np.testing.assert_allclose(words, plain, atol=1e-4)
    assert np.abs(words - out["words"]).max() > 1e-2
    heads = [params[head] for head in stage2.VIEWS.values()]
    assert len({head["kernel"].tobytes() for head in heads}) == 3


def test_an_example_depends_on_itself_alone(ready):
    _, params, out = ready
    order = np.array([2, 1, 2])
    video, audio, ids, valid = (x[order] for x in example())
    other = run(params, video, ids, valid, audio, FRAMES[order])
    for name in ("audio_video_match", "audio_match", "audio_video_embedding", "words"):
        np.testing.assert_allclose(other[name][1:], out[name][1:], atol=1e-5, err_msg=name)
        assert np.abs(other[name][0] - out[name][0]).max() > 1e-3, name


def paths(model):
    return {path.split("/")[0] for path in models.shapes(model)}


def test_parts_are_there_where_they_are_asked_for():
    common = {"temperature", "vision", "text", "vision_projection", "text_projection"}
    sound = {"vision_tokens", "audio", "audio_tokens", "audio_projection"}
    heads = {"match_head", "audio_match_head", "av_match_head"}
    assert paths(made()) == common | sound | heads | {"av_fusion"}
    assert paths(made(views=("audio_video",), joint=False)) == common | sound | {"av_match_head"}
    plain = dict(audio=None, views=("video",))
    assert paths(made(**plain)) == common | {"vision_tokens", "match_head"}
    assert paths(made(**plain, fusion_width=0)) == common | {"match_head"}
    cross = lambda model: models.shapes(model)["text/fusion_stack/blocks/cross/key/kernel"]
    assert cross(made()) == (1, 12, 16) and cross(made(**plain, fusion_width=0)) == (1, 20, 16)
    other = made(audio=AudioViT(**SOUND))
    assert models.make(models.describe(other)) == other.clone(
        vision=other.vision.clone(encoder=other.vision.encoder.clone(scan=False)),
        text=other.text.clone(scan=False),
        audio=other.audio.clone(scan=False),
    )


def test_mistakes_say_what_fits(ready):
    for options, message in [
        (
            dict(fusion_width=0),
            r"must have one width .* got fusion_width=0. Set it \(published: 768",
        ),
        (dict(views=("video", "speech")), "views must be known; got view='speech'"),
        (dict(audio=None), "Views with sound need a tower of sounds"),
        (dict(audio=BEATS.clone(heads=3)), "width must be a multiple of heads"),
    ]:
        with pytest.raises(UserError, match=message):
            made(**options).check()
    silent = made(audio=None, views=("video",))
    zeros = jnp.zeros
    for model, method, inputs, message in [
        (silent, "encode_audio", (zeros((1, 4, 8)),), "without a tower of sounds"),
        (silent, "combine", (zeros((1, 6)), zeros((1, 6))), "without a tower of sounds"),
        (silent, "context", (None, zeros((1, 2, 16))), "without a tower of sounds"),
        (made(joint=False), "combine", (zeros((1, 6)), zeros((1, 6))), "only with joint=True"),
    ]:
        run = lambda *a, m=model, method=method: m.init(jax.random.key(0), *a, method=method)
        with pytest.raises(UserError, match=message):
            jax.eval_shape(run, *inputs)
    no_head = made(views=("video", "audio"))
    init = lambda t, c: no_head.init(
        jax.random.key(0), t, None, c, view="audio_video", method="match"
    )
    with pytest.raises(UserError, match="must have a head; got view='audio_video'"):
        jax.eval_shape(init, zeros((1, 2, 16)), zeros((1, 2, 12)))


def test_heads_on_blocks_need_the_encoder_with_tables():
    heads = alignment.HeadsSpec((0,), 8)
    with pytest.raises(UserError, match="position tables .* got encoder=VideoMAEEncoder"):
        vision().clone(clip=heads).check()
    final = vision().clone(final=alignment.FinalSpec(8))
    shapes = models.shapes(final)
    assert shapes["final_head/out/kernel"] == (20, 8) and "encoder/norm/scale" in shapes
