"""Teachers: their features against plain loops, the released attention, parameter counts and names."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import clip_vit, pixels, positions, teachers, umt, video_mae

VIDEO = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), np.uint8))


def perturbed(teacher, seed=0):
    """Parameters that are nowhere at their initial value."""
    shapes = sharding.unbox(jax.eval_shape(lambda: teacher.init(jax.random.key(0))))
    rng = np.random.default_rng(seed)

    def draw(path, x):
        noise = rng.standard_normal(x.shape)
        kernel = sharding.path_of(path).endswith("kernel")
        return np.asarray(noise / x.shape[-2] ** 0.5 if kernel else 0.5 + 0.3 * noise, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def forward(encoder, params, *blocks, visible=None):
    """The encoder's tokens, and the outputs of blocks by name."""
    run = jax.jit(lambda p, v: encoder.apply({"params": p}, v, visible, features=blocks))
    return run(params, VIDEO)


def length_one(x):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def test_image_teacher_is_a_loop_over_frames():
    teacher = teachers.internvl("Micro", frames=4, image_size=32, layers=2)
    params = perturbed(teacher)
    made = jax.jit(teacher)(params, VIDEO)
    assert teacher.grid == (4, 4, 4) and teacher.layers == (1, 2)

    def run(encoder, x):
        tokens, out = encoder(x, features=(1, 2))
        return out["block1"], out["block2"], *encoder.pool_attention(tokens)

    frame = jax.jit(lambda x: teacher.encoder.apply({"params": params}, x[None, None], method=run))

    for b in range(2):
        frames = [frame(VIDEO[b, t]) for t in range(4)]
        for k in range(2):
            cls = np.mean([f[k][0, 0] for f in frames], axis=0)
            want = np.concatenate([cls[None], *(f[k][0, 1:] for f in frames)])
            np.testing.assert_allclose(made["middle"][b, k], length_one(want), atol=4e-6)
        pooled = np.mean([f[2][0] for f in frames], axis=0)
        np.testing.assert_allclose(made["final"][b], length_one(pooled), atol=4e-6)
        attention = np.concatenate([f[3][0] for f in frames])
        np.testing.assert_allclose(made["attention"][b], attention, atol=5e-6)


def test_video_teacher_keeps_its_class_token():
    teacher = teachers.internvideo2("Micro", frames=4, image_size=32, layers=2, interval=2)
    params = perturbed(teacher)
    made = jax.jit(teacher)(params, VIDEO)
    tokens, out = forward(teacher.encoder, params, 0, 2)
    assert teacher.layers == (0, 2)
    for k, block in enumerate(("block0", "block2")):
        np.testing.assert_allclose(made["middle"][:, k], length_one(out[block]), atol=4e-6)
    pool = jax.jit(lambda x: teacher.encoder.apply({"params": params}, x, method="pool_attention"))
    pooled, weights = pool(tokens)
    np.testing.assert_allclose(made["final"], length_one(pooled), atol=4e-6)
    np.testing.assert_allclose(made["attention"], weights, atol=1e-6)


def test_mae_teacher_normalises_its_last_block_only():
    teacher = teachers.video_mae_teacher("Micro", frames=4, image_size=32, layers=2)
    params = perturbed(teacher)
    made = jax.jit(teacher)(params, VIDEO)["middle"]
    tokens, out = forward(teacher.encoder, params, 0, 1)
    np.testing.assert_allclose(made[:, 0], length_one(out["block0"]), atol=4e-6)
    np.testing.assert_allclose(made[:, 1], length_one(tokens), atol=4e-6)
    assert np.abs(length_one(out["block1"]) - made[:, 1]).max() > 0.1


def test_clip_teacher_projects_patches():
    teacher = teachers.clip("Micro", frames=4, image_size=32, layers=2)
    params = perturbed(teacher)
    made = jax.jit(teacher)(params, VIDEO)
    _, out = forward(teacher.encoder, params, 2, 3)
    project = jax.jit(lambda x: teacher.encoder.apply({"params": params}, x, method="project"))
    for k, block in enumerate(("block2", "block3")):
        patches = out[block][:, teacher.encoder.prefix :]
        np.testing.assert_allclose(made["middle"][:, k], length_one(project(patches)), atol=4e-6)
    assert made["attention"].shape == (2, 64) and teacher.prefix == 0
    assert np.all(made["attention"] > 0) and made["attention"].reshape(8, 16).sum(1).max() < 1


def test_attention_as_released():
    """The reading of the released code: softmax over heads, and the result read in another order."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 5, 6)).astype(np.float32) for _ in range(3))
    heads, width = 3, 2
    apart = lambda x: x.reshape(2, 5, heads, width).transpose(0, 2, 1, 3)  # [B, K, N, d]
    a, b, c = apart(q), apart(k), apart(v)
    out = np.zeros((2, heads, 5, width))
    for i in range(2):
        for n in range(5):  # a function that takes axis 1 for tokens and axis 2 for heads
            scores = a[i, :, n] @ b[i, :, n].T * width**-0.5
            share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            out[i, :, n] = share @ c[i, :, n]
    ours = teachers.exchanged(q, k, v, heads=heads)
    np.testing.assert_allclose(ours, out.reshape(2, 5, 6), atol=1e-6)


def test_released_attention_is_a_switch():
    options = dict(frames=4, image_size=32, layers=1)
    right = teachers.video_mae_teacher("Micro", **options)
    wrong = teachers.video_mae_teacher("Micro", **options, faithful_attention=True)
    params = perturbed(right)
    made = [jax.jit(t)(params, VIDEO)["middle"] for t in (right, wrong)]
    cosine = (np.asarray(made[0]) * np.asarray(made[1])).sum(-1)
    assert cosine.mean() < 0.98 and cosine.max() < 1


def test_frames_are_resized_for_the_teacher():
    teacher = teachers.clip("Micro", frames=4, image_size=24, layers=1)
    flat = jnp.full((1, 4, 32, 32, 3), 77, jnp.uint8)
    params = perturbed(teacher)
    run = jax.jit(teacher)
    small = run(params, jnp.full((1, 4, 24, 24, 3), 77, jnp.uint8))["middle"]
    np.testing.assert_allclose(run(params, flat)["middle"], small, atol=1e-5)


def test_frames_are_resized_as_released():
    torch = pytest.importorskip("torch")
    teacher = teachers.video_mae_teacher("Micro", frames=4, image_size=24, layers=1)
    clip = pixels.normalise(VIDEO, "imagenet")
    rows = torch.from_numpy(np.asarray(clip).reshape(-1, 32, 32, 3)).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(rows, (24, 24), mode="bicubic", align_corners=False)
    want = want.permute(0, 2, 3, 1).reshape(2, 4, 24, 24, 3).numpy()
    for video in (VIDEO, clip):
        np.testing.assert_allclose(teacher._fit(video), want, atol=2e-5)
    half = teachers.clip("Micro", frames=4, image_size=24, layers=1, dtype=jnp.bfloat16)
    assert half._fit(VIDEO).dtype == jnp.bfloat16


def test_constants_of_clip_are_a_switch():
    """UMT as released: CLIP sees the clip that the student sees."""
    options = dict(frames=4, image_size=32, layers=1)
    own, released = (
        teachers.clip("Micro", **options, **more) for more in ({}, dict(normalisation="imagenet"))
    )
    params = perturbed(own)
    seen = {
        name: jax.jit(own)(params, pixels.normalise(VIDEO, name))["middle"]
        for name in ("clip", "imagenet")
    }
    np.testing.assert_allclose(jax.jit(own)(params, VIDEO)["middle"], seen["clip"], atol=1e-6)
    made = jax.jit(released)(params, VIDEO)["middle"]
    np.testing.assert_allclose(made, seen["imagenet"], atol=1e-6)
    assert np.abs(made - seen["clip"]).max() > 1e-3


def test_scores_of_attention_are_never_bfloat16():
    teacher = teachers.clip("Micro", frames=4, image_size=32, layers=1, dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 4 * 17, 48), jnp.bfloat16)
    run = lambda p, x: clip_vit.class_attention(teacher.encoder, p, x)
    dots = [
        eqn.outvars[0].aval.dtype
        for eqn in jax.make_jaxpr(run)(perturbed(teacher), tokens).eqns
        if eqn.primitive.name == "dot_general"
    ]
    assert dots == [jnp.bfloat16, jnp.bfloat16, jnp.float32]  # query, key, scores


def test_features_are_kept_in_the_dtype_of_the_teacher():
    teacher = teachers.internvl("Micro", frames=4, image_size=32, layers=1, dtype=jnp.bfloat16)
    made = jax.eval_shape(teacher, perturbed(teacher), VIDEO)
    assert made["middle"].dtype == made["final"].dtype == jnp.bfloat16
    assert made["attention"].dtype == jnp.float32


@pytest.mark.parametrize(
    "layers, interval, wrong", [(4, 1.0, "count=4"), (2, 0.4, "interval=0.4"), (0, 1.0, "count=0")]
)
def test_layers_must_be_different_blocks(layers, interval, wrong):
    with pytest.raises(UserError, match=wrong):
        teachers.internvl("Micro", frames=4, image_size=32, layers=layers, interval=interval)


def test_published_blocks():
    made = teachers.internvideo2("1B", frames=8, image_size=224)
    assert made.layers == (23, 26, 29, 33, 36, 39)
    made = teachers.internvl("6B", frames=8, image_size=224)
    assert made.layers == (42, 43, 44, 45, 46, 47)
    made = teachers.video_mae_teacher("g", frames=16, image_size=224)
    assert made.layers == (36, 37, 38, 39) and made.grid == (8, 16, 16)


PUBLISHED = [
    ("teacher_internvl_clip_6b", "internvl_vision", teachers.internvl, "6B", 8, 5_936_000_768),
    ("teacher_mae_g14_hybrid", "videomae_encoder", teachers.video_mae_teacher, "g", 16, 1_011_610_752),
]  # fmt: skip


@pytest.mark.parametrize("file, layout, make, size, frames, count", PUBLISHED)
def test_published_counts(file, layout, make, size, frames, count):
    teacher = make(size, frames=frames, image_size=224)
    shapes = sharding.unbox(jax.eval_shape(lambda: teacher.init(jax.random.key(0))))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("file, layout, make, size, frames, count", PUBLISHED)
def test_published_names(shared, file, layout, make, size, frames, count):
    teacher = make(size, frames=frames, image_size=224)
    shapes = sharding.unbox(jax.eval_shape(lambda: teacher.init(jax.random.key(0))))
    # Views of one number: no memory, and every turn of axes is done for real.
    zero = np.zeros((), np.float32)
    params = jax.tree.map(lambda x: np.broadcast_to(zero, x.shape), shapes)
    cube = (teacher.encoder.tubelet, teacher.encoder.patch, teacher.encoder.patch)
    found = names_and_shapes(params, layout, cube)
    text = (shared / "golden" / "keys" / f"{file}.json").read_text()
    assert found == {k: tuple(shape) for k, (_, shape) in json.loads(text)["tensors"].items()}


def names_and_shapes(params, layout, cube):
    """Keys and shapes of a state dict; made from slices of two blocks, since blocks are alike."""
    depth = jax.tree.leaves(params["stack"])[0].shape[0]
    few = dict(params, stack=jax.tree.map(lambda x: x[:1], params["stack"]))
    one = {k: v.shape for k, v in to_state_dict(few, layout=layout, cube=cube).items()}
    return {
        key.replace("blocks.0.", f"blocks.{i}."): shape
        for key, shape in one.items()
        for i in range(depth if "blocks.0." in key else 1)
    }


def test_umt_student_against_a_plain_reading():
    encoder = video_mae.build_encoder("Micro", frames=4, tubelet=1, image_size=32)
    model = umt.UMTStudent(encoder, (0, 1), 24)
    params = sharding.unbox(jax.jit(functools.partial(umt.init, model))(jax.random.key(0)))
    params = jax.device_get(params)
    visible = np.asarray([[1, 5, 33], [0, 62, 63]])
    run = jax.jit(lambda p: model.apply({"params": p}, VIDEO, visible)["clip_middle"])
    made = run(params)
    tokens, out = forward(encoder, params["encoder"], 0, 1, visible=visible)
    norm, heads = params["encoder"]["norm"], params["clip_heads"]
    standard = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    for k in range(2):
        x = standard(np.asarray(out[f"block{k}"])) * norm["scale"] + norm["bias"]
        x = x + positions.sinusoid(64, 32)[visible]
        x = x @ heads["out"]["kernel"][k] + heads["out"]["bias"][k]
        x = standard(np.asarray(x)) * heads["norm"]["scale"][k] + heads["norm"]["bias"][k]
        np.testing.assert_allclose(made[:, k], length_one(x), atol=5e-6)
    last = standard(np.asarray(out["block1"])) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(tokens, last, atol=2e-5)
