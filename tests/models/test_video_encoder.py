"""The InternVideo2 encoder against an independent one in PyTorch; features, masks, images, meshes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import optim, sharding
from invideo_jax.errors import UserError
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import pixels, sizes, video_encoder

SMALL = dict(frames=4, image_size=24, layer_scale=0.5)
VISIBLE = np.array([[0, 3, 5, 9, 20, 35], [1, 2, 7, 18, 19, 30]], np.int32)


def small(**options):
    return video_encoder.build("Micro", **(SMALL | options))


@functools.cache
def fresh(model):
    """Parameters none of which sits at a special initial value."""

    def make():
        leaves, tree = jax.tree.flatten(nn.unbox(video_encoder.init(model, jax.random.key(0))))
        keys = jax.random.split(jax.random.key(2), len(leaves))
        new = [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
        return tree.unflatten(new)

    return jax.jit(make)()


def clip(model, frames=None, seed=0):
    side, channels = model.image_size, model.channels
    shape = (2, frames or model.frames, side, side, channels)
    return jax.random.normal(jax.random.key(seed), shape)


def whole(module, video, visible):
    tokens, _ = module(video, visible)
    return tokens, *module.pool_attention(tokens)


# ------------------------------------------------------------- an independent encoder, in PyTorch


def torch_encoder(torch, state, video, visible, *, model):
    """Tokens, pooled vector and the pool's attention from published names, one head at a time."""
    rms = lambda x, w: w * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}[model.activation]
    gelu = functools.partial(torch.nn.functional.gelu, approximate=approximate)
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    stride = (model.tubelet, model.patch, model.patch)
    x = torch.nn.functional.conv3d(video.permute(0, 4, 1, 2, 3), weight, bias, stride=stride)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1)
    if "pos_embed" in state:
        x = x + state["pos_embed"]
    else:
        space, time = state["pos_embed_spatial"][0], state["pos_embed_temporal"][0]
        rows = [space[i] + time[j] for j in range(len(time)) for i in range(len(space))]
        x = x + torch.cat([state["pos_embed_cls"][0], torch.stack(rows)])[None]
    keep = torch.cat([torch.zeros(len(x), 1, dtype=torch.long), visible + 1], 1)
    x = torch.stack([row[ids] for row, ids in zip(x, keep)])

    def attend(q, k, v, heads):
        mixed, shares = [], []
        for qi, ki, vi in zip(*(y.chunk(heads, -1) for y in (q, k, v))):
            shares.append(torch.softmax(qi @ ki.mT * qi.shape[-1] ** -0.5, -1))
            mixed.append(shares[-1] @ vi)
        return torch.cat(mixed, -1), torch.stack(shares)

    for i in range(model.depth):
        p = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if f"blocks.{i}." in k}
        y = rms(x, p["norm1.weight"]) @ p["attn.qkv.weight"].T
        q, k, v = (y + p.get("attn.qkv.bias", 0)).chunk(3, -1)
        if model.qk_norm:
            q, k = rms(q, p["attn.q_norm.weight"]), rms(k, p["attn.k_norm.weight"])
        y = attend(q, k, v, model.heads)[0] @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        x = x + y * p.get("ls1.gamma", 1)
        y = gelu(rms(x, p["norm2.weight"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"])
        x = x + (y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]) * p.get("ls2.gamma", 1)

    p = {k.removeprefix("clip_projector."): v for k, v in state.items() if "clip_proj" in k}
    into = {}
    for name, y in (("q", x.mean(1, keepdim=True)), ("k", x), ("v", x)):
        norm = (p[f"norm1_{name}.weight"], p[f"norm1_{name}.bias"], 1e-5)
        y = torch.nn.functional.layer_norm(y, y.shape[-1:], *norm)
        into[name] = y @ p[f"cross_attn.{name}.weight"].T + p[f"cross_attn.{name}_bias"]
    mixed, shares = attend(into["q"], into["k"], into["v"], model.pool_heads)
    pooled = mixed[:, 0] @ p["cross_attn.proj.weight"].T + p["cross_attn.proj.bias"]
    return x, pooled, shares.mean(0)[:, 0, 1:]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(activation="gelu", positions="separate", qkv_bias=True, qk_norm=False, tubelet=2),
        pytest.param(dict(qkv_bias=True, layer_scale=0.0), marks=pytest.mark.slow),
        pytest.param(dict(activation="gelu", depth=5, heads=6), marks=pytest.mark.slow),
    ],
)
def test_forward_and_gradients_against_pytorch(options):
    torch = pytest.importorskip("torch")
    model = small(**options)
    params, video = fresh(model), clip(model)
    visible = VISIBLE % model.tokens
    visible = np.stack([np.unique(row)[:4] for row in visible])

    def loss(params):
        tokens, pooled, weights = model.apply({"params": params}, video, visible, method=whole)
        return (tokens**2).mean() + (pooled**2).mean() + (weights**2).sum(), (
            tokens,
            pooled,
            weights,
        )

    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    named = functools.partial(
        to_state_dict, layout="internvideo2_encoder", cube=(model.tubelet, 8, 8)
    )
    state = {k: torch.tensor(v, requires_grad=True) for k, v in named(params).items()}
    want = torch_encoder(
        torch, state, torch.tensor(np.array(video)), torch.tensor(visible).long(), model=model
    )
    for ours, theirs in zip(found, want):
        np.testing.assert_allclose(ours, theirs.detach(), atol=1e-5, rtol=1e-5)
    ((want[0] ** 2).mean() + (want[1] ** 2).mean() + (want[2] ** 2).sum()).backward()
    for key, ours in named(jax.device_get(grads)).items():
        np.testing.assert_allclose(ours, state[key].grad, atol=1e-5, rtol=1e-4, err_msg=key)


# ------------------------------------------------------------------- what does not change anything


def test_features_of_a_scanned_stack_equal_those_of_an_unrolled_one():
    model = small()
    params, video = fresh(model), clip(model)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(model, features, params):
        def loss(params):
            last, out = model.apply({"params": params}, video, VISIBLE, features=features)
            kept = {k: v for k, v in out.items() if k.startswith("block")}
            return sum((x**2).mean() for x in kept.values()) + last.mean(), (last, kept)

        return jax.value_and_grad(loss, has_aux=True)(params)

    for features in ((0, -1), (1,)):
        want, grad = run(model, features, params)
        found, other = run(model.clone(scan=True, remat="full"), features, params)
        assert want[1][1].keys() == {f"block{i % 3}" for i in features}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, want)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other, grad)
    last, kept = run(model, (0, -1), params)[0][1]
    np.testing.assert_array_equal(kept["block2"], last)
    assert np.abs(kept["block0"] - last).max() > 0.1


def test_memory_of_features_does_not_grow_with_depth():
    def temporary(depth):
        model = small(depth=depth, scan=True, layer_scale=0.0)
        params = jax.eval_shape(lambda: nn.unbox(video_encoder.init(model, jax.random.key(0))))
        run = lambda p, v: model.apply({"params": p}, v, features=(0, -1))[1]["block0"]
        video = jax.ShapeDtypeStruct((8, 4, 24, 24, 3), jnp.float32)
        return jax.jit(run).lower(params, video).compile().memory_analysis().temp_size_in_bytes

    one_output = 8 * 37 * 48 * 4
    assert temporary(24) - temporary(4) < one_output


def test_gradient_in_hidden_pixels_is_exactly_zero_and_the_class_token_is_kept():
    model = small()
    params, video = fresh(model), clip(model)
    run = lambda p, v: model.apply({"params": p}, v, VISIBLE)[0]
    assert run(params, video).shape == (2, 1 + VISIBLE.shape[1], 48)
    grad = jax.jit(jax.grad(lambda v: (run(params, v) ** 2).sum()))(video)
    grad = np.abs(pixels.patchify(grad, tubelet=1, patch=8)).max(-1)
    seen = np.zeros(grad.shape, bool)
    np.put_along_axis(seen, VISIBLE, True, axis=1)
    assert (grad[~seen] == 0).all() and (grad[seen] > 0).all()
    moved = params | {"cls_token": params["cls_token"] + 1}
    assert (np.abs(run(moved, video) - run(params, video)).max(-1) > 0).all()


def test_all_patches_by_name_are_all_patches():
    model = small()
    params, video = fresh(model), clip(model)
    everything = np.tile(np.arange(model.tokens, dtype=np.int32), (2, 1))
    run = jax.jit(lambda ids: model.apply({"params": params}, video, ids)[0])
    np.testing.assert_allclose(run(everything), run(None), atol=1e-5)


def test_eight_devices_give_what_one_gives():
    options = dict(heads=4, pool_heads=4, dtype=jnp.float64, scan=True, drop_path=0.3)
    model = small(**options)
    keys = jax.random.split(jax.random.key(1), 4)
    video = np.random.default_rng(0).normal(size=(4, 4, 24, 24, 3))
    visible = np.tile(VISIBLE, (2, 1))[:, :5]  # which two devices do not divide

    def loss(params, video, visible, keys):
        def run(module):
            tokens, out = module(video, visible, keys=keys, features=(1,))
            return (module.pooled(tokens) ** 2).mean() + (out["block1"] ** 2).mean()

        return nn.apply(run, model)({"params": params})

    with jax.enable_x64(True):
        boxed = jax.eval_shape(lambda: video_encoder.init(model, jax.random.key(0)))
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), fresh(model))
        step = jax.jit(jax.value_and_grad(loss))
        want, want_grad = jax.device_get(step(params, video, visible, keys))
        mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, sequence=2)
        placed = jax.device_put(params, sharding.param_shardings(boxed, mesh))
        rows = sharding.batch_sharding(mesh)
        batch = [jax.device_put(x, rows) for x in (video, visible, keys)]
        with sharding.use(mesh):
            found, grad = jax.device_get(step(placed, *batch))
    np.testing.assert_allclose(found, want, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), grad, want_grad)


# ------------------------------------------------------------------------------ images, sizes, init


def test_images_have_the_mean_table_or_their_own():
    for options, rows in [
        (dict(), lambda p: p["position_embedding"][1:].reshape(4, 9, 48).mean(0)),
        (dict(tubelet=2), lambda p: p["position_embedding"][1:].reshape(2, 9, 48).mean(0)),
        (dict(image_positions="separate"), lambda p: p["image_position_embedding"][1:]),
        (dict(positions="separate"), lambda p: p["position_spatial"]),
    ]:
        model = small(depth=1, **options)
        params, image = fresh(model), clip(model, frames=1)
        run = jax.jit(functools.partial(model.apply, visible=np.array([[0, 8], [3, 4]])))
        _, out = run({"params": params}, image)
        cubes = pixels.patchify(
            jnp.repeat(image, model.tubelet, axis=1), tubelet=model.tubelet, patch=8
        )
        want = cubes @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"]
        want = (want + rows(params))[np.arange(2)[:, None], np.array([[0, 8], [3, 4]])]
        np.testing.assert_allclose(out["embedded"][:, 1:], want, atol=1e-5)


@pytest.mark.parametrize("size", [s for s, row in sizes.INTERNVIDEO2.items() if row.params])
def test_parameter_counts_are_the_published_ones(size):
    row, model = sizes.internvideo2(size), video_encoder.build(size, scan=True)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    params = jax.eval_shape(lambda: video_encoder.init(model, jax.random.key(0)))
    assert count(params) == row.params
    assert count(params) - count(params["pool"]) == row.trunk_params
    names = set().union(*sharding.logical_axes(params).values())
    assert names <= {None, *sharding.RULES}


def test_initial_values_are_as_published():
    model = small(width=192, heads=4, mlp_width=512, pool_heads=4, layer_scale=1e-5)
    params = nn.unbox(jax.jit(lambda: video_encoder.init(model, jax.random.key(0)))())
    blocks = params["stack"]["blocks"]
    spread = lambda x, want: np.testing.assert_allclose(np.std(x), want, rtol=0.03)
    for kernel in (blocks["attention"]["query"]["kernel"], blocks["mlp"]["up"]["kernel"]):
        spread(kernel, 0.02)
    for i in range(model.depth):
        spread(blocks["attention"]["out"]["kernel"][i], 0.02 / (2 * (i + 1)) ** 0.5)
        spread(blocks["mlp"]["down"]["kernel"][i], 0.02 / (2 * (i + 1)) ** 0.5)
    assert np.abs(params["patch_embed"]["kernel"]).max() <= 192**-0.5
    spread(params["patch_embed"]["kernel"], (192 * 3) ** -0.5)
    spread(params["pool"]["out"]["kernel"], 0.02)
    assert all((params["pool"][n]["bias"] == 0).all() for n in ("query", "key", "value", "out"))
    assert (blocks["scale1"] == np.float32(1e-5)).all() and (blocks["norm1"]["scale"] == 1).all()


@pytest.mark.parametrize("positions", video_encoder.POSITIONS)
def test_tables_and_tokens_do_not_decay(positions):
    model = small(positions=positions, image_positions="separate")
    boxed = jax.eval_shape(lambda: video_encoder.init(model, jax.random.key(0)))
    plan = optim.plan("adamw", boxed, weight_decay=0.05)
    assert {x.path.rsplit("/", 1)[-1] for x in plan if x.weight_decay} == {"kernel"}


def test_bfloat16_keeps_layer_scale_in_float32_only_when_asked():
    video = clip(small())
    params = fresh(small())
    run = lambda m: jax.jit(m.apply)({"params": params}, video, VISIBLE)[0]
    want = run(small())
    for wide in (True, False):
        found = run(small(dtype=jnp.bfloat16, layer_scale_float32=wide))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(np.float32), want, atol=0.05 * np.abs(want).max())


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(image_size=33), "image_size must be a multiple of patch; got image_size=33"),
        (dict(tubelet=3), "frames must be a multiple of tubelet; got frames=4, tubelet=3"),
        (dict(pool_heads=5), "width must be a multiple of pool_heads; got width=48, pool_heads=5"),
        (
            dict(positions="apart"),
            "positions must be one of joint, separate; got positions='apart'",
        ),
        (dict(activation="gelo"), "got activation='gelo'. Did you mean \"gelu\""),
        (dict(width=40, heads=4), "must be a multiple of 16; got width=40"),
    ],
)
def test_wrong_arguments_say_what_to_do(options, text):
    with pytest.raises(UserError, match=text):
        jax.eval_shape(lambda: video_encoder.init(small(**options), jax.random.key(0)))


def test_wrong_inputs_say_what_to_do():
    model = small()
    with pytest.raises(
        UserError, match=r"\[B, 4, 24, 24, 3\], with T=1 for images; got shape=\[2, 3"
    ):
        model.apply({"params": fresh(model)}, clip(model, frames=3))
    bare = small(pool_width=0)
    with pytest.raises(UserError, match="got pool_width=0"):
        bare.apply({"params": fresh(bare)}, jnp.zeros((1, 3, 48)), method="pooled")
    with pytest.raises(UserError, match="got size='2B'"):
        video_encoder.build("2B")
