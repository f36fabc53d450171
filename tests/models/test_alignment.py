"""Alignment heads: counts, which block and which position goes where, the values of a head."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import losses, sharding
from invideo_jax.errors import UserError
from invideo_jax.models import alignment, video_encoder
from invideo_jax.models.alignment import AlignedEncoder, FinalSpec, HeadsSpec

VISIBLE = np.array([[0, 3, 5, 9], [1, 2, 7, 35]], np.int32)
DISTILL = dict(clip_width=1408, mae_layers=0, mlp=True)
STAGE2 = dict(frames=4, mae_layers=0)
# Source: tables of the published models' shapes.
COUNTS = [
    ("1B", dict(), 1_070_042_752),
    ("6B", dict(), 6_075_947_392),
    ("S", DISTILL, 29_169_792),
    ("B", DISTILL, 102_252_288),
    ("L", DISTILL, 327_183_872),
    ("1B", STAGE2 | dict(image_positions="separate"), 1_049_117_056),
    ("6B", STAGE2, 6_003_828_096),
]


@pytest.mark.parametrize("size, options, count", COUNTS)
def test_parameter_counts_are_the_published_ones(size, options, count):
    model = alignment.build(size, scan=True, **options)
    params = jax.eval_shape(lambda: alignment.init(model, jax.random.key(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count
    assert set().union(*sharding.logical_axes(params).values()) <= {None, *sharding.RULES}


def small(**specs):
    encoder = dict(frames=4, image_size=24, layer_scale=0.5)
    encoder |= specs.pop("encoder", {})
    return AlignedEncoder(video_encoder.build("Micro", **encoder), **specs)


def run(model, visible=VISIBLE, frames=4, seed=0):
    params = nn.unbox(alignment.init(model, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    params = tree.unflatten(noisy)
    video = jax.random.normal(jax.random.key(seed), (2, frames, 24, 24, 3))
    return jax.device_get((params, model.apply({"params": params}, video, visible)))


def layer_norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("separate", [False, True])
def test_heads_against_numpy(separate):
    torch = pytest.importorskip("torch")
    gelu = lambda x: torch.nn.functional.gelu(torch.tensor(x)).numpy()
    tables = dict(positions="separate" if separate else "joint")
    model = small(
        clip=HeadsSpec((0, 2), 20),
        mae=HeadsSpec((1, 2), 24, mlp=True),
        final=FinalSpec(10, mlp=True),
        encoder=tables,
    )
    params, out = run(model)

    def rows(name, prefix):
        if not separate:
            return params[f"{name}_position_embedding"]
        time, space = (params[f"{name}_position_{k}"] for k in ("temporal", "spatial"))
        patches = (time[:, None] + space[None]).reshape(36, 48)
        return np.concatenate([params["clip_position_cls"][None], patches]) if prefix else patches

    assert out["clip_middle"].shape == (2, 2, 5, 20) and out["mae"].shape == (2, 2, 4, 24)
    ids = np.concatenate([np.zeros((2, 1), int), VISIBLE + 1], axis=1)
    for k, block in enumerate((0, 2)):
        head = jax.tree.map(lambda x, k=k: x[k], params["clip_heads"])
        x = out[f"block{block}"] + rows("clip", 1)[ids]
        x = layer_norm(x @ head["out"]["kernel"] + head["out"]["bias"], head["norm"])
        np.testing.assert_allclose(out["clip_middle"][:, k], unit(x), atol=2e-6)
    for k, block in enumerate((1, 2)):
        head = jax.tree.map(lambda x, k=k: x[k], params["mae_heads"])
        x = out[f"block{block}"][:, 1:] + rows("mae", 0)[VISIBLE]
        x = gelu(x @ head["up"]["kernel"] + head["up"]["bias"])
        x = layer_norm(x @ head["down"]["kernel"] + head["down"]["bias"], head["norm"])
        np.testing.assert_allclose(out["mae"][:, k], unit(x), atol=2e-6)
    head = params["final_head"]
    x = gelu(out["pooled"] @ head["up"]["kernel"] + head["up"]["bias"])
    x = layer_norm(x @ head["down"]["kernel"] + head["down"]["bias"], head["norm"])
    np.testing.assert_allclose(out["clip_final"], unit(x), atol=2e-6)


def test_without_normalisation_and_without_heads():
    params, out = run(small(clip=HeadsSpec((2,), 20, normalise=False)))
    assert np.abs(np.linalg.norm(out["clip_middle"], axis=-1) - 1).max() > 0.5
    assert not {"mae", "clip_final"} & out.keys() and "mae_position_embedding" not in params
    _, bare = run(small(encoder=dict(pool_width=0)))
    assert "pooled" not in bare and bare["tokens"].shape == (2, 5, 48)


def test_images_take_the_image_tables():
    model = small(clip=HeadsSpec((2,), 20), encoder=dict(image_positions="separate"))
    params, out = run(model, visible=np.array([[0, 8], [3, 4]]), frames=1)
    assert out["clip_middle"].shape == (2, 1, 3, 20)
    rows = params["clip_image_position_embedding"][np.array([[0, 1, 9], [0, 4, 5]])]
    head = jax.tree.map(lambda x: x[0], params["clip_heads"])
    x = (out["block2"] + rows) @ head["out"]["kernel"] + head["out"]["bias"]
    np.testing.assert_allclose(
        out["clip_middle"][:, 0], unit(layer_norm(x, head["norm"])), atol=2e-6
    )


def test_bfloat16_students_give_float32_unit_vectors():
    model = small(clip=HeadsSpec((1,), 20), final=FinalSpec(10), encoder=dict(dtype=jnp.bfloat16))
    _, out = run(model)
    for name in ("clip_middle", "clip_final"):
        assert out[name].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(out[name], axis=-1), 1, atol=1e-6)


def test_blocks_are_counted_from_the_end():
    assert alignment.last_blocks(40, 6) == (34, 35, 36, 37, 38, 39)
    assert alignment.last_blocks(40, 6, 3.34) == (23, 26, 29, 33, 36, 39)
    assert alignment.last_blocks(4, 2, 2) == (1, 3)
    with pytest.raises(UserError, match="different blocks of 0..3; got count=3, interval=0.5"):
        alignment.last_blocks(4, 3, 0.5)


@pytest.mark.parametrize(
    "specs, text",
    [
        (dict(clip=HeadsSpec((3,), 8)), r"clip.blocks must name blocks of 0..2; got .*\(3,\)"),
        (dict(mae=HeadsSpec((2, 1), 8)), r"mae.blocks must be ascending.*\(2, 1\)"),
        (dict(final=FinalSpec(8), encoder=dict(pool_width=0)), "needs the encoder's pool"),
    ],
)
def test_wrong_heads_say_what_to_do(specs, text):
    with pytest.raises(UserError, match=text):
        run(small(**specs))


def test_distance_of_unit_vectors():
    rng = np.random.default_rng(0)
    a, b = (unit(rng.normal(size=(3, 2, 5, 7))) for _ in range(2))
    valid = np.array([True, False, True])
    found = losses.cosine_distance(a, b, valid)
    want = ((a - b) ** 2).sum(-1).mean((1, 2))[valid]
    np.testing.assert_allclose([found.total, found.weight], [want.sum(), 2], rtol=1e-6)
    np.testing.assert_allclose(losses.cosine_distance(a, a, valid).value, 0, atol=1e-6)
    np.testing.assert_allclose(losses.cosine_distance(a, -a, valid).value, 4, atol=1e-6)
