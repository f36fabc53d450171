"""Text towers: parity with transformers in values and gradients, padding, causality, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models.attention import drop
from invideo_jax.models.text_encoder import Bert, ClipText

SIZES = dict(width=24, depth=3, heads=3, mlp_width=40, vocabulary=50, positions=12)


def small(**options):
    return Bert(**(SIZES | dict(fusion_from=1, scan=True) | options))


def whole(model, ids, valid, tokens, seen=None, keys=None):
    return model.words(model(ids, valid, tokens, seen, keys=keys))


def example(batch=3, length=7, other=5, wide=16):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 50, (batch, length)).astype(np.int32)
    valid = np.arange(length) < rng.integers(length // 2 + 1, length + 1, (batch, 1))
    valid[0] = True
    tokens = rng.normal(size=(batch, other, wide)).astype(np.float32)
    return np.where(valid, ids, 0), valid, tokens


def abstract(model, *arguments, method=None):
    init = lambda: model.init(jax.random.key(0), *arguments, method=method)["params"]
    return sharding.unbox(jax.eval_shape(init))


def random_params(model, *arguments, method=None):
    rng = np.random.default_rng(1)
    draw = lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32)
    return jax.tree.map(draw, abstract(model, *arguments, method=method))


def hf_bert(**options):
    """transformers' BERT in float32; its blocks from `fusion_from` on are a decoder's with cross-attention."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        vocab_size=50,
        max_position_embeddings=12,
        attn_implementation="eager",
        **options,
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return torch, model


def close(ours, theirs):
    scale = max(float(np.abs(theirs).max()), 1.0)
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-5 * scale)


def test_text_and_words_equal_transformers_in_values_and_gradients():
    torch, theirs = hf_bert()
    ids, valid, _ = example()
    state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    model = small(fusion_from=3)
    run = lambda m, ids, valid: m.words(m.encode(ids, valid))
    params = to_params(state, layout="bert", expected=abstract(model, ids, valid, method=run))
    weight = np.random.default_rng(2).normal(size=(3, 7, 50)).astype(np.float32)
    loss = lambda p: (model.apply({"params": p}, ids, valid, method=run) * weight).mean()
    grads = jax.jit(jax.grad(loss))(params)
    logits = theirs(torch.from_numpy(ids).long(), torch.from_numpy(valid).long()).logits
    (logits * torch.from_numpy(weight)).mean().backward()
    forward = jax.jit(lambda p: model.apply({"params": p}, ids, valid, method=run))
    close(forward(params), logits.detach().numpy())
    ours = to_state_dict(jax.device_get(grads), layout="bert", cube=(1, 1, 1))
    wanted = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
    assert len(wanted) > 50 and wanted.keys() <= ours.keys()
    for key, want in wanted.items():
        np.testing.assert_allclose(ours[key], want, atol=1e-5, err_msg=key)


def hf_fusion(theirs, torch, ids, valid, tokens, seen, *, fusion_from):
    """Words' scores by transformers' layers, run by hand: bidirectional, the last ones with video."""
    open_to = lambda mask: (~torch.from_numpy(mask))[:, None, None] * torch.finfo(torch.float32).min
    x = theirs.bert.embeddings(torch.from_numpy(ids).long())
    for i, layer in enumerate(theirs.bert.encoder.layer):
        video = dict(encoder_hidden_states=tokens, encoder_attention_mask=open_to(seen))
        x = layer(x, attention_mask=open_to(valid), **(video if i >= fusion_from else {}))
    return theirs.cls(x)


def test_fusion_equals_transformers_layers_in_values_and_gradients():
    torch, theirs = hf_bert(add_cross_attention=True, is_decoder=True)
    ids, valid, tokens = example(wide=24)
    seen = np.arange(5) < np.array([[5], [2], [3]])
    model, arguments = small(), (ids, valid, tokens, seen)
    state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    state = {k: v for k, v in state.items() if "layer.0.crossattention" not in k}
    expected = abstract(model, *arguments, method=whole)
    params = to_params(state, layout="bert", expected=expected)
    video = torch.from_numpy(tokens).requires_grad_()
    logits = hf_fusion(theirs, torch, ids, valid, video, seen, fusion_from=1)
    logits.square().mean().backward()

    def loss(p, t):
        found = model.apply({"params": p}, ids, valid, t, seen, method=whole)
        return jnp.square(found).mean(), found

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, found), (grads, by_token) = run(params, jnp.asarray(tokens))
    close(found, logits.detach().numpy())
    np.testing.assert_allclose(by_token, video.grad.numpy(), atol=1e-5)
    assert np.all(np.asarray(by_token)[~seen] == 0)
    ours = to_state_dict(jax.device_get(grads), layout="bert", cube=(1, 1, 1))
    wanted = {k: p.grad.numpy() for k, p in theirs.named_parameters() if p.grad is not None}
    assert wanted.keys() <= ours.keys() and sum("crossattention" in k for k in wanted) == 20
    for key, want in wanted.items():
        scale = max(float(np.abs(want).max()), 1.0)
        np.testing.assert_allclose(ours[key], want, atol=1e-5 * scale, err_msg=key)


def test_two_stacks_are_one_after_the_other():
    ids, valid, tokens = example()
    model = small()
    params = random_params(model, ids, valid, tokens, method=whole)

    def run(m, *arguments, method=None):
        return jax.jit(lambda *a: m.apply({"params": params}, *a, method=method))(*arguments)

    both = run(model, ids, valid, tokens)
    text = run(model, ids, valid, method="encode")
    np.testing.assert_allclose(both, run(model, text, valid, tokens, method="fuse"), atol=1e-6)
    assert np.abs(np.asarray(run(model, ids, valid, tokens + 1) - both)).max() > 1e-2
    unrolled = run(small(scan=False, remat="full"), ids, valid, tokens)
    np.testing.assert_allclose(unrolled, both, atol=1e-5)


def test_padding_changes_nothing():
    ids, valid, tokens = example()
    model = small()
    params = random_params(model, ids, valid, tokens, method=whole)
    apply = jax.jit(lambda *a: model.apply({"params": params}, *a, method=whole))
    right = np.asarray(apply(ids, valid, tokens))
    noise = np.random.default_rng(3).integers(0, 50, ids.shape)
    changed = np.asarray(apply(np.where(valid, ids, noise), valid, tokens))
    np.testing.assert_array_equal(changed[valid], right[valid])
    longer = np.pad(ids, ((0, 0), (0, 4))), np.pad(valid, ((0, 0), (0, 4)))
    np.testing.assert_allclose(
        np.asarray(apply(*longer, tokens))[:, :7][valid], right[valid], atol=1e-5
    )
    seen = np.ones((3, 8), bool)
    seen[:, 5:] = False
    more = np.concatenate([tokens, np.full((3, 3, 16), 9.0, np.float32)], 1)
    np.testing.assert_allclose(
        np.asarray(apply(ids, valid, more, seen))[valid], right[valid], atol=1e-5
    )
    total = lambda t: model.apply({"params": params}, ids, valid, t, seen, method=whole).sum()
    gradient = jax.jit(jax.grad(total))(jnp.asarray(more))
    assert np.all(np.asarray(gradient)[:, 5:] == 0)


def test_dropout_comes_from_each_examples_own_key():
    ids, valid, tokens = example()
    model = small(dropout=0.3, attention_dropout=0.3)
    params = random_params(model, ids, valid, tokens, method=whole)
    keys = jax.random.split(jax.random.key(0), 3)
    run = jax.jit(lambda *a: model.apply({"params": params}, *a[:3], keys=a[3]))
    apply = lambda *a: np.asarray(run(*a))
    first = apply(ids, valid, tokens, keys)
    np.testing.assert_allclose(
        apply(ids[1:], valid[1:], tokens[1:], keys[1:]), first[1:], atol=1e-5
    )
    assert np.abs(apply(ids, valid, tokens, None) - first).max() > 1e-2
    same = apply(*(np.repeat(x[:1], 3, 0) for x in (ids, valid, tokens)), keys)
    assert np.abs(same[0] - same[1]).max() > 1e-2


def test_dropout_drops_the_share_it_says_and_keeps_the_mean():
    keys = jax.random.split(jax.random.key(1), 8)
    x = np.asarray(drop(jnp.ones((8, 50, 50)), keys, 0.25))
    assert abs((x == 0).mean() - 0.25) < 0.01 and abs(x.mean() - 1) < 0.02
    assert set(np.unique(x)) == {np.float32(0), np.float32(1 / 0.75)}


def clip(**options):
    sizes = dict(width=24, depth=2, heads=3, mlp_width=48, output_width=8)
    return ClipText(**(sizes | dict(vocabulary=40, positions=10) | options))


def test_clip_text_equals_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=48,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=10,
        eos_token_id=39,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = transformers.CLIPTextModelWithProjection(config).eval()
    ids = np.random.default_rng(0).integers(1, 39, (3, 10)).astype(np.int32)
    ids[0, 4], ids[1, 9], ids[2, 6] = 39, 39, 39
    names = {k.split("text_model.")[-1]: v.detach().numpy() for k, v in theirs.named_parameters()}
    state = {
        "positional_embedding": names["embeddings.position_embedding.weight"],
        "token_embedding.weight": names["embeddings.token_embedding.weight"],
        "text_projection": names["text_projection.weight"].T,
    }
    for i in range(2):
        ours, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        qkv = [f"{layer}.self_attn.{n}_proj" for n in "qkv"]
        for part, fused in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
            state[f"{ours}.attn.{fused}"] = np.concatenate([names[f"{n}.{part}"] for n in qkv])
            for ours_name, their_name in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                state[f"{ours}.{ours_name}.{part}"] = names[f"{layer}.{their_name}.{part}"]
    state |= {f"ln_final.{p}": names[f"final_layer_norm.{p}"] for p in ("weight", "bias")}
    model = clip()
    params = to_params(state, layout="clip_text", expected=abstract(model, ids))
    features, tokens = jax.jit(lambda p: model.apply({"params": p}, ids))(params)
    found = theirs(torch.from_numpy(ids).long())
    close(features, found.text_embeds.detach().numpy())
    close(tokens, found.last_hidden_state.detach().numpy())


def test_clip_text_does_not_look_ahead_or_past_its_end():
    model = clip(activation="gelu")
    ids = np.array([[3, 7, 39, 0, 0, 0], [5, 39, 0, 0, 0, 0]], np.int32)
    params = random_params(model, ids)
    run = jax.jit(lambda ids: model.apply({"params": params}, ids))
    features, tokens = run(ids)
    short, _ = run(ids[:, :3])
    np.testing.assert_allclose(short, features, atol=1e-5)
    later = ids.copy()
    later[:, 4] = 8
    np.testing.assert_allclose(run(later)[0], features, atol=1e-6)
    all_see = clip(activation="gelu", causal=False)
    seeing = jax.jit(lambda ids: all_see.apply({"params": params}, ids))
    assert np.abs(seeing(later)[0] - features).max() > 1e-3
    assert tokens.shape == (2, 6, 24)


def test_wrong_sizes_are_explained():
    ids, valid, tokens = example(length=13)
    with pytest.raises(UserError, match="got length=13, positions=12"):
        abstract(small(), ids, valid, tokens, method=whole)
    with pytest.raises(UserError, match="got length=13, positions=10"):
        abstract(clip(), ids)
    with pytest.raises(UserError, match="got fusion_from=5, depth=3"):
        small(fusion_from=5).check()
    with pytest.raises(UserError, match="width=24, heads=5"):
        small(heads=5).check()
    with pytest.raises(UserError, match='Did you mean "gelu"'):
        small(activation="gelo").check()
