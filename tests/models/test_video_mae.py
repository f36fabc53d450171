"""VideoMAE: sizes, that scan and remat change nothing, and that hidden pixels are never seen."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import masking
from invideo_jax.errors import UserError
from invideo_jax.models import layers, pixels, positions, sizes, video_mae

SMALL = dict(image_size=32, frames=4, patch=8)


def small(**options):
    return video_mae.build("Micro", **(SMALL | options))


def inputs(model, batch=2, seed=0, ratio=0.75):
    shape = (batch, model.encoder.frames, model.encoder.image_size, model.encoder.image_size, 3)
    video = jax.random.normal(jax.random.key(seed), shape)
    keys = jax.random.split(jax.random.key(seed + 1), batch)
    return video, *masking.tube(keys, grid=model.encoder.grid, ratio=ratio)


def shaken(params, seed=2):
    """Parameters none of which sits at a special initial value."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


@functools.cache
def fresh(model):
    return jax.jit(lambda: shaken(nn.unbox(video_mae.init(model, jax.random.key(0)))))()


def encode(model, params, video, visible=None, features=()):
    """The encoder alone."""
    return model.encoder.apply({"params": params["encoder"]}, video, visible, features=features)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("size", [s for s, row in sizes.VIDEO_MAE.items() if row.params])
def test_parameter_counts_are_the_published_ones(size):
    row, model = sizes.video_mae(size), video_mae.build(size, scan=True)
    params = jax.eval_shape(lambda: video_mae.init(model, jax.random.key(0)))
    assert count(params) == row.params
    assert count(params["encoder"]) == row.encoder_params


def test_every_parameter_names_its_axes():
    params = jax.eval_shape(lambda: video_mae.init(small(layer_scale=0.1), jax.random.key(0)))
    known = {"layers", "embed", "heads", "mlp", "patch", "pixels", "norm", None}
    for box in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert len(box.names) == box.value.ndim and set(box.names) <= known
    kernel = params["encoder"]["stack"]["blocks"]["attention"]["query"]["kernel"]
    assert kernel.names == ("layers", "embed", "heads")


@functools.cache
def grads(**options):
    model = small(layer_scale=0.5)
    params = fresh(model)
    model = small(layer_scale=0.5, **options)
    video, visible, hidden = inputs(model)
    run = lambda p: jnp.square(model.apply({"params": p}, video, visible, hidden)[0]).mean()
    return jax.jit(jax.value_and_grad(run))(params)


@pytest.mark.parametrize(
    "scan, remat",
    [
        (True, "none"),
        (False, "full"),
        (True, "save_qkv_mlp"),
        pytest.param(True, "full", marks=pytest.mark.slow),
        pytest.param(True, "dots", marks=pytest.mark.slow),
        pytest.param(False, "save_qkv_mlp", marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_change_no_value_and_no_gradient(scan, remat):
    want, want_grad = grads()
    found, found_grad = grads(scan=scan, remat=remat)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-9),
        found_grad,
        want_grad,
    )


def test_remat_policies_keep_what_they_say(capsys):
    x = jnp.ones((1, 4, 32))
    block = layers.Block(2, 64)
    params = jax.eval_shape(lambda: nn.unbox(block.init(jax.random.key(0), x)))

    def kept(name):
        run = lambda p, x: block.apply(p, x).sum()
        if name != "none":
            run = jax.checkpoint(run, policy=layers.REMAT[name])
        jax.ad_checkpoint.print_saved_residuals(run, params, x)
        lines = [x for x in capsys.readouterr().out.splitlines() if "from the argument" not in x]
        shapes = [re.match(r"\w+\[([\d,]*)\]", x).group(1).split(",") for x in lines]
        return sum(int(np.prod([int(n or 1) for n in shape])) for shape in shapes)

    assert kept("full") == 0
    # query, key, value [4, 32], and the MLP's hidden layer [4, 64]
    assert kept("save_qkv_mlp") == 3 * 4 * 32 + 4 * 64
    assert kept("save_qkv_mlp") <= kept("dots") < kept("none")


def test_features_of_any_block_by_name():
    params = fresh(small(depth=3, last_norm=False))
    run = jax.jit(encode, static_argnums=0, static_argnames="features")
    for scan in (False, True):
        model = small(depth=3, scan=scan, last_norm=False)
        video, visible, _ = inputs(model)
        last, out = run(model, params, video, visible, features=(0, -1))
        assert {"block0", "block2"} <= set(out) and "block1" not in out
        np.testing.assert_array_equal(out["block2"], last)
    cut = {
        "encoder": params["encoder"]
        | {"stack": jax.tree.map(lambda x: x[:1], params["encoder"]["stack"])}
    }
    want, _ = run(small(depth=1, last_norm=False), cut, video, visible, features=())
    np.testing.assert_allclose(out["block0"], want, atol=1e-6)
    with pytest.raises(UserError, match="got features=3"):
        encode(model, params, video, visible, features=(3,))


def test_gradient_of_visible_features_in_hidden_pixels_is_exactly_zero():
    model = small()
    params = fresh(model)
    video, visible, hidden = inputs(model)
    run = lambda v: jnp.square(encode(model, params, v, visible)[0]).sum()
    grad = pixels.patchify(jax.jit(jax.grad(run))(video), tubelet=2, patch=8)
    assert (np.asarray(masking.gather(grad, hidden)) == 0.0).all()
    assert (np.abs(np.asarray(masking.gather(grad, visible))).max(-1) > 0).all()


def test_prediction_does_not_depend_on_hidden_pixels():
    model = small()
    params = fresh(model)
    video, visible, hidden = inputs(model)
    cubes = pixels.patchify(video, tubelet=2, patch=8)
    other = masking.scatter(cubes, jnp.full_like(masking.gather(cubes, hidden), jnp.nan), hidden)
    other = pixels.unpatchify(other, grid=model.encoder.grid, tubelet=2, patch=8)
    run = jax.jit(lambda v: model.apply({"params": params}, v, visible, hidden)[0])
    np.testing.assert_array_equal(run(video), run(other))


def matmul_flops(function, *args):
    """Of the compiled program; blocks are unrolled, so that nothing is counted once for many."""
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("ratio", [0.75, pytest.param(0.9, marks=pytest.mark.slow)])
def test_encoder_flops_are_those_of_the_visible_tokens(ratio):
    # A size where matrix products dominate; products of a token cost as many operations as it has
    # weights, times two; attention costs 4*D for each pair of tokens.
    model = small(width=128, heads=2, mlp_width=512, frames=4, image_size=64)
    params = jax.eval_shape(lambda: nn.unbox(video_mae.init(model, jax.random.key(0))))
    video = jax.ShapeDtypeStruct((2, 4, 64, 64, 3), jnp.float32)
    n = model.encoder.tokens
    seen = n - model.encoder.grid[0] * int(ratio * 64)
    ids = jax.ShapeDtypeStruct((2, seen), jnp.int32)

    def train(params, video, visible):
        run = lambda p: encode(model, p, video, visible)[0].sum()
        return jax.grad(run)(params)

    theory = lambda m: m * (12 * 128**2 * 2 + 384 * 128) + 2 * m * m * 2 * 128
    masked = matmul_flops(train, params, video, ids)
    whole = matmul_flops(lambda p, v: train(p, v, None), params, video)
    assert masked / whole == pytest.approx(theory(seen) / theory(n), rel=0.05)
    per_token = 2 * theory(seen) * 2 * 3  # batch, multiply-add, forward and two backward products
    assert masked == pytest.approx(per_token, rel=0.1)


@pytest.mark.parametrize("name", pixels.NORMALISATION)
def test_uint8_is_normalised_with_the_model_s_constants(name):
    model = small(normalisation=name, depth=1)
    params = fresh(model)
    _, visible, _ = inputs(model)
    video = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)
    mean, std = (np.array(x) for x in pixels.NORMALISATION[name])
    floats = jnp.asarray((video / 255 - mean) / std, jnp.float32)
    run = jax.jit(lambda v: encode(model, params, v, visible)[0])
    np.testing.assert_allclose(run(jnp.asarray(video)), run(floats), atol=2e-5)
    back = pixels.unnormalise(pixels.normalise(video, name), name)
    np.testing.assert_allclose(back, video / 255, atol=1e-6)


def test_bfloat16_computes_near_float32_with_float32_parameters():
    model = small()
    params = fresh(model)
    video, visible, hidden = inputs(model)
    low = model.clone(encoder=model.encoder.clone(dtype=jnp.bfloat16))
    run = jax.jit(
        lambda m: m.apply({"params": params}, video, visible, hidden)[0], static_argnums=0
    )
    found, want = run(low), run(model)
    assert found.dtype == jnp.bfloat16
    types = jax.eval_shape(lambda: video_mae.init(low, jax.random.key(0)))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(types))
    np.testing.assert_allclose(found.astype(jnp.float32), want, atol=0.05 * np.abs(want).max())


def test_drop_path_keeps_or_drops_whole_examples_and_scales():
    keys = jax.random.split(jax.random.key(0), 2000)
    branch = jnp.ones((2000, 2, 3))
    found = np.asarray(layers.drop_path(branch, keys, 0.25))
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.75)}
    assert (found == found[:, :1, :1]).all()
    np.testing.assert_allclose((found[:, 0, 0] == 0).mean(), 0.25, atol=0.04)


def test_drop_path_follows_the_example_s_key_and_scan_does_not_matter():
    model = small(drop_path=0.5)
    params = fresh(model)
    video, visible, _ = inputs(model, batch=4)
    keys = jax.random.split(jax.random.key(3), 4)

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, rows, keys):
        given = video[rows], visible[rows]
        return model.encoder.apply({"params": params["encoder"]}, *given, keys=keys)[0]

    rows = np.arange(4)
    want = run(model, rows, keys)
    np.testing.assert_allclose(run(model, rows[::-1], keys[::-1]), want[::-1], atol=1e-5)
    np.testing.assert_allclose(
        run(model.clone(encoder=model.encoder.clone(scan=True)), rows, keys), want, atol=1e-5
    )
    assert np.abs(np.asarray(want - run(model, rows, None))).max() > 1e-2


def test_positions_against_a_loop():
    table = positions.sinusoid(5, 7)
    for p in range(5):
        for j in range(7):
            angle = p / 10000 ** (2 * (j // 2) / 7)
            want = np.cos(angle) if j % 2 else np.sin(angle)
            assert table[p, j] == pytest.approx(want, abs=1e-7)


def test_patchify_against_a_loop():
    video = np.random.default_rng(0).normal(size=(1, 4, 6, 8, 3)).astype(np.float32)
    found = np.asarray(pixels.patchify(jnp.asarray(video), tubelet=2, patch=2))
    n = 0
    for t in range(2):
        for h in range(3):
            for w in range(4):
                cube = video[0, 2 * t : 2 * t + 2, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
                np.testing.assert_array_equal(found[0, n], cube.reshape(-1))
                n += 1
    back = pixels.unpatchify(jnp.asarray(found), grid=(2, 3, 4), tubelet=2, patch=2)
    np.testing.assert_array_equal(back, video)


def test_initial_values_are_as_published():
    model = video_mae.build("Ti", image_size=32, frames=4)
    params = nn.unbox(jax.jit(lambda: video_mae.init(model, jax.random.key(0)))())
    blocks = params["encoder"]["stack"]["blocks"]
    limit = lambda x, bound: (
        np.testing.assert_allclose(np.abs(x).max(), bound, rtol=1e-2),
        np.testing.assert_allclose(np.std(x), bound / 3**0.5, rtol=3e-2),
    )
    limit(blocks["attention"]["query"]["kernel"], (6 / (4 * 192)) ** 0.5)  # of the fused matrix
    limit(blocks["attention"]["out"]["kernel"], (6 / (2 * 192)) ** 0.5)
    limit(blocks["mlp"]["up"]["kernel"], (6 / (192 + 768)) ** 0.5)
    limit(params["encoder"]["patch_embed"]["kernel"], (2 * 16 * 16 * 3) ** -0.5)
    limit(params["encoder_to_decoder"]["kernel"], 192**-0.5)
    assert not np.allclose(blocks["mlp"]["up"]["kernel"][0], blocks["mlp"]["up"]["kernel"][1])
    assert np.abs(params["mask_token"]).max() <= 0.02 and np.std(params["mask_token"]) > 0.005
    assert (np.asarray(blocks["attention"]["query"]["bias"]) == 0).all()
    assert (np.asarray(blocks["norm1"]["scale"]) == 1).all()


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(image_size=33), "image_size must be a multiple of patch; got image_size=33, patch=8"),
        (dict(frames=3), "frames must be a multiple of tubelet; got frames=3, tubelet=2"),
        (dict(heads=5), "width must be a multiple of heads; got width=32, heads=5"),
        (dict(remat="ful"), "got remat='ful'. Did you mean \"full\""),
        (dict(activation="gelo"), "got activation='gelo'. Did you mean \"gelu\""),
    ],
)
def test_wrong_arguments_say_what_to_do(options, text):
    with pytest.raises(UserError, match=text):
        jax.eval_shape(lambda: video_mae.init(small(**options), jax.random.key(0)))


def test_wrong_size_names_and_shapes_say_what_to_do():
    with pytest.raises(UserError, match="got size='b'."):
        video_mae.build("b")
    with pytest.raises(TypeError, match="pach"):
        video_mae.build("B", pach=8)
    model = small()
    with pytest.raises(UserError, match=r"\[B, 4, 32, 32, 3\]; got shape=\[1, 4, 32, 16, 3\]"):
        jax.eval_shape(lambda p, v: encode(model, p, v), fresh(model), jnp.zeros((1, 4, 32, 16, 3)))
