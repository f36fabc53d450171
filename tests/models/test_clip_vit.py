"""CLIP's transformer on videos: against transformers, joint attention, masks, and names both ways."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import masking
from invideo_jax.errors import UserError
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import clip_vit, pixels

T, SIDE = 2, 4  # frames, patches along a side


def tiny(**options):
    return clip_vit.build("Micro", **(dict(frames=T, image_size=32, scan=True) | options))


def video_of(rows=3, frames=T, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, frames, 32, 32, 3)).astype(np.float32)


@functools.cache
def fresh(model):
    """Parameters none of which sits at a special initial value."""
    params = jax.jit(lambda: nn.unbox(clip_vit.init(model, jax.random.key(0))))()
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return tree.unflatten([x + 0.05 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves])


@functools.partial(jax.jit, static_argnames=("model", "features"))
def run(model, params, video, visible=None, keys=None, features=()):
    return model.apply({"params": params}, video, visible, keys=keys, features=features)


def test_against_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        image_size=32, patch_size=8, projection_dim=24, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    with torch.no_grad():
        for x in theirs.parameters():
            x.add_(0.1 * torch.randn_like(x))
    prefix = "vision_model."
    state = {k.removeprefix(prefix): v.detach().numpy() for k, v in theirs.state_dict().items()}
    model, video = tiny(), video_of()
    expected = jax.eval_shape(lambda: nn.unbox(clip_vit.init(model, jax.random.key(0))))
    params = to_params(state, layout="clip_visual_hf", expected=expected)
    tokens, out = run(model, params, video, features=(1, 2, -1))
    with torch.no_grad():
        images = torch.tensor(video.reshape(3 * T, 32, 32, 3).transpose(0, 3, 1, 2))
        want = theirs(images, output_hidden_states=True, output_attentions=True)
        layer = want.hidden_states[2]
        shared = theirs.visual_projection(theirs.vision_model.post_layernorm(layer))
    frames = lambda x: x.numpy().reshape(3, T, *x.shape[1:])
    pooled = model.apply({"params": params}, tokens, method="pooled")
    np.testing.assert_allclose(pooled, frames(want.image_embeds).mean(1), atol=1e-5)
    np.testing.assert_allclose(out["block1"][:, :T], frames(layer)[:, :, 0], atol=1e-5)
    patches = frames(layer)[:, :, 1:].reshape(3, T * SIDE**2, 48)
    np.testing.assert_allclose(out["block1"][:, T:], patches, atol=1e-5)
    # What unmasked-token distillation asks for: any tokens in the shared space, and the attention.
    found = model.apply({"params": params}, out["block1"], method="project")
    np.testing.assert_allclose(found[:, :T], frames(shared)[:, :, 0], atol=1e-5)
    weights = clip_vit.class_attention(model, params, out["block2"])
    seen = frames(want.attentions[-1].mean(1)[:, 0, 1:]).reshape(3, -1)
    np.testing.assert_allclose(weights, seen, atol=1e-6)
    back = to_state_dict(params, layout="clip_visual_hf", cube=(1, 8, 8))
    assert list(back) == list(state)
    for name in state:
        np.testing.assert_array_equal(back[name], state[name])


@pytest.mark.parametrize(
    "layout, joint, conv, prefix",
    [
        ("clip_visual", False, (48, 3, 8, 8), "visual."),
        ("viclip_visual", True, (48, 3, 1, 8, 8), "vision_encoder."),
    ],
)
def test_names_of_the_original_both_ways(layout, joint, conv, prefix):
    model = tiny(joint=joint)
    params = fresh(model)
    state = to_state_dict(params, layout=layout, cube=(1, 8, 8))
    names = {k.removeprefix(prefix): v.shape for k, v in state.items()}
    assert names["conv1.weight"] == conv and names["proj"] == (48, 24)
    assert names["transformer.resblocks.3.attn.in_proj_weight"] == (3 * 48, 48)
    assert names["positional_embedding"] == (17, 48) and names["class_embedding"] == (48,)
    assert ("temporal_positional_embedding" in names) == joint
    assert not joint or names["temporal_positional_embedding"] == (1, T, 48)
    back = to_params(state, layout=layout, expected=params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.slow
def test_frames_are_independent_unless_joint():
    video = video_of()
    other = video.copy()
    other[:, 1] += 1
    for joint in (False, True):
        model = tiny(joint=joint)
        params = fresh(model)
        a, b = (np.asarray(run(model, params, v)[0])[:, model.prefix :] for v in (video, other))
        first = slice(0, SIDE**2)
        assert (np.abs(a[:, first] - b[:, first]).max() > 1e-3) == joint
        assert np.abs(a[:, SIDE**2 :] - b[:, SIDE**2 :]).max() > 1e-2


def test_one_frame_is_an_image():
    model, video = tiny(), video_of(frames=1)
    params = fresh(model)
    image, _ = run(model, params, video)
    want, _ = run(model, params, np.repeat(video, T, axis=1))
    assert image.shape == (3, 1 + SIDE**2, 48)
    np.testing.assert_allclose(image[:, 0], want[:, 1], atol=1e-5)
    np.testing.assert_allclose(image[:, 1:], want[:, T + SIDE**2 :], atol=1e-5)
    with pytest.raises(UserError, match="got shape=\\[3, 1, 32, 32, 3\\]"):
        run(tiny(joint=True), fresh(tiny(joint=True)), video)


@pytest.mark.parametrize("joint", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hidden_pixels_have_no_gradient_and_visible_ids_select(joint):
    model = tiny(joint=joint)
    params, video = fresh(model), jnp.asarray(video_of())
    keys = jax.random.split(jax.random.key(0), 3)
    visible, hidden = masking.tube(keys, grid=model.grid, ratio=0.5)
    grad = jax.jit(jax.grad(lambda v: jnp.square(run(model, params, v, visible)[0]).sum()))(video)
    grad = np.asarray(pixels.patchify(grad, tubelet=1, patch=8))
    assert (np.asarray(masking.gather(jnp.asarray(grad), hidden)) == 0).all()
    assert (np.abs(np.asarray(masking.gather(jnp.asarray(grad), visible))).max(-1) > 0).all()
    every = jnp.broadcast_to(jnp.arange(model.tokens, dtype=jnp.int32), (3, model.tokens))
    np.testing.assert_allclose(
        run(model, params, video, every)[0], run(model, params, video)[0], atol=1e-5
    )


@pytest.mark.slow
def test_drop_path_differs_by_frame_and_stops_without_keys():
    model = tiny(drop_path=0.9, depth=2)
    params, video = fresh(model), video_of(rows=1)
    keys = jax.random.split(jax.random.key(1), 1)
    dropped, out = run(model, params, video, keys=keys, features=(0,))
    plain, want = run(tiny(depth=2), params, video, features=(0,))
    np.testing.assert_allclose(
        out["block0"], want["block0"], atol=1e-6
    )  # the first block's rate is 0
    assert np.abs(np.asarray(dropped - plain)).max() > 1e-3
    np.testing.assert_array_equal(run(model, params, video)[0], plain)


@pytest.mark.slow
def test_a_stack_in_two_parts_is_the_whole():
    for scan in (False, True):
        model = tiny(scan=scan)
        params, video = fresh(tiny()), video_of()

        def halves(m, v):
            x = m.run(m.embedded(v), (0, 3))
            return m.joined(m.run(x, (3, 4)), T)

        found = model.apply({"params": params}, video, method=halves)
        np.testing.assert_allclose(found, run(model, params, video)[0], atol=1e-5)


def test_published_sizes_have_their_parameters():
    # transformers' CLIPVisionModelWithProjection of openai/clip-vit-base-patch16 and -large-patch14
    for size, count in (("B", 86_192_640), ("L", 303_966_208)):
        model = clip_vit.build(size, scan=True)
        params = jax.eval_shape(lambda m=model: nn.unbox(clip_vit.init(m, jax.random.key(0))))
        assert sum(x.size for x in jax.tree.leaves(params)) == count
    with pytest.raises(UserError, match="got size='Bb'. Did you mean \"B\""):
        clip_vit.build("Bb")
    with pytest.raises(UserError, match="image_size must be a multiple of patch"):
        tiny(image_size=33).check()
