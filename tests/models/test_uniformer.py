"""UniFormerV2 against an independent torch implementation, and its names both ways."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax.errors import UserError
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import uniformer_v2

W, HEADS, DEPTH, EXTRACTORS, P, T, SIDE = 48, 4, 5, 4, 24, 4, 4
LAYOUT = "internvideo1_multimodal"


def tiny(**options):
    return uniformer_v2.build(
        "Micro", **(dict(frames=T, image_size=32, depth=DEPTH, scan=True) | options)
    )


@functools.cache
def state_dict():
    """A state dict written from the published table of keys, not from our parameters."""
    rng = np.random.default_rng(0)
    make = lambda *shape: (rng.normal(size=shape) * 0.3).astype(np.float32)
    norm = lambda name: {f"{name}.weight": 1 + make(W), f"{name}.bias": make(W)}
    state = {
        "visual.conv1.weight": make(W, 3, 1, 8, 8),
        "visual.class_embedding": make(W),
        "visual.positional_embedding": make(SIDE**2 + 1, W),
        "visual.transformer.temporal_cls_token": make(1, 1, W),
        "visual.transformer.balance": 3 * make(W),
        "visual_proj": make(W, P),
        **norm("visual.ln_pre"),
        **norm("visual_ln_post"),
    }

    def block(name, norms):
        scale = W**-0.5 / 0.3
        return {
            f"{name}.attn.in_proj_weight": scale * make(3 * W, W),
            f"{name}.attn.in_proj_bias": make(3 * W),
            f"{name}.attn.out_proj.weight": scale * make(W, W),
            f"{name}.attn.out_proj.bias": make(W),
            f"{name}.mlp.c_fc.weight": scale * make(4 * W, W),
            f"{name}.mlp.c_fc.bias": make(4 * W),
            f"{name}.mlp.c_proj.weight": scale / 2 * make(W, 4 * W),
            f"{name}.mlp.c_proj.bias": make(W),
            **{k: v for i in range(norms) for k, v in norm(f"{name}.ln_{i + 1}").items()},
        }

    for i in range(DEPTH):
        state |= block(f"visual.transformer.resblocks.{i}", 2)
    for j in range(EXTRACTORS):
        state |= block(f"visual.transformer.dec.{j}", 3)
        state[f"visual.transformer.dpe.{j}.weight"] = make(W, 1, 3, 3, 3)
        state[f"visual.transformer.dpe.{j}.bias"] = make(W)
    return state


def oracle(state, video):
    """The whole tower in torch, from section 3 of the paper: ([B, P], token of the video [B, W])."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    s = {k: torch.tensor(v, dtype=torch.float64) for k, v in state.items()}
    b, t = video.shape[:2]

    def norm(name, x):
        return f.layer_norm(x, (W,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-5)

    def attend(name, query, context):
        layer = torch.nn.MultiheadAttention(W, HEADS, batch_first=True, dtype=torch.float64)
        layer.load_state_dict(
            {k.removeprefix(f"{name}.attn."): v for k, v in s.items() if f"{name}.attn." in k}
        )
        return layer(query, context, context)[0].detach()

    def mlp(name, x):
        x = f.linear(x, s[f"{name}.mlp.c_fc.weight"], s[f"{name}.mlp.c_fc.bias"])
        x = x * torch.sigmoid(1.702 * x)
        return f.linear(x, s[f"{name}.mlp.c_proj.weight"], s[f"{name}.mlp.c_proj.bias"])

    x = torch.tensor(video, dtype=torch.float64).permute(0, 4, 1, 2, 3)
    x = f.conv3d(x, s["visual.conv1.weight"], stride=(1, 8, 8))  # [b, W, t, h, w]
    x = x.permute(0, 2, 3, 4, 1).reshape(b * t, SIDE**2, W)
    cls = s["visual.class_embedding"].expand(b * t, 1, W)
    x = torch.cat([cls, x], 1) + s["visual.positional_embedding"]
    x = norm("visual.ln_pre", x)
    token = s["visual.transformer.temporal_cls_token"].expand(b, 1, W)
    for i in range(DEPTH):
        name = f"visual.transformer.resblocks.{i}"
        y = norm(f"{name}.ln_1", x)
        x = x + attend(name, y, y)
        x = x + mlp(name, norm(f"{name}.ln_2", x))
        j = i - (DEPTH - EXTRACTORS)
        if j < 0:
            continue
        copy = x.clone().reshape(b, t, 1 + SIDE**2, W)
        grid = copy[:, :, 1:].reshape(b, t, SIDE, SIDE, W).permute(0, 4, 1, 2, 3)
        dpe = f"visual.transformer.dpe.{j}"
        conv = f.conv3d(grid, s[f"{dpe}.weight"], s[f"{dpe}.bias"], padding=1, groups=W)
        moved = (grid + conv).permute(0, 2, 3, 4, 1).reshape(b, t, SIDE**2, W)
        copy = torch.cat([copy[:, :, :1], moved], 2).reshape(b, -1, W)
        name = f"visual.transformer.dec.{j}"
        token = token + attend(name, norm(f"{name}.ln_1", token), norm(f"{name}.ln_3", copy))
        token = token + mlp(name, norm(f"{name}.ln_2", token))
    share = torch.sigmoid(s["visual.transformer.balance"])
    frames = x.reshape(b, t, 1 + SIDE**2, W)[:, :, 0].mean(1)
    feature = (1 - share) * token[:, 0] + share * frames
    return (norm("visual_ln_post", feature) @ s["visual_proj"]).numpy(), token[:, 0].numpy()


def expected(model):
    return jax.eval_shape(lambda: nn.unbox(uniformer_v2.init(model, jax.random.key(0))))


@functools.cache
def published():
    return to_params(state_dict(), layout=LAYOUT, expected=expected(tiny()))


def video_of(rows=2, frames=T):
    return np.random.default_rng(1).normal(size=(rows, frames, 32, 32, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("model", "features"))
def run(model, params, video, visible=None, keys=None, features=()):
    def whole(m, v):
        tokens, out = m(v, visible, keys=keys, features=features)
        return m.pooled(tokens), tokens, out

    return model.apply({"params": params}, video, method=whole)


@pytest.mark.parametrize(
    "frames, scan", [pytest.param(T, False, marks=pytest.mark.slow), (T, True), (1, True)]
)
def test_against_torch(frames, scan):
    video = video_of(frames=frames)
    want, token = oracle(state_dict(), video)
    found, tokens, _ = run(tiny(scan=scan), published(), video)
    np.testing.assert_allclose(tokens[:, 0], token, atol=2e-5)
    np.testing.assert_allclose(found, want, atol=1e-5 * max(1, np.abs(want).max()))
    assert tokens.shape == (2, 1 + frames + frames * SIDE**2, W)


def test_names_come_back_bit_for_bit():
    back = to_state_dict(published(), layout=LAYOUT, cube=(1, 8, 8))
    assert sorted(back) == sorted(state_dict())
    for name, want in state_dict().items():
        np.testing.assert_array_equal(back[name], want, err_msg=name)


def test_a_fresh_tower_leaves_its_token_alone_and_halves():
    model, video = tiny(), video_of()
    params = jax.jit(lambda: nn.unbox(uniformer_v2.init(model, jax.random.key(0))))()
    rng = np.random.default_rng(0)
    params["temporal_cls_token"] = jnp.asarray(rng.normal(size=W), jnp.float32)
    found, tokens, _ = run(model, params, video)
    np.testing.assert_array_equal(tokens[:, 0], np.tile(params["temporal_cls_token"], (2, 1)))
    half = 0.5 * tokens[:, 0] + 0.5 * tokens[:, 1 : 1 + T].mean(1)
    project = lambda m, x: m.backbone.project(x)
    want = model.apply({"params": params}, half, method=project)
    np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.slow
def test_the_frames_do_not_see_the_token():
    model, video = tiny(), video_of()
    params = published()
    _, tokens, out = run(model, params, video, features=(0, -1))
    alone, want = model.backbone.apply({"params": params["backbone"]}, video, features=(0, -1))
    np.testing.assert_allclose(tokens[:, 1:], alone, atol=3e-5)
    assert sorted(out) == ["block0", f"block{DEPTH - 1}", "embedded"]
    np.testing.assert_allclose(out["block0"], want["block0"], atol=3e-5)


@pytest.mark.slow
def test_dropout_is_of_each_example_s_key_and_keeps_the_mean():
    model, video = tiny(), video_of(rows=1)
    params = published()
    keys = jax.random.split(jax.random.key(0), 64)
    many = jnp.broadcast_to(video, (64, *video.shape[1:]))
    token = lambda keys, video: run(model, params, video, keys=keys)[1][:, 0]
    found = np.asarray(token(keys, many))
    assert len(np.unique(found.round(4), axis=0)) == 64
    np.testing.assert_allclose(token(keys[3:4], video)[0], found[3], atol=1e-5)
    none = run(tiny(dropout=0.0), params, video, keys=keys[:1])[1][:, 0]
    np.testing.assert_array_equal(none, run(model, params, video)[1][:, 0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="frame by frame; got joint=True"):
        tiny(joint=True).check()
    with pytest.raises(UserError, match="got extractors=6, depth=5"):
        tiny(extractors=6).check()
    with pytest.raises(UserError, match="needs every patch"):
        run(tiny(), published(), video_of(), visible=jnp.zeros((2, 4), jnp.int32))


def test_published_size():
    # ViT-B/16 and, of each of 4 extractors, attention, MLP, 3 norms and the convolution; token, gate.
    width = 768
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 3 * 2 * width + 28 * width
    model = uniformer_v2.build("B", scan=True)
    assert (
        sum(x.size for x in jax.tree.leaves(expected(model))) == 86_192_640 + 4 * block + 2 * width
    )
