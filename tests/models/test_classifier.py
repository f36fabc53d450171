"""Classifiers: merged features and batch norm against PyTorch, published keys, dropout, checks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.mapping import keys_of, names
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import classifier

SMALL = dict(frames=4, image_size=16, classes=5)


def small(encoder="internvideo2", **options):
    return classifier.build("Micro", encoder=encoder, **(SMALL | options))


def random_params(model, seed=0):
    """Parameters of which none is where it starts."""
    shapes = sharding.unbox(jax.eval_shape(lambda: classifier.init(model, jax.random.key(0))))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)
    if "variance" in params.get("down_norm", {}):
        params["down_norm"]["variance"] = rng.uniform(0.5, 2, shapes["down_norm"]["mean"].shape)
        params["down_norm"]["batches"] = np.zeros((), np.float32)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def videos(rows=3, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (rows, 4, 16, 16, 3), np.uint8)


def torch_head(torch, model, params):
    """The layers behind the encoder, as the published class has them, with these parameters."""
    p = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params)
    width = p["down_norm"]["mean" if model.counts_batches else "bias"].shape[0]
    if model.merge_norm == "LN":
        norm = torch.nn.LayerNorm(width)
    elif model.merge_norm == "BN":
        norm = torch.nn.BatchNorm1d(width)
    else:
        norm = torch.nn.BatchNorm1d(width, affine=False, eps=1e-6)
    with torch.no_grad():
        if model.merge_norm != "kaiming_BN":
            norm.weight.copy_(p["down_norm"]["scale"])
            norm.bias.copy_(p["down_norm"]["bias"])
        if model.counts_batches:
            norm.running_mean.copy_(p["down_norm"]["mean"])
            norm.running_var.copy_(p["down_norm"]["variance"])

    def head(tokens, pooled, frames):
        x, last = tokens[:, :1], torch.nn.functional.layer_norm(
            pooled, pooled.shape[-1:], p["fc_norm"]["scale"], p["fc_norm"]["bias"], 1e-5
        )  # fmt: skip
        each = tokens[:, 1:]
        parts = frames if "avgN" in model.merge else 1
        each = each.reshape(len(tokens), parts, -1, tokens.shape[-1]).mean(2)
        x = torch.cat([x, each], 1)
        if "avgN" in model.merge:
            x = torch.nn.functional.gelu(x @ p["down"]["kernel"] + p["down"]["bias"])
        if model.merge_norm == "LN":
            x = norm(x).flatten(1)
        else:
            x = norm(x.permute(0, 2, 1)).flatten(1)
        x = torch.cat([x, last], 1) if "proj" in model.merge else x
        return x @ p["head"]["kernel"] + p["head"]["bias"]

    return head, norm


@pytest.mark.parametrize(
    ("merge", "norm"),
    [
        ("cls_avg1", "kaiming_BN"),
        ("cls_avgN", "BN"),
        ("cls_avgN_proj", "LN"),
        ("cls_avg1_proj", "BN"),
    ],
)
def test_merged_features_and_running_statistics_agree_with_torch(merge, norm):
    torch = pytest.importorskip("torch")
    model = small(variant="cat", merge=merge, merge_norm=norm)
    params = random_params(model)
    head, module = torch_head(torch, model, params)
    run = jax.jit(lambda p, v, train: model.apply({"params": p}, v, train=train), static_argnums=2)
    for train in (True, True, False):  # two updates, then the statistics that they have left
        video = videos(seed=int(train) + 5)
        logits, out = run(params, video, train)
        module.train(train)
        with torch.no_grad():
            want = head(*(torch.tensor(np.asarray(out[n])) for n in ("tokens", "pooled")), 4)
        np.testing.assert_allclose(logits, want.numpy(), atol=2e-5)
        assert ("statistics" in out) == (train and norm != "LN")
        if "statistics" in out:
            params = classifier.with_statistics(params, out["statistics"])
    if norm != "LN":
        moved = params["down_norm"]
        np.testing.assert_allclose(moved["mean"], module.running_mean.numpy(), atol=1e-6)
        np.testing.assert_allclose(moved["variance"], module.running_var.numpy(), atol=1e-6)
        assert int(moved["batches"]) == int(module.num_batches_tracked) == 2


def test_attentive_starts_as_plain_and_adds_what_the_mlp_gives():
    model, plain = small(variant="attentive", init_scale=1.0), small(init_scale=1.0)
    params = jax.jit(lambda: sharding.unbox(classifier.init(model, jax.random.key(0))))()
    bare = {k: v for k, v in params.items() if k != "extra_mlp"}
    same = jax.jit(lambda p: model.apply({"params": p}, videos())[0])
    want = jax.jit(lambda p: plain.apply({"params": p}, videos())[0])(bare)
    np.testing.assert_allclose(same(params), want, atol=1e-6)
    params["extra_mlp"]["down"]["bias"] = jnp.arange(64.0)[
        : params["extra_mlp"]["down"]["bias"].size
    ]
    assert not np.allclose(same(params), want, atol=1e-3)


def test_head_starts_small():
    model = small(init_scale=0.001)
    params = jax.jit(lambda: sharding.unbox(classifier.init(model, jax.random.key(0))))()
    assert np.std(params["head"]["kernel"]) == pytest.approx(2e-5, rel=0.2)
    assert not params["head"]["bias"].any()


def test_dropout_is_each_examples_own():
    model = small("video_mae", dropout=0.5)
    params, video = random_params(model), videos(4)
    keys = jax.random.split(jax.random.key(3), 4)
    run = jax.jit(lambda video, keys: model.apply({"params": params}, video, keys=keys)[0])
    both, part = run(video, keys), run(video[1:3], keys[1:3])
    np.testing.assert_allclose(both[1:3], part, atol=1e-5)
    still = run(video, None)
    assert np.abs(both - still).max() > 1e-2
    # Scaled up: the mean over many draws is what no dropout gives.
    many = jax.random.split(jax.random.key(4), 400)
    same = jnp.broadcast_to(jnp.asarray(video[:1]), (400, *video.shape[1:]))
    mean = run(same, many).mean(0)
    np.testing.assert_allclose(mean, still[0], atol=0.35)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(variant="flat"), "variant must be one of plain"),
        (dict(variant="cat", merge="cls_avg2"), "merge='cls_avg2'"),
        (dict(merge="cls_avg1"), "merge belongs to variant='cat'"),
        (dict(classes=0), "classes must be at least 1"),
        (
            dict(encoder="video_mae", variant="cat", merge="cls_avg1"),
            "needs an encoder with a class",
        ),
    ],
)
def test_what_does_not_fit_is_said(options, said):
    with pytest.raises(UserError, match=said):
        small(**options).check()


CASES = [
    ("plain", {}),
    ("attentive", dict(variant="attentive")),
    ("cat", dict(variant="cat", merge="cls_avgN_proj", merge_norm="BN")),
    ("separate", dict(positions="separate", qkv_bias=True, layer_scale=0.0, qk_norm=False)),
    ("video_mae", dict(encoder="video_mae")),
    ("video_mae_hf", dict(encoder="video_mae")),
]
LAYOUTS = dict(video_mae="videomae_classification", video_mae_hf="videomae_hf_classification")


@pytest.mark.parametrize(("name", "options"), CASES)
def test_there_and_back_is_bit_identical(name, options):
    model = small(**options)
    layout = LAYOUTS.get(name, "internvideo2_classification")
    params = jax.tree.map(np.asarray, random_params(model))
    e = model.encoder
    state = to_state_dict(params, layout=layout, cube=(e.tubelet, e.patch, e.patch))
    back = to_params(state, layout=layout, expected=params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    if name == "cat":
        assert state["down_norm.num_batches_tracked"].dtype == np.int64
        assert state["down_norm.num_batches_tracked"].shape == ()


PUBLISHED = [
    ("internvideo2_finetune_small", "S", {}),
    ("internvideo2_finetune_base", "B", {}),
    ("internvideo2_finetune_large", "L", {}),
    ("internvideo2_finetune_1B", "1B", {}),
    ("internvideo2_finetune_6B", "6B", {}),
    ("internvideo2_finetune_1B_seppos", "1B", dict(positions="separate")),
    ("internvideo2_ap_1B", "1B", dict(variant="attentive")),
    ("internvideo2_cat_1B_cls_avg1_proj", "1B", dict(variant="cat", merge="cls_avg1_proj")),
    ("videomae_finetune_small", "S", dict(encoder="video_mae")),
    ("videomae_finetune_base", "B", dict(encoder="video_mae")),
    ("videomae_finetune_large", "L", dict(encoder="video_mae")),
    ("videomae_finetune_huge", "H", dict(encoder="video_mae")),
    ("hf_videomae_classify_base_tf5", "B", dict(encoder="video_mae")),
    ("hf_videomae_classify_base_tf4", "B", dict(encoder="video_mae")),
]


@pytest.mark.parametrize(("file", "size", "options"), PUBLISHED)
def test_keys_of_published_sizes(shared, file, size, options):
    listed = json.loads((shared / "golden/keys" / f"{file}.json").read_text())
    model = classifier.build(size, classes=400, **options)
    shapes = sharding.unbox(jax.eval_shape(lambda: classifier.init(model, jax.random.key(0))))
    buffers = ("mean", "variance", "batches") if model.counts_batches else ()
    learned = sum(x.size for x in jax.tree.leaves(shapes))
    learned -= sum(shapes["down_norm"][n].size for n in buffers)
    assert learned == listed["n_params"]
    layout = "internvideo2_classification"
    if "videomae" in file:
        layout = LAYOUTS["video_mae_hf" if file.startswith("hf") else "video_mae"]
    flat = {sharding.path_of(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(shapes)}
    ours = [key for _, key, _ in keys_of(names.get(layout), flat)]
    theirs = list(listed["tensors"])
    if file.endswith("tf4"):  # two biases have other names there, read by aliases
        assert len(ours) == len(theirs)
    elif file.startswith("hf"):
        assert sorted(ours) == sorted(theirs)
    else:
        assert ours == theirs
